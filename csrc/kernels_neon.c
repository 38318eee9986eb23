/* kernels_neon.c: 64-bit Arm.
 *
 * Byte table lookups, 16 at a time, for the low and high bytes of levels, which are put together in a buffer in the
 * first-level cache (generic.inc.h), then 16-bit multiply-accumulate. A register holds the two terms of two
 * lanes, | lane 0 term 0 | lane 0 term 1 | lane 1 term 0 | lane 1 term 1 |, and they are added pairwise
 * once at the end.
 */
#define NEON_LANES
#include <arm_neon.h>
#include <float.h>
#include <math.h>
#include <string.h>
#include "isa.h"
#include "layout.h"

#include "vec_neon.h"
static inline int of_bytes(const tqai_codec *codec) { return (void)codec, 0; }

#include "convert.inc.h"
#include "rotate.inc.h"
#include "codes.inc.h"
#include "softmax.inc.h"
#include "exact.inc.h"

#define INLINE static inline __attribute__((always_inline))

/* 16 codes of unit `unit` from byte `at` of its line on. */
INLINE uint8x16_t codes_of(const tqai_codec *codec, const uint8_t *codes, int unit, int at) {
    const int per_line = codec->bits == 4 ? 2 : 4;
    const uint8x16_t line = vld1q_u8(codes + LINE_BYTES * (unit / per_line) + at);
    const int8x16_t down = vdupq_n_s8((int8_t)(-8 / per_line * (unit % per_line)));
    const uint8x16_t low = vandq_u8(vshlq_u8(line, down), vdupq_n_u8(codec->bits == 4 ? 15 : 3));
    if (codec->bits != 3) return low;
    const uint8x16_t top = vld1q_u8(codes + tqai_high_plane_at(codec->head_dim) + LINE_BYTES * (unit / 8) + at);
    return vorrq_u8(low, vandq_u8(vshlq_u8(top, vdupq_n_s8((int8_t)(2 - unit % 8))), vdupq_n_u8(4)));
}

static void load_levels(const tqai_codec *codec, int is_value, const uint8_t *codes, int16_t *restrict level) {
    const int bits = codec->bits, dim = codec->head_dim;
    if (bits == 8) {
        for (int i = 0; i < 2 * dim * UNIT; i++) level[i / 2 % UNIT + (i / (2 * UNIT) * 2 + i % 2) * UNIT] = codec->levels[codes[i]];
        return;
    }
    uint8_t bytes[2][16];
    for (int i = 0; i < 16; i++) {
        const uint16_t one = (uint16_t)codec->levels[i & ((1 << bits) - 1)];
        bytes[0][i] = (uint8_t)one;
        bytes[1][i] = (uint8_t)(one >> 8);
    }
    const uint8x16_t low_bytes = vld1q_u8(bytes[0]), high_bytes = vld1q_u8(bytes[1]);
    /* terms 0, 1 of four lanes to the lower half of the index, terms 2, 3 to the upper */
    static const uint8_t by_terms[16] = {0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15};
    const uint8x16_t order = vld1q_u8(by_terms);
    for (int unit = 0; unit < dim; unit++) {
        int first, second;
        tqai_halves(is_value, dim, unit, &first, &second);
        for (int quarter = 0; quarter < 4; quarter++) {
            const uint8x16_t index = vqtbl1q_u8(codes_of(codec, codes, unit, 16 * quarter), order);
            const uint8x16_t low = vqtbl1q_u8(low_bytes, index), high = vqtbl1q_u8(high_bytes, index);
            vst1q_s16(level + UNIT * first + 8 * quarter, vreinterpretq_s16_u8(vzip1q_u8(low, high)));
            vst1q_s16(level + UNIT * second + 8 * quarter, vreinterpretq_s16_u8(vzip2q_u8(low, high)));
        }
    }
}

/* out[r * out_row + 0 .. 15] += over `count` units, `stride` apart: products with the pairs
 * terms[r * row + 2 i]. */
INLINE void add_units(const int16_t *units, int stride, int count, const int16_t *terms, int row, int rows,
                      int32_t *out, int out_row) {
    for (int part = 0; part < 2; part++) { /* 8 lanes each: 4 sums per row */
        int32x4_t sum[MAX_ROWS][4];
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < 4; i++) sum[r][i] = vdupq_n_s32(0);
        for (int i = 0; i < count; i++) {
            const int16x8_t a = vld1q_s16(units + i * stride + 16 * part);
            const int16x8_t b = vld1q_s16(units + i * stride + 16 * part + 8);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                int32_t both;
                memcpy(&both, terms + r * row + 2 * i, sizeof both);
                const int16x8_t pair = vreinterpretq_s16_s32(vdupq_n_s32(both));
                sum[r][0] = vmlal_s16(sum[r][0], vget_low_s16(a), vget_low_s16(pair));
                sum[r][1] = vmlal_high_s16(sum[r][1], a, pair);
                sum[r][2] = vmlal_s16(sum[r][2], vget_low_s16(b), vget_low_s16(pair));
                sum[r][3] = vmlal_high_s16(sum[r][3], b, pair);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < 2; i++) {
                int32_t *to = out + r * out_row + 8 * part + 4 * i;
                vst1q_s32(to, vaddq_s32(vld1q_s32(to), vpaddq_s32(sum[r][2 * i], sum[r][2 * i + 1])));
            }
    }
}

INLINE void keys_group(const int16_t *level, const int16_t *q, int rows, int dim, int group, int32_t *dots) {
    for (int r = 0; r < rows; r++) memset(dots + r * BLOCK_TOKENS + 16 * group, 0, 16 * sizeof *dots);
    add_units(level + group * UNIT, 4 * UNIT, dim / 2, q, dim, rows, dots + 16 * group, BLOCK_TOKENS);
}

INLINE void values_column(const int16_t *units, int stride, const int16_t *w, int rows, int dim, int32_t *out) {
    add_units(units, stride, 32, w, BLOCK_TOKENS, rows, out, dim);
}

#include "trellis_neon.inc.h"

#define KERNELS tqai_kernels_neon
#define KERNELS_NAME "neon"
#include "generic.inc.h"
#define KEY_DOTS key_dots_unpacked
#define VALUE_SUMS value_sums_unpacked
#include "table.inc.h"
