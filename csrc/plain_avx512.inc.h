/* plain_avx512.inc.h: softmax and values of a block in which nothing is hidden or special: from logits straight to the
 * bytes of weights (bytes_avx512.inc.h), which are never written as floats or 16-bit numbers; included by
 * kernels_avx512.c. What it does not serve it leaves to softmax.inc.h.
 *
 * The step of the weights must be known before the first of them is. So it is that of a bound: the largest exponential
 * times the largest value scale, at most PLAIN_SPREAD times what the largest weight is.
 *
 *   logit        16 tokens of a row
 *   argument     (logit - maximum) log2 e + log2(units) + 127, times 2^23: the bits of 2^x, but for the mantissa, which
 *                a polynomial makes of that
 *   weight       exponential * value scale, row 0 and 2 in units, negative, row 1 and 3 in sixteenths
 *   bytes        64 tokens: h of either row, l of both
 */
#define PLAIN_SPREAD 2.0f
#define WEIGHT_UNITS 3824.0f /* of 3825, as the polynomial may be 1e-4 above the exponential */

/* 2^x of 16 numbers (x + 127) * 2^23, to 1.1e-4; 1.2e-38 where x is below -126. */
INLINE __m512 exp2_of_bits(__m512 bits) {
    const __m512i i = _mm512_cvtps_epi32(_mm512_max_ps(bits, _mm512_set1_ps(8388608.0f)));
    const __m512i mantissa = _mm512_set1_epi32(0x7FFFFF);
    /* 0xCA: the first operand chooses between the second and the third */
    const __m512 m = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(mantissa, i, _mm512_set1_epi32(0x3F800000), 0xCA));
    /* from 1.0000004 to 1.9999992 for every m */
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.0782679692f), m, _mm512_set1_ps(-0.00849622861f));
    p = _mm512_fmadd_ps(p, m, _mm512_set1_ps(0.477611899f));
    p = _mm512_fmadd_ps(p, m, _mm512_set1_ps(0.452616662f));
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(mantissa, _mm512_castps_si512(p), i, 0xCA));
}

typedef struct {
    __m512i h0, h1, l; /* bytes in words */
} split_words;

/* 32 weights of two rows to the bytes of split_two: from v0 in units, negative, and v1 in sixteenths plus ROUND_UP. */
#define ROUND_UP 248 /* 8 to round to units, 240 to round these up to a whole h */
INLINE split_words split_weights(__m512i negative_v0, __m512i v1) {
    const __m512i lo = _mm512_and_si512(negative_v0, _mm512_set1_epi16(15));
    v1 = _mm512_add_epi16(v1, lo);
    /* lo | k << 4: what v1 is below a multiple of 256 are its low bits, inverted; 0xF4: lo | (mask & ~v1) */
    const __m512i low = _mm512_ternarylogic_epi32(lo, _mm512_set1_epi16(0xF0), v1, 0xF4);
    return (split_words){_mm512_srli_epi16(_mm512_sub_epi16(low, negative_v0), 4), _mm512_srli_epi16(v1, 8), low};
}

INLINE void store_bytes(__m512i a, __m512i b, int8_t *to) {
    const __m512i in_turns = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi64(in_turns, _mm512_packus_epi16(a, b)));
}

/* Whole weights of one or two rows of a page, 32 tokens each, that are still to be split into bytes. */
typedef struct {
    __m512i word[2][2];
    int8_t *h0, *h1, *l; /* where to */
} page_weights;

/* Sums of the exponentials are added to sum. */
INLINE void weigh_page(const float *logit, const float *scale, const float *slope, const float *shift, int rows, __m512 *sum,
                       page_weights *to) {
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                          22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        to->word[1][i] = _mm512_set1_epi16(ROUND_UP);
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) {
            /* + 1.5 * 2^23 rounds, and leaves the whole number in the low bits */
            const __m512 whole = _mm512_set1_ps(r ? 12582912.0f + ROUND_UP : 12582912.0f);
            __m512 x[2];
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                const int t = 32 * i + 16 * j;
                const __m512 p = exp2_of_bits(_mm512_fmadd_ps(_mm512_loadu_ps(logit + r * BLOCK_TOKENS + t),
                                                              _mm512_set1_ps(slope[r]), _mm512_set1_ps(shift[r])));
                sum[r] = _mm512_add_ps(sum[r], p);
                const __m512 by = _mm512_loadu_ps(scale + t);
                x[j] = r ? _mm512_fmadd_ps(p, by, whole) : _mm512_fnmadd_ps(p, by, whole);
            }
            to->word[r][i] = _mm512_permutex2var_epi16(_mm512_castps_si512(x[0]), even, _mm512_castps_si512(x[1]));
        }
    }
}

