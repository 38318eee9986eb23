/* bytes_avx512.inc.h: the integer sums of codes of 2 to 4 bits as products of bytes, 64 to an instruction; included
 * by kernels_avx512.c. Trellis codes share the factors (trellis_avx512.inc.h).
 *
 * Levels are bytes (tqai_codec.byte_levels). A factor v of 12 bits is more than a byte, so two query rows share a
 * third row of bytes, their low parts:
 *
 *   keys      v0 = 16 h0 + l         v1 = 16 h1 + l / 16        h, l signed, levels + 128 unsigned
 *   weights   v0 = 16 h0 - l         v1 = 16 h1 - l / 16        h, l unsigned, levels signed
 *
 * l = lo + 16 k: lo, the last four bits of v0, is exact; then h1 and k are taken that bring v1, lo / 16 included,
 * nearest to what is wanted, which is known to an eighth (FACTOR_PARTS). So both rows are exact to half a unit, and
 * four rows are six rows of bytes and not eight.
 *
 *   bytes [rows: h of each | (rows + 1) / 2: l of each two]
 *
 * A quad is the four units (layout.h) that follow one another, of keys all 64 tokens of four dims:
 *
 *   4 bits   line a  byte e = | unit 1 | unit 0 |      line b  byte e = | unit 3 | unit 2 |
 *                                >> 4     .                                >> 4     .           & 15
 *            vpshufb    64 levels
 *            vpdpbusd   lane t += the four terms of byte 4 t .. 4 t + 3 times four bytes of a row
 *
 * The lookups run beside the products on other ports. Sums stay in registers: of keys six rows times four units, 24; of
 * values half of them, as their sums go on over eight pages.
 */

/* 16 factors of two rows, in eighths, to bytes; sign 1: v = 16 h + l, else v = 16 h - l. */
INLINE void split_two(__m256i v0, __m256i v1, int is_signed, int8_t *h0, int8_t *h1, int8_t *l) {
    const __m256i fifteen = _mm256_set1_epi16(15), eight = _mm256_set1_epi16(8), zero = _mm256_setzero_si256();
    const __m256i half = _mm256_set1_epi16(FACTOR_PARTS / 2);
    __m256i lo, k, low;
    v1 = _mm256_add_epi16(v1, v1); /* in sixteenths */
    if (is_signed) {
        v0 = _mm256_srai_epi16(_mm256_add_epi16(v0, half), 3);
        lo = _mm256_and_si256(v0, fifteen);
        v1 = _mm256_srai_epi16(_mm256_add_epi16(_mm256_sub_epi16(v1, lo), eight), 4);
        k = _mm256_sub_epi16(_mm256_and_si256(_mm256_add_epi16(v1, eight), fifteen), eight);
        low = _mm256_add_epi16(lo, _mm256_slli_epi16(k, 4));
        v0 = _mm256_sub_epi16(v0, low);
        v1 = _mm256_sub_epi16(v1, k);
    } else {
        v0 = _mm256_srli_epi16(_mm256_add_epi16(v0, half), 3);
        lo = _mm256_and_si256(_mm256_sub_epi16(zero, v0), fifteen);
        v1 = _mm256_srli_epi16(_mm256_add_epi16(_mm256_add_epi16(v1, lo), eight), 4);
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

INLINE __m512i byte_table(const tqai_codec *codec, int bits, int offset) {
    int8_t level[16];
    for (int i = 0; i < 16; i++) level[i] = (int8_t)(codec->byte_levels[i % (1 << bits)] + offset);
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)level));
}

/* Levels of units 2 two and 2 two + 1 of quad first + i (i 0 or 1, first even). The same lines of `next` are
 * prefetched, by whichever of the two comes first or in turns. */
