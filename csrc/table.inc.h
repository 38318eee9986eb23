/* table.inc.h: the last lines of each ISA's file. */
#include "scales.h"
#include "trellis_encode.inc.h"
#include "trellis_levels.inc.h"

static void page_scales(const tqai_page_format *f, const uint8_t *page, int is_value, float by, float *to) {
    tqai_scales(f, page, is_value, by, to);
}

static void add_row(const float *restrict from, float weight, int n, float *restrict to) {
    for (int i = 0; i < n; i++) to[i] += weight * from[i];
}

static void range_of_bits(const float *x, int n, uint32_t *least, uint32_t *most) {
    uint32_t low = 0xFFFFFFFFu, high = 0;
    for (int i = 0; i < n; i++) {
        const uint32_t bits = float_to_bits(x[i]);
        low = bits < low ? bits : low;
        high = bits > high ? bits : high;
    }
    *least = low;
    *most = high;
}

#ifndef KEY_LOGITS
#define SPLIT_QUERIES NULL
#define KEY_LOGITS key_logits
static void key_logits(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                       const int16_t *q, const tqai_query_bytes *bytes, int rows, int fine, const float *key_scale,
                       float *logit, float *largest) {
    (void)bytes;
    _Alignas(64) int32_t dots[MAX_ROWS * BLOCK_TOKENS];
    KEY_DOTS(codec, codes, next, pages, q, rows, fine, dots);
    to_logits(dots, key_scale, TQAI_PAGE_TOKENS * pages, rows, logit, largest);
}
#endif

static void values_block(float *logit, const float *largest, uint32_t key_most, const float *factor, const float *value_scale,
                         const tqai_codec *value, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                         const block_mask *mask, float softcap, int rows, row_state *state, float *acc) {
    _Alignas(64) int16_t w[MAX_ROWS * BLOCK_TOKENS];
    float step[MAX_ROWS];
#ifdef PLAIN_BLOCK
    if (!mask && !(softcap > 0.0f) &&
        PLAIN_BLOCK(logit, largest, key_most, factor, value_scale, value, codes, next, pages, rows, state, acc)) return;
#else
    (void)key_most;
#endif
    softmax_block(logit, largest, factor, value_scale, value, mask, softcap, TQAI_PAGE_TOKENS * pages, rows, state, acc, w, step);
    VALUE_SUMS(value, codes, next, pages, w, step, rows, acc);
}

const tqai_kernels KERNELS = {
    .name = KERNELS_NAME,
    .of_bytes = of_bytes,
    .split_queries = SPLIT_QUERIES,
    .key_logits = KEY_LOGITS,
    .value_sums = VALUE_SUMS,
    .values_block = values_block,
    .range = range_of_bits,
    .exact_block = exact_block,
    .largest = largest_logit,
    .scales = page_scales,
    .add_row = add_row,
    .rotate = rotate,
    .to_float = to_float,
    .from_float = from_float,
    .encode_side = encode_side,
    .decode_side = decode_side,
    .steps = {[TQAI_SCALAR] = NULL, [TQAI_TRELLIS] = &trellis_steps},
};