INLINE void split_page(const page_weights *from, int rows) {
    const split_words a = split_weights(from->word[0][0], from->word[1][0]), b = split_weights(from->word[0][1], from->word[1][1]);
    store_bytes(a.h0, b.h0, from->h0);
    if (rows > 1) store_bytes(a.h1, b.h1, from->h1);
    store_bytes(a.l, b.l, from->l);
}

/* Weights of a block as bytes [BYTE_ROWS(rows)][BLOCK_TOKENS], with their steps; 0 if it is not plain. */
INLINE int plain_weights(const float *logit, const float *largest, const float *factor, const float *scale, uint32_t least,
                         uint32_t most, const tqai_codec *value, int pages, int rows, row_state *state, float *acc,
                         int8_t *bytes, float *step) {
    const float low = bits_to_float(least), high = bits_to_float(most), units = WEIGHT_UNITS / high;
    const float log2_units = log2f(units);
    float block[MAX_ROWS], slope[MAX_ROWS], shift[MAX_ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        block[r] = v_largest(_mm512_loadu_ps(largest + r * LARGEST_LANES)) * factor[r];
        if (!(factor[r] > 0.0f && fabsf(block[r]) < 1000.0f && !(fabsf(state[r].max) >= 1000.0f && state[r].max > -INFINITY))) return 0;
        slope[r] = factor[r] * (LOG2_E * 8388608.0f);
        shift[r] = (log2_units + (float)(127 + 4 * (r % 2)) - block[r] * LOG2_E) * 8388608.0f;
    }
    __m512 sum[MAX_ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) sum[r] = _mm512_setzero_ps();
    /* what is split is what the turn before weighed, so that neither waits for the other; the first time it is nothing */
    const int at_once = rows < 2 ? 1 : 2;
    const __m512i none = _mm512_setzero_si512();
    page_weights before = {{{none, none}, {none, none}}, bytes, bytes + BLOCK_TOKENS, bytes + rows * BLOCK_TOKENS};
    for (int page = 0; page < pages; page++) {
        const int at = TQAI_PAGE_TOKENS * page;
#pragma GCC unroll 2
        for (int r = 0; r < rows; r += 2) {
            int8_t *to = bytes + at;
            page_weights now = {.h0 = to + r * BLOCK_TOKENS, .h1 = to + (r + 1) * BLOCK_TOKENS, .l = to + (rows + r / 2) * BLOCK_TOKENS};
            weigh_page(logit + r * BLOCK_TOKENS + at, scale + at, slope + r, shift + r, at_once, sum + r, &now);
            split_page(&before, at_once);
            before = now;
        }
    }
    split_page(&before, at_once);
    float total[MAX_ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        total[r] = v_sum(sum[r]) / (units * (r % 2 ? 16.0f : 1.0f));
        /* as bytes_suffice: what is beside the largest weight, in units, at most and at least */
        const float beside = (total[r] - 1.0f) * WEIGHT_UNITS;
        if (beside > WEIGHT_UNITS / LEAST_SHARE && beside * low < FEWEST_STEPS * (float)(TQAI_PAGE_TOKENS * pages) * high) return 0;
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        move_maximum(NULL, 0, block[r], value->head_dim, state + r, acc + r * value->head_dim);
        const float share = exp_below_one(block[r] - state[r].max);
        state[r].sum += total[r] * share;
        step[r] = value->level_step * share / units;
    }
    return 1;
}

#define PLAIN_WEIGHTS(rows)                                                                                             \
    static __attribute__((noinline)) int plain_weights_##rows(                                                          \
        const float *logit, const float *largest, const float *factor, const float *scale, uint32_t least, uint32_t most,\
        const tqai_codec *value, int pages, row_state *state, float *acc, int8_t *bytes, float *step) {                 \
        return plain_weights(logit, largest, factor, scale, least, most, value, pages, rows, state, acc, bytes, step);  \
    }
PLAIN_WEIGHTS(1) PLAIN_WEIGHTS(2) PLAIN_WEIGHTS(4)
