/* bytes_avx512.inc.h: the integer sums of 2-bit codes as products of bytes, 64 to an instruction; included by
 * kernels_avx512.c. Trellis codes share the factors (trellis_avx512.inc.h).
 *
 * The four levels are 8-bit numbers to 3e-4 (byte_levels). A factor v of 12 bits is more than a byte, so two
 * query rows share a third row of bytes, their low parts:
 *
 *   keys      v0 = 16 h0 + l         v1 = 16 h1 + l / 16        h, l signed, levels + 128 unsigned
 *   weights   v0 = 16 h0 - l         v1 = 16 h1 - l / 16        h, l unsigned, levels signed
 *
 * l = lo + 16 k: lo, the last four bits of v0, is exact; k settles v1 to within half a unit. Four rows are so
 * six rows of bytes and not eight.
 *
 *   bytes [rows: h of each | (rows + 1) / 2: l of each two]
 */

#define BYTE_ROWS(rows) ((rows) + ((rows) + 1) / 2)

/* 16 factors of two rows to bytes; sign 1: v = 16 h + l, else v = 16 h - l. */
INLINE void split_two(__m256i v0, __m256i v1, int is_signed, int8_t *h0, int8_t *h1, int8_t *l) {
    const __m256i fifteen = _mm256_set1_epi16(15), eight = _mm256_set1_epi16(8), zero = _mm256_setzero_si256();
    const __m256i lo = _mm256_and_si256(is_signed ? v0 : _mm256_sub_epi16(zero, v0), fifteen);
    const __m256i over = _mm256_cmpgt_epi16(lo, eight); /* -1: lo / 16 is nearer to 1 than to 0 */
    __m256i k, low;
    if (is_signed) {
        v1 = _mm256_add_epi16(v1, over);
        k = _mm256_sub_epi16(_mm256_and_si256(_mm256_add_epi16(v1, eight), fifteen), eight);
        low = _mm256_add_epi16(lo, _mm256_slli_epi16(k, 4));
        v0 = _mm256_sub_epi16(v0, low);
        v1 = _mm256_sub_epi16(v1, k);
    } else {
        v1 = _mm256_sub_epi16(v1, over);
        k = _mm256_and_si256(_mm256_sub_epi16(zero, v1), fifteen);
        low = _mm256_add_epi16(lo, _mm256_slli_epi16(k, 4));
        v0 = _mm256_add_epi16(v0, low);
        v1 = _mm256_add_epi16(v1, k);
    }
    _mm_storeu_si128((__m128i *)h0, _mm256_cvtepi16_epi8(_mm256_srai_epi16(v0, 4)));
    if (h1) _mm_storeu_si128((__m128i *)h1, _mm256_cvtepi16_epi8(_mm256_srai_epi16(v1, 4)));
    _mm_storeu_si128((__m128i *)l, _mm256_cvtepi16_epi8(low));
}

/* Rows of factors [rows][from_row] to rows of bytes [BYTE_ROWS(rows)][to_row], count a multiple of 16. */
INLINE void split_rows(const int16_t *from, int from_row, int count, int rows, int is_signed, int8_t *to, int to_row) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; r += 2)
        for (int i = 0; i < count; i += 16) {
            const __m256i v0 = _mm256_loadu_si256((const __m256i *)(from + r * from_row + i));
            const __m256i v1 = r + 1 < rows ? _mm256_loadu_si256((const __m256i *)(from + (r + 1) * from_row + i)) : _mm256_setzero_si256();
            split_two(v0, v1, is_signed, to + r * to_row + i, r + 1 < rows ? to + (r + 1) * to_row + i : NULL,
                      to + (rows + r / 2) * to_row + i);
        }
}

INLINE __m512i four_of(const int8_t *bytes) {
    int32_t four;
    memcpy(&four, bytes, sizeof four);
    return _mm512_set1_epi32(four);
}

/* Levels of unit s of a line. */
INLINE __m512i byte_unit(__m512i table, __m512i line, int s) {
    return _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(line, (unsigned)(2 * s)), _mm512_set1_epi8(3)));
}

