/* trellis_levels.inc.h: levels of a page side of trellis codes in the units of isa.h, for any instruction set that
 * has no TRELLIS_UNPACK of its own: windows are followed from coordinate to coordinate in the lanes of 64 tokens,
 * and looked up one by one. */
#include "layout.h"

#ifndef TRELLIS_UNPACK
#define TRELLIS_UNPACK trellis_levels

static void trellis_levels(const tqai_codec *codec, int is_value, const uint8_t *in, int16_t *level) {
    const tqai_trellis *t = codec->tables;
    const int dim = codec->head_dim, bits = codec->bits;
    const uint32_t keep = (1u << (t->state_bits + bits)) - 1u;
    uint8_t codes[64 * TQAI_MAX_HEAD_DIM];
    uint16_t window[64] = {0};
    trellis_unpack(codec, is_value, in, codes);
    for (int i = dim + 7; i >= 0; i--) { /* as in values16 */
        const uint8_t *restrict code = codes + 64 * (i % dim);
        for (int l = 0; l < 64; l++) window[l] = (uint16_t)((((uint32_t)window[l] << bits) | code[l]) & keep);
        if (i >= dim) continue;
        if (!is_value) {
            int16_t *to = level + 4 * (i / 2) * UNIT + i % 2;
            for (int l = 0; l < 64; l++) to[2 * l] = t->window_levels[window[l]];
        } else {
            const int chunk = i / 64, groups = tqai_chunk_groups(dim, 64 * chunk);
            int16_t *to = level + (128 * chunk + i % 64 / 16) * UNIT + 2 * (i % 16);
            for (int l = 0; l < 64; l++) to[(l / 2 * groups) * UNIT + l % 2] = t->window_levels[window[l]];
        }
    }
}
#endif

static const tqai_codec_steps trellis_steps = {
    .unpack = TRELLIS_UNPACK, .encode_side = trellis_encode_side, .decode_side = trellis_decode_side};
