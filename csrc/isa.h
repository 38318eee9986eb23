/* isa.h: what one instruction set provides; kernels_<isa>.c fills one table each. */
#ifndef TQAI_ISA_H
#define TQAI_ISA_H

#include <stddef.h>
#include "tqai.h"

#define BLOCK_PAGES 8 /* pages that share one softmax maximum and one integer scale of the weights */
#define BLOCK_TOKENS (BLOCK_PAGES * TQAI_PAGE_TOKENS)
/* Factors of byte levels are whole numbers of eighths of units, within these limits. */
#define FACTOR_PARTS 8
#define KEY_FACTOR_OF_BYTES (1904 * FACTOR_PARTS)
#define WEIGHT_OF_BYTES (3825 * FACTOR_PARTS)
/* Byte factors of queries are for logits whose standard deviation is at most this: rounding them moves a logit by
 * 4e-4 of it. */
#define DEVIATION_OF_BYTES 3.0f
#define LARGEST_LANES 16 /* for the largest logits of a row, whatever the length of vectors */
#define MAX_ROWS 4 /* query rows that one kernel call takes: 1, 2 or 4 */
/* Values are summed as value * 2^-24, so that a sum over 2^24 of the largest floats stays finite. */
#define VALUE_DOWN 5.9604644775390625e-08f
#define VALUE_UP 16777216.0f

/* Running softmax of one query row. */
typedef struct {
    float max, sum; /* of the logits; of exp(logit - max) */
} row_state;

/* What tqai's kernels see of the mask: row r sees token t iff row[r] is null or row[r][t * stride]. */
typedef struct {
    const uint8_t *row[MAX_ROWS];
    int64_t stride;
    int first; /* tokens before this one are out of sight */
} block_mask;

/* The seam for a codec whose levels are not one table lookup per code. Its file provides these steps for one
 * or more instruction sets; table.inc.h enters them under the codec's kind (tqai.h), and kinds without steps
 * are refused. The page loop, the products, the softmax and the merge stay as they are: before the products a
 * page side is unpacked, once per call for all query rows (at most MAX_ROWS), into
 *
 *   level [2 * head_dim units][32]    int16, 64-byte aligned, units and elements as layout.h draws them:
 *       keys     unit 4 p + g,             element 2 t + j:  token 16 g + t,  dim 2 p + j
 *       values   unit 128 c + n p + g,     element 2 t + j:  token 2 p + j,   dim 64 c + 16 g + t
 *
 * whole numbers of codec->level_step within +-8191, codec->largest_sum as for scalar codes (tqai.h). How the
 * codes lie inside the code part of the page is the codec's own affair. */
typedef struct {
    void (*unpack)(const tqai_codec *codec, int is_value, const uint8_t *codes, int16_t *level);
    void (*encode_side)(const tqai_codec *codec, int is_value, const void *rows, int64_t row_stride, int dtype,
                        uint8_t *codes, uint16_t *scales); /* as in tqai_kernels */
    void (*decode_side)(const tqai_codec *codec, int is_value, const uint8_t *codes, const float *scales,
                        int dtype, void *out);
} tqai_codec_steps;

/* Up to MAX_ROWS query rows as bytes (bytes_avx512.inc.h). */
#define BYTE_ROWS(rows) ((rows) + ((rows) + 1) / 2)
typedef struct {
    int8_t bytes[BYTE_ROWS(MAX_ROWS) * TQAI_MAX_HEAD_DIM];
    int32_t bias[BYTE_ROWS(MAX_ROWS)]; /* what 128 times the sum of each row of bytes is, negative */
} tqai_query_bytes;