INLINE __m512i byte_table(const tqai_codec *codec, int offset) {
    int8_t level[4];
    int32_t four;
    for (int i = 0; i < 4; i++) level[i] = (int8_t)(codec->byte_levels[i] + offset);
    memcpy(&four, level, sizeof four);
    return _mm512_set1_epi32(four);
}

/* Query rows as bytes, and for every row of bytes what 128 times their sum is, negative. */
INLINE void split_keys(const int16_t *q, int dim, int rows, int8_t *bytes, int32_t *bias) {
    split_rows(q, dim, dim, rows, 1, bytes, dim);
#pragma GCC unroll 6
    for (int b = 0; b < BYTE_ROWS(rows); b++) {
        __m128i sum = _mm_setzero_si128();
        for (int i = 0; i < dim; i += 16)
            sum = _mm_dpbusd_epi32(sum, _mm_set1_epi8(1), _mm_loadu_si128((const __m128i *)(bytes + b * dim + i)));
        sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
        bias[b] = -128 * _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
    }
}

/* 16 dots of a row from the sums of its high parts and of the low parts that it shares. */
INLINE void store_dots(__m512i high, __m512i low, int second, int32_t *to) {
    const __m512i rest = second ? _mm512_srai_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(8)), 4) : low;
    _mm512_storeu_si512(to, _mm512_add_epi32(_mm512_slli_epi32(high, 4), rest));
}

/* 16 dims of a row's sums, likewise. */
INLINE void add_sums(__m512 high, __m512 low, int second, float step, float *to) {
    const __m512 value = _mm512_fmsub_ps(high, _mm512_set1_ps(16.0f), _mm512_mul_ps(low, _mm512_set1_ps(second ? 0.0625f : 1.0f)));
    _mm512_storeu_ps(to, _mm512_fmadd_ps(value, _mm512_set1_ps(step), _mm512_loadu_ps(to)));
}

INLINE void key_bytes(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                      const int16_t *q, int rows, int32_t *dots) {
    const int dim = codec->head_dim;
    const __m512i table = byte_table(codec, 128);
    int8_t bytes[BYTE_ROWS(MAX_ROWS) * TQAI_MAX_HEAD_DIM];
    int32_t bias[BYTE_ROWS(MAX_ROWS)];
    split_keys(q, dim, rows, bytes, bias);
    for (int page = 0; page < pages; page++, dots += TQAI_PAGE_TOKENS)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) { /* two groups of 16 tokens */
            __m512i sum[BYTE_ROWS(MAX_ROWS)][2];
#pragma GCC unroll 6
            for (int b = 0; b < BYTE_ROWS(rows); b++) sum[b][0] = sum[b][1] = _mm512_set1_epi32(bias[b]);
#pragma GCC unroll 4
            for (int p = 0; p < dim / 4; p++) {
                const __m512i line = _mm512_loadu_si512(codes[page] + LINE_BYTES * p);
                const __m512i one = byte_unit(table, line, 2 * half), two = byte_unit(table, line, 2 * half + 1);
                if (p % 2 == half) _mm_prefetch((const char *)next[page] + LINE_BYTES * p, _MM_HINT_T1);
#pragma GCC unroll 6
                for (int b = 0; b < BYTE_ROWS(rows); b++) {
                    const __m512i factor = four_of(bytes + b * dim + 4 * p);
                    sum[b][0] = _mm512_dpbusd_epi32(sum[b][0], one, factor);
                    sum[b][1] = _mm512_dpbusd_epi32(sum[b][1], two, factor);
                }
            }
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
                for (int g = 0; g < 2; g++)
                    store_dots(sum[r][g], sum[rows + r / 2][g], r % 2, dots + r * BLOCK_TOKENS + 32 * half + 16 * g);
        }
}

/* `count` (1 or 2) of the `groups` (1, 2 or 4) groups of 16 dims of a chunk, from group `first` on. A line holds
 * 4 / groups quads of tokens. */
