/* rotate.inc.h: the rotation of 4 or 16 rows at once; included by each ISA's file after its vec_*.h.
 *
 * x is [head_dim][lanes]: lanes are rows, so every step is a plain vector operation. No fused
 * multiply-add and a fixed order of sums: every instruction set gives the same bits.
 */

/* 16 lanes in vectors of the instruction set's width. */
#define T vf
#define W VL
#define NAME(x) x##_wide
#include "rotate_vector.inc.h"
#undef T
#undef W
#undef NAME

/* 4 lanes in vectors of 4, which every served instruction set has. */
typedef float four __attribute__((vector_size(16)));
#define T four
#define W 4
#define NAME(x) x##_four
#include "rotate_vector.inc.h"
#undef T
#undef W
#undef NAME

static void rotate16(const tqai_codec *codec, float *x, int inverse) { rotate_wide(codec, x, 16, inverse); }

static void rotate(const tqai_codec *codec, float *x, int lanes, int inverse) {
    if (lanes == 4) rotate_four(codec, x, 4, inverse);
    else rotate16(codec, x, inverse);
}