typedef struct {
    const char *name;
    /* Whether factors of that codec's levels are bytes (bytes_avx512.inc.h) and not 16-bit numbers: queries are then
     * whole numbers within +-KEY_FACTOR_OF_BYTES, weights within +-WEIGHT_OF_BYTES, dots in units of FACTOR_PARTS. */
    int (*of_bytes)(const tqai_codec *codec);
    /* Queries of a codec of bytes as key_logits wants them; null where it wants none. */
    void (*split_queries)(const tqai_codec *codec, const int16_t *q, int rows, tqai_query_bytes *to);
    /* logit[r * BLOCK_TOKENS + 64 page + t] = key_scale[64 page + t] * sum over d of q[r * head_dim + d] * level(key t, dim d);
     * of byte factors in units of FACTOR_PARTS, unless `fine`: then factors of 16 bits are to be used even so.
     * largest[r * LARGEST_LANES + i]: the largest of the logits in lane i that are numbers, and of what it was before.
     * `next` (any addresses): codes to come are prefetched from there, byte for byte as codes are read. */
    void (*key_logits)(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                       const int16_t *q, const tqai_query_bytes *bytes, int rows, int fine, const float *key_scale,
                       float *logit, float *largest);
    /* Largest of those of n floats (a multiple of 16) that are numbers, -inf if none is. */
    float (*largest)(const float *x, int n);
    /* acc[r * head_dim + d] += step[r] * sum over pages, t of w[r * BLOCK_TOKENS + 64 page + t] * level, of byte factors in
     * units of FACTOR_PARTS; `next` as for key_dots */
    void (*value_sums)(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                       const int16_t *w, const float *step, int rows, float *acc);
    /* One block of values: weights are exp(logit * factor - maximum) times the value scale; updates state, multiplies acc by
     * the change of maximum and adds the weighted values to it. Overwrites logit. `key_most`: the bits of the key scale
     * that as an unsigned number are largest. */
    void (*values_block)(float *logit, const float *largest, uint32_t key_most, const float *factor, const float *value_scale,
                         const tqai_codec *value, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                         const block_mask *mask, float softcap, int rows, row_state *state, float *acc);
    /* The least and the most of the bits of n floats (a multiple of 16), as unsigned numbers. */
    void (*range)(const float *x, int n, uint32_t *least, uint32_t *most);
    /* Exact attention of `rows` query rows (float, scaled) over `tokens` (at most 64) keys and values. */
    void (*exact_block)(const float *q, int rows, int key_dim, int value_dim, const void *keys,
                        int64_t key_stride, int key_dtype, const void *values, int64_t value_stride,
                        int value_dtype, const block_mask *mask, float softcap, int tokens,
                        row_state *state, float *acc);
    /* to[t] = scale of token t of a side of a page times `by`. */
    void (*scales)(const tqai_page_format *f, const uint8_t *page, int is_value, float by, float *to);
    /* to[i] += weight * from[i] */
    void (*add_row)(const float *from, float weight, int n, float *to);
    /* y = R x (inverse: x = R^T y) in place, of 4 or 16 rows at once: x [head_dim][lanes]. */
    void (*rotate)(const tqai_codec *codec, float *x, int lanes, int inverse);
    /* rows [n][dim] of dtype to float and back. */
    void (*to_float)(const void *from, int dtype, int n, float *to);
    void (*from_float)(const float *from, int dtype, int n, void *to);
    void (*encode_side)(const tqai_codec *codec, int is_value, const void *rows, int64_t row_stride, int dtype,
                        uint8_t *codes, uint16_t *scales);
    void (*decode_side)(const tqai_codec *codec, int is_value, const uint8_t *codes, const float *scales,
                        int dtype, void *out);
    const tqai_codec_steps *steps[TQAI_KINDS]; /* by kind; null for TQAI_SCALAR and where there are none */
} tqai_kernels;

extern const tqai_kernels tqai_kernels_scalar, tqai_kernels_avx2, tqai_kernels_avx512, tqai_kernels_neon;

/* The chosen table. */
const tqai_kernels *tqai_chosen(void);

/* Whether the chosen table serves a codec. */
int tqai_serves(const tqai_codec *codec);

static inline float bits_to_float(uint32_t bits) {
    union { uint32_t u; float f; } x = {.u = bits};
    return x.f;
}

static inline uint32_t float_to_bits(float value) {
    union { uint32_t u; float f; } x = {.f = value};
    return x.u;
}

#endif