INLINE void value_byte_groups(const tqai_codec *codec, __m512i table, const uint8_t *const *codes,
                              const uint8_t *const *next, int pages, const int8_t *bytes, const float *step, int rows,
                              int chunk, int groups, int first, int count, float *acc) {
    const int quads = 4 / groups;
    __m512i sum[BYTE_ROWS(MAX_ROWS)][2];
#pragma GCC unroll 6
    for (int b = 0; b < BYTE_ROWS(rows); b++) sum[b][0] = sum[b][1] = _mm512_setzero_si512();
    for (int page = 0; page < pages; page++)
        for (int i = 0; i < 16 / quads; i++) {
            const __m512i line = _mm512_loadu_si512(codes[page] + LINE_BYTES * (16 * chunk + i));
            if (i % 2 == first / 2) _mm_prefetch((const char *)next[page] + LINE_BYTES * (16 * chunk + i), _MM_HINT_T1);
#pragma GCC unroll 4
            for (int quad = 0; quad < quads; quad++) {
                const __m512i one = byte_unit(table, line, quad * groups + first);
                const __m512i two = count == 1 ? one : byte_unit(table, line, quad * groups + first + 1);
#pragma GCC unroll 6
                for (int b = 0; b < BYTE_ROWS(rows); b++) {
                    const __m512i weight = four_of(bytes + b * BLOCK_TOKENS + TQAI_PAGE_TOKENS * page + 4 * (i * quads + quad));
                    sum[b][0] = _mm512_dpbusd_epi32(sum[b][0], weight, one);
                    if (count == 2) sum[b][1] = _mm512_dpbusd_epi32(sum[b][1], weight, two);
                }
            }
        }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int g = 0; g < count; g++)
            add_sums(_mm512_cvtepi32_ps(sum[r][g]), _mm512_cvtepi32_ps(sum[rows + r / 2][g]), r % 2, step[r],
                     acc + r * codec->head_dim + 64 * chunk + 16 * (first + g));
}

INLINE void value_bytes(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                        const int16_t *w, const float *step, int rows, float *acc) {
    const __m512i table = byte_table(codec, 0);
    int8_t bytes[BYTE_ROWS(MAX_ROWS) * BLOCK_TOKENS];
    split_rows(w, BLOCK_TOKENS, TQAI_PAGE_TOKENS * pages, rows, 0, bytes, BLOCK_TOKENS);
    for (int chunk = 0; chunk < (codec->head_dim + 63) / 64; chunk++) {
        const int groups = tqai_chunk_groups(codec->head_dim, 64 * chunk);
        if (groups == 4) {
            value_byte_groups(codec, table, codes, next, pages, bytes, step, rows, chunk, 4, 0, 2, acc);
            value_byte_groups(codec, table, codes, next, pages, bytes, step, rows, chunk, 4, 2, 2, acc);
        } else if (groups == 2) {
            value_byte_groups(codec, table, codes, next, pages, bytes, step, rows, chunk, 2, 0, 2, acc);
        } else {
            value_byte_groups(codec, table, codes, next, pages, bytes, step, rows, chunk, 1, 0, 1, acc);
        }
    }
}

#define SPECIAL_BYTES(rows)                                                                                          \
    static __attribute__((noinline)) void keys_bytes_##rows(const tqai_codec *c, const uint8_t *const *p,            \
                                                            const uint8_t *const *next, int pages, const int16_t *q, \
                                                            int32_t *dots) {                                         \
        key_bytes(c, p, next, pages, q, rows, dots);                                                                 \
    }                                                                                                                \
    static __attribute__((noinline)) void values_bytes_##rows(const tqai_codec *c, const uint8_t *const *p,          \
                                                              const uint8_t *const *next, int pages,                 \
                                                              const int16_t *w, const float *step, float *acc) {     \
        value_bytes(c, p, next, pages, w, step, rows, acc);                                                          \
    }
SPECIAL_BYTES(1) SPECIAL_BYTES(2) SPECIAL_BYTES(4)

static int any_below_zero(const int16_t *w, int tokens, int rows) {
    __m512i all = _mm512_setzero_si512();
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t += 32) all = _mm512_or_si512(all, _mm512_loadu_si512(w + r * BLOCK_TOKENS + t));
    return _mm512_movepi16_mask(all) != 0;
}
