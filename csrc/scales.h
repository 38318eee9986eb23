/* scales.h: the scales of a page side, bfloat16 or of one byte (docs/format.md, "Scale of one byte"); both as
 * core/log_scale.py has them, to the last bit. */
#ifndef TQAI_SCALES_H
#define TQAI_SCALES_H

#include <math.h>
#include <string.h>

#include "isa.h"

#define ZERO_BYTE 254
#define NAN_BYTE 255

/* Where the base of a side's bytes lies in a page. */
static inline int64_t tqai_base_at(const tqai_page_format *f, int is_value) { return f->bases_at + 2 * is_value; }

/* to[t] = scale of token t times `by`, of one byte each. */
static __attribute__((noinline)) void tqai_scales_of_bytes(const tqai_page_format *f, const uint8_t *page, int is_value,
                                                           float by, float *restrict to) {
    const uint8_t *restrict from = page + (is_value ? f->value_scales_at : f->key_scales_at);
    uint16_t bits;
    memcpy(&bits, page + tqai_base_at(f, is_value), sizeof bits);
    const float base = bits_to_float((uint32_t)bits << 16);
    for (int t = 0; t < TQAI_PAGE_TOKENS; t++) to[t] = f->scale_levels[from[t]] * base * by;
}

/* to[t] = scale of token t times `by`. */
static inline void tqai_scales(const tqai_page_format *f, const uint8_t *page, int is_value, float by, float *restrict to) {
    if (f->bases_at) {
        tqai_scales_of_bytes(f, page, is_value, by, to);
        return;
    }
    const uint16_t *restrict scale = (const uint16_t *)(page + (is_value ? f->value_scales_at : f->key_scales_at));
    for (int t = 0; t < TQAI_PAGE_TOKENS; t++) to[t] = bits_to_float((uint32_t)scale[t] << 16) * by;
}

/* Writes the bfloat16 scales of a side into a page. */
static inline void tqai_write_scales(const tqai_page_format *f, uint8_t *page, int is_value, const uint16_t *scales) {
    uint8_t *to = page + (is_value ? f->value_scales_at : f->key_scales_at);
    if (!f->bases_at) {
        memcpy(to, scales, 2 * TQAI_PAGE_TOKENS);
        return;
    }
    float number[TQAI_PAGE_TOKENS], base = 0.0f;
    for (int t = 0; t < TQAI_PAGE_TOKENS; t++) {
        number[t] = bits_to_float((uint32_t)scales[t] << 16);
        if (number[t] < INFINITY && number[t] > base) base = number[t];
    }
    for (int t = 0; t < TQAI_PAGE_TOKENS; t++) {
        const float ratio = number[t] / (base > 0.0f ? base : 1.0f);
        int above = 0; /* so many thresholds are above the ratio */
        for (int step = 128; step > 0; step /= 2)
            if (above + step <= ZERO_BYTE && f->scale_thresholds[above + step - 1] > ratio) above += step;
        to[t] = number[t] - number[t] == 0.0f ? (uint8_t)above : NAN_BYTE;
    }
    const uint16_t bits = (uint16_t)(float_to_bits(base) >> 16);
    memcpy(page + tqai_base_at(f, is_value), &bits, sizeof bits);
    if (!is_value) memset(page + f->bases_at + 4, 0, 12);
}

#endif
