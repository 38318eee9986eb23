/* kernels_scalar.c: plain C; the oracle of the other instruction sets. */
#include <float.h>
#include <math.h>
#include <string.h>
#include "isa.h"
#include "layout.h"

#include "vec_scalar.h"
static inline int of_bytes(const tqai_codec *codec) { return (void)codec, 0; }

#include "convert.inc.h"
#include "rotate.inc.h"
#include "codes.inc.h"
#include "softmax.inc.h"
#include "exact.inc.h"

static void load_levels(const tqai_codec *codec, int is_value, const uint8_t *codes, int16_t *restrict level) {
    const int dim = codec->head_dim;
    if (codec->bits == 8) {
        for (int unit = 0; unit < 2 * dim; unit++)
            for (int e = 0; e < UNIT; e++) level[UNIT * unit + e] = codec->levels[codes[LINE_BYTES * (unit / 2) + 2 * e + unit % 2]];
        return;
    }
    for (int unit = 0; unit < dim; unit++) {
        int half[2];
        tqai_halves(is_value, dim, unit, half, half + 1);
        for (int e = 0; e < 64; e++)
            level[UNIT * half[e / 2 % 2] + 2 * (e / 4) + e % 2] = codec->levels[tqai_code_at(codes, codec->bits, dim, unit, e)];
    }
}

static void keys_group(const int16_t *restrict level, const int16_t *restrict q, int rows, int dim, int group,
                       int32_t *restrict dots) {
    for (int r = 0; r < rows; r++) {
        int32_t sum[16] = {0};
        for (int pair = 0; pair < dim / 2; pair++) {
            const int16_t *unit = level + (4 * pair + group) * UNIT;
            const int32_t a = q[r * dim + 2 * pair], b = q[r * dim + 2 * pair + 1];
            for (int t = 0; t < 16; t++) sum[t] += a * unit[2 * t] + b * unit[2 * t + 1];
        }
        memcpy(dots + r * BLOCK_TOKENS + 16 * group, sum, sizeof sum);
    }
}

static void values_column(const int16_t *restrict units, int stride, const int16_t *restrict w, int rows, int dim,
                          int32_t *restrict out) {
    for (int r = 0; r < rows; r++)
        for (int pair = 0; pair < 32; pair++) {
            const int16_t *unit = units + pair * stride;
            const int32_t a = w[r * BLOCK_TOKENS + 2 * pair], b = w[r * BLOCK_TOKENS + 2 * pair + 1];
            for (int t = 0; t < 16; t++) out[r * dim + t] += a * unit[2 * t] + b * unit[2 * t + 1];
        }
}

#define KERNELS tqai_kernels_scalar
#define KERNELS_NAME "scalar"
#include "generic.inc.h"
#define KEY_DOTS key_dots_unpacked
#define VALUE_SUMS value_sums_unpacked
#include "table.inc.h"