INLINE void two_units(__m512i table, int bits, const uint8_t *codes, const uint8_t *next, int high, int first, int i,
                      int two, __m512i *unit) {
    const int per_line = bits == 4 ? 2 : 4;
#pragma GCC unroll 2
    for (int s = 2 * two; s < 2 * two + 2; s++) {
        const int at = LINE_BYTES * (4 / per_line * (first + i) + s / per_line);
        __m512i line = _mm512_loadu_si512(codes + at);
        if (s % 2 == 0) __asm__ volatile("" : "+v"(line)); /* nor is it loaded earlier */
        __m512i index = _mm512_srli_epi16(line, (unsigned)(8 / per_line * (s % per_line)));
        if (bits == 4 ? s % 2 == 0 : i == two && s % 2 == 0) _mm_prefetch((const char *)next + at, _MM_HINT_T1);
        if (bits == 3) {
            const int bit = 4 * i + s, top_at = high + LINE_BYTES * (first / 2);
            const __m512i top = _mm512_loadu_si512(codes + top_at);
            if (bit == 0) _mm_prefetch((const char *)next + top_at, _MM_HINT_T1);
            index = _mm512_ternarylogic_epi32(_mm512_set1_epi8(3), index,
                                              bit < 2 ? _mm512_slli_epi16(top, (unsigned)(bit < 2 ? 2 - bit : 0))
                                                      : _mm512_srli_epi16(top, (unsigned)(bit < 2 ? 0 : bit - 2)), 0xCA);
        }
        index = _mm512_and_si512(index, _mm512_set1_epi8((char)((1 << bits) - 1)));
        unit[s % 2] = _mm512_shuffle_epi8(table, index);
    }
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

/* 16 dots of a row from the sums of its high parts and of the low parts that it shares; less than a unit is lost. */
INLINE __m512i dots_of(__m512i high, __m512i low, int second) {
    return _mm512_add_epi32(_mm512_slli_epi32(high, 4), second ? _mm512_srai_epi32(low, 4) : low);
}

INLINE void store_dots(__m512i high, __m512i low, int second, int32_t *to) {
    _mm512_storeu_si512(to, dots_of(high, low, second));
}

/* 16 dims of a row's sums, likewise. */
INLINE void add_sums(__m512 high, __m512 low, int second, float step, float *to) {
    const __m512 value = _mm512_fmsub_ps(high, _mm512_set1_ps(16.0f), _mm512_mul_ps(low, _mm512_set1_ps(second ? 0.0625f : 1.0f)));
    _mm512_storeu_ps(to, _mm512_fmadd_ps(value, _mm512_set1_ps(step), _mm512_loadu_ps(to)));
}

typedef int32_t __attribute__((may_alias, aligned(1))) four_bytes;

/* The products are written as instructions, as the compiler would move them about until 32 registers are too few. */
INLINE void key_bytes(const tqai_codec *codec, int bits, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                      const tqai_query_bytes *query, int rows, const float *scale, float *logit, float *largest) {
    const int dim = codec->head_dim, high = (int)tqai_high_plane_at(dim);
    const __m512i table = byte_table(codec, bits, 128);
    const int8_t *bytes = query->bytes;
    const int32_t *bias = query->bias;
    for (int page = 0; page < pages; page++, logit += TQAI_PAGE_TOKENS, scale += TQAI_PAGE_TOKENS) {
        __m512i sum[BYTE_ROWS(MAX_ROWS)][4];
        __asm__ volatile("" : : "r"(bias) : "memory"); /* loaded for every page: there are no registers left to keep it */
#pragma GCC unroll 6
        for (int b = 0; b < BYTE_ROWS(rows); b++)
#pragma GCC unroll 4
            for (int g = 0; g < 4; g++) sum[b][g] = _mm512_set1_epi32(bias[b]);
        for (int p = 0; p < dim / 4; p += 2)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                __m512i unit[2];
                two_units(table, bits, codes[page], next[page], high, p, i / 2, i % 2, unit);
#pragma GCC unroll 6
                for (int b = 0; b < BYTE_ROWS(rows); b++) {
                    const four_bytes *factor = (const four_bytes *)(bytes + b * dim + 4 * (p + i / 2));
                    __asm__ volatile("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum[b][i % 2 * 2]) : "v"(unit[0]), "m"(*factor));
                    __asm__ volatile("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum[b][i % 2 * 2 + 1]) : "v"(unit[1]), "m"(*factor));
                }
            }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            __m512 most = _mm512_loadu_ps(largest + LARGEST_LANES * r);
#pragma GCC unroll 4
            for (int g = 0; g < 4; g++) {
                const __m512 dots = _mm512_cvtepi32_ps(dots_of(sum[r][g], sum[rows + r / 2][g], r % 2));
                const __m512 x = _mm512_mul_ps(dots, _mm512_loadu_ps(scale + 16 * g));
                most = v_max(most, x);
                _mm512_storeu_ps(logit + r * BLOCK_TOKENS + 16 * g, x);
            }
            _mm512_storeu_ps(largest + LARGEST_LANES * r, most);
        }
    }
}

/* Units 2 two and 2 two + 1 of the quads of a chunk of `groups` (1, 2 or 4) groups of 16 dims; a quad of units holds
 * 4 / groups quads of tokens. */
INLINE void value_byte_units(const tqai_codec *codec, int bits, __m512i table, const uint8_t *const *codes,
                             const uint8_t *const *next, int pages, const int8_t *bytes, const float *step, int rows,
                             int chunk, int groups, int two, float *acc) {
    const int tokens = 4 / groups, high = (int)tqai_high_plane_at(codec->head_dim);
    __m512i sum[BYTE_ROWS(MAX_ROWS)][2];
#pragma GCC unroll 6
    for (int b = 0; b < BYTE_ROWS(rows); b++) sum[b][0] = sum[b][1] = _mm512_setzero_si512();
    for (int page = 0; page < pages; page++)
        for (int quad = 0; quad < 4 * groups; quad += 2)
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                __m512i unit[2];
                two_units(table, bits, codes[page], next[page], high, 16 * chunk + quad, i, two, unit);
#pragma GCC unroll 6
                for (int b = 0; b < BYTE_ROWS(rows); b++) {
                    const int8_t *of_page = bytes + b * BLOCK_TOKENS + TQAI_PAGE_TOKENS * page + 4 * tokens * (quad + i);
#pragma GCC unroll 2
                    for (int s = 0; s < 2; s++) sum[b][s] = _mm512_dpbusd_epi32(sum[b][s], four_of(of_page + 4 * ((2 * two + s) / groups)), unit[s]);
                }
            }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int s = 0; s < 2; s++)
            add_sums(_mm512_cvtepi32_ps(sum[r][s]), _mm512_cvtepi32_ps(sum[rows + r / 2][s]), r % 2, step[r],
                     acc + r * codec->head_dim + 64 * chunk + 16 * ((2 * two + s) % groups));
}

