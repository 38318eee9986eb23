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
    if (codec->bits == 2) {
        for (int unit = 0; unit < codec->head_dim; unit++) {
            int half[2];
            tqai_halves(is_value, codec->head_dim, unit, half, half + 1);
            for (int e = 0; e < 64; e++) {
                const unsigned code = codes[LINE_BYTES * (unit / 4) + e] >> (2 * (unit % 4)) & 3u;
                level[UNIT * half[e / 2 % 2] + 2 * (e / 4) + e % 2] = codec->levels[code];
            }
        }
        return;
    }
    const int bits = codec->bits == 3 ? 2 : codec->bits, per_line = 16 / bits, units = 2 * codec->head_dim;
    const uint8_t *high = codes + tqai_high_plane_at(codec->head_dim);
    for (int unit = 0; unit < units; unit++) {
        const uint8_t *line = codes + LINE_BYTES * (unit / per_line), *top = high + LINE_BYTES * (unit / 16);
        for (int e = 0; e < UNIT; e++) {
            const unsigned word = line[2 * e] | (unsigned)line[2 * e + 1] << 8;
            unsigned code = word >> (unit % per_line * bits) & ((1u << bits) - 1u);
            if (codec->bits == 3) {
                const unsigned more = top[2 * e] | (unsigned)top[2 * e + 1] << 8;
                code |= (more >> (unit % 16) & 1u) << 2;
            }
            level[unit * UNIT + e] = codec->levels[code];
        }
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