INLINE void value_byte_chunk(const tqai_codec *codec, int bits, __m512i table, const uint8_t *const *codes,
                             const uint8_t *const *next, int pages, const int8_t *bytes, const float *step, int rows,
                             int chunk, int groups, float *acc) {
    value_byte_units(codec, bits, table, codes, next, pages, bytes, step, rows, chunk, groups, 0, acc);
    value_byte_units(codec, bits, table, codes, next, pages, bytes, step, rows, chunk, groups, 1, acc);
}

INLINE void value_bytes(const tqai_codec *codec, int bits, const uint8_t *const *codes, const uint8_t *const *next,
                        int pages, const int8_t *bytes, const float *step, int rows, float *acc) {
    const __m512i table = byte_table(codec, bits, 0);
    for (int chunk = 0; chunk < (codec->head_dim + 63) / 64; chunk++) {
        const int groups = tqai_chunk_groups(codec->head_dim, 64 * chunk);
        if (groups == 4) value_byte_chunk(codec, bits, table, codes, next, pages, bytes, step, rows, chunk, 4, acc);
        else if (groups == 2) value_byte_chunk(codec, bits, table, codes, next, pages, bytes, step, rows, chunk, 2, acc);
        else value_byte_chunk(codec, bits, table, codes, next, pages, bytes, step, rows, chunk, 1, acc);
    }
}

#define SPECIAL_BYTES(bits, rows)                                                                                    \
    static __attribute__((noinline)) void keys_bytes_##bits##_##rows(                                                \
        const tqai_codec *c, const uint8_t *const *p, const uint8_t *const *next, int pages,                         \
        const tqai_query_bytes *q, const float *scale, float *logit, float *largest) {                               \
        key_bytes(c, bits, p, next, pages, q, rows, scale, logit, largest);                                          \
    }                                                                                                                \
    static __attribute__((noinline)) void values_bytes_##bits##_##rows(                                              \
        const tqai_codec *c, const uint8_t *const *p, const uint8_t *const *next, int pages, const int8_t *bytes,    \
        const float *step, float *acc) {                                                                             \
        value_bytes(c, bits, p, next, pages, bytes, step, rows, acc);                                                \
    }
#define ALL_ROWS_OF_BYTES(bits) SPECIAL_BYTES(bits, 1) SPECIAL_BYTES(bits, 2) SPECIAL_BYTES(bits, 4)
ALL_ROWS_OF_BYTES(2) ALL_ROWS_OF_BYTES(3) ALL_ROWS_OF_BYTES(4)

#define FEWEST_STEPS 4 /* in the mean */
#define LEAST_SHARE 1000 /* of the largest */

/* Whether bytes say the weights of a run well enough. Without a sign they can say none below zero. And where one weight
 * of a row is most of it, as that of the first token of many a model, the rest are a few of 3825 steps each, or none:
 * where they are below four steps in the mean, and over a thousandth of the largest all together, their rounding, to
 * zero above all, would show. As whole numbers of 15 bits, which they come as, they have eight times as many. */
static int bytes_suffice(const int16_t *w, int tokens, int rows) {
    __m512i all = _mm512_setzero_si512();
    for (int r = 0; r < rows; r++) {
        __m512i sum = _mm512_setzero_si512();
        for (int t = 0; t < tokens; t += 32) {
            const __m512i weights = _mm512_loadu_si512(w + r * BLOCK_TOKENS + t);
            all = _mm512_or_si512(all, weights);
            sum = _mm512_dpwssd_epi32(sum, weights, _mm512_set1_epi16(1));
        }
        const int rest = _mm512_reduce_add_epi32(sum) - WEIGHT_OF_BYTES; /* the largest is that, or all are 0 */
        if (rest > WEIGHT_OF_BYTES / LEAST_SHARE && rest < FEWEST_STEPS * FACTOR_PARTS * tokens) return 0;
    }
    return _mm512_movepi16_mask(all) == 0;
}
