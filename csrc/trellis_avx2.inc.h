/* trellis_avx2.inc.h: the integer sums of trellis codes with AVX2; included by kernels_avx2.c.
 *
 * The levels of a page side (trellis_levels_avx2.inc.h, of 4 bits trellis_parts_avx2.inc.h) lie as bytes without sign
 * (+ 128) in a buffer in the first-level cache, once for all query rows. Even and odd bytes of a register are two
 * registers of 16-bit numbers, and vpmaddwd sums pairs: two dims of the same token for keys, two tokens of the same dim
 * for values. What 128 adds to a sum is subtracted in the end; sums may overflow on the way and are right afterwards.
 */
#include "trellis_levels_avx2.inc.h"
#include "trellis_parts_avx2.inc.h"

#define LEVELS_FUNCTION(name)                                                                                        \
    static __attribute__((noinline)) void name(const tqai_codec *codec, int is_value, const lookup_tables *tables,  \
                                               const uint8_t *in, const uint8_t *next, uint8_t *buffer)
#define TRELLIS_LEVELS(bits, state_bits)                                                                             \
    LEVELS_FUNCTION(trellis_levels_##bits##_##state_bits) {                                                          \
        if (is_value) value_levels(codec, bits, state_bits, tables, in, next, buffer);                               \
        else key_levels(codec, bits, state_bits, tables, in, next, buffer);                                          \
    }
#define TRELLIS_STATES(state_bits)                                                                                   \
    TRELLIS_LEVELS(1, state_bits) TRELLIS_LEVELS(2, state_bits) TRELLIS_LEVELS(3, state_bits)                        \
    LEVELS_FUNCTION(trellis_levels_4_##state_bits) {                                                                 \
        (void)tables;                                                                                                \
        if (is_value) value_levels_of_parts(codec, state_bits, in, next, buffer);                                    \
        else key_levels_of_parts(codec, state_bits, in, next, buffer);                                               \
    }
TRELLIS_STATES(6) TRELLIS_STATES(8)
typedef void (*trellis_unpacker)(const tqai_codec *, int, const lookup_tables *, const uint8_t *, const uint8_t *, uint8_t *);

static trellis_unpacker unpacker_of(const tqai_codec *codec) {
    static const trellis_unpacker of[2][4] = {
        {trellis_levels_1_6, trellis_levels_2_6, trellis_levels_3_6, trellis_levels_4_6},
        {trellis_levels_1_8, trellis_levels_2_8, trellis_levels_3_8, trellis_levels_4_8}};
    return of[((const tqai_trellis *)codec->tables)->state_bits == 8][codec->bits - 1];
}

#define LEVEL_BYTES (64 * TQAI_MAX_HEAD_DIM)

INLINE void add_products(__m256i *even_sum, __m256i *odd_sum, __m256i levels, __m256i even, __m256i odd) {
    const __m256i a = _mm256_and_si256(levels, _mm256_set1_epi16(255)), b = _mm256_srli_epi16(levels, 8);
    *even_sum = _mm256_add_epi32(*even_sum, _mm256_madd_epi16(a, even));
    *odd_sum = _mm256_add_epi32(*odd_sum, _mm256_madd_epi16(b, odd));
    /* here and now: else GCC makes the products of all rows first, and runs out of registers */
    __asm__("" : "+x"(*even_sum), "+x"(*odd_sum));
}

INLINE __m256i four_of(const int16_t *terms) {
    int64_t four;
    memcpy(&four, terms, sizeof four);
    return _mm256_set1_epi64x(four);
}

/* Sums of a column of the key buffer, of even and of odd tokens, to its 16 dots. */
INLINE void store_column(__m256i even, __m256i odd, int32_t bias, int column, int32_t *dots) {
    int32_t *out = dots + 32 * (column / 2) + 8 * (column % 2);
    even = _mm256_add_epi32(even, _mm256_set1_epi32(bias));
    odd = _mm256_add_epi32(odd, _mm256_set1_epi32(bias));
    _mm256_storeu_si256((__m256i *)out, _mm256_unpacklo_epi32(even, odd));
    _mm256_storeu_si256((__m256i *)(out + 16), _mm256_unpackhi_epi32(even, odd));
}

/* `count` columns of the key buffer from column `first` on. */
INLINE void trellis_key_columns(const uint8_t *level, const int16_t *q, const int32_t *bias, int dim, int rows, int first,
                                int count, int32_t *dots) {
    __m256i sum[MAX_ROWS][4][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < count; c++) sum[r][c][0] = sum[r][c][1] = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int p = 0; p < dim / 2; p++) {
        const __m256i *at = (const __m256i *)level + dim / 2 * first + p;
#pragma GCC unroll 4
        for (int c = 0; c < count; c++) {
            const __m256i levels = _mm256_load_si256(at + dim / 2 * c);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const __m256i pair = pair_of(q + r * dim + 2 * p);
                add_products(&sum[r][c][0], &sum[r][c][1], levels, pair, pair);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < count; c++)
            store_column(sum[r][c][0], sum[r][c][1], bias[r], first + c, dots + r * BLOCK_TOKENS);
}

INLINE void trellis_keys(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                         const int16_t *q, int rows, int32_t *dots) {
    const int dim = codec->head_dim;
    const trellis_unpacker unpack = unpacker_of(codec);
    _Alignas(64) uint8_t level[LEVEL_BYTES];
    lookup_tables tables;
    if (codec->bits < 4) make_tables(codec, &tables);
    int32_t bias[MAX_ROWS] = {0};
    int16_t pairs[MAX_ROWS * TQAI_MAX_HEAD_DIM]; /* of dims i and i + dim / 2 */
    for (int r = 0; r < rows; r++) {
        const int16_t *from = q + r * dim;
        for (int d = 0; d < dim; d++) bias[r] += from[d];
        bias[r] *= -128;
        for (int i = 0; i < dim / 2; i += 8) {
            const __m128i a = _mm_loadu_si128((const __m128i *)(from + i)), b = _mm_loadu_si128((const __m128i *)(from + i + dim / 2));
            __m128i *to = (__m128i *)(pairs + r * dim + 2 * i);
            _mm_storeu_si128(to, _mm_unpacklo_epi16(a, b));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(a, b));
        }
    }
    for (int page = 0; page < pages; page++, dots += TQAI_PAGE_TOKENS) {
        unpack(codec, 0, &tables, codes[page], next[page], level);
        if (rows == 1) {
            trellis_key_columns(level, pairs, bias, dim, 1, 0, 4, dots);
        } else if (rows == 2) {
            trellis_key_columns(level, pairs, bias, dim, 2, 0, 2, dots);
            trellis_key_columns(level, pairs, bias, dim, 2, 2, 2, dots);
        } else {
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; c++) trellis_key_columns(level, pairs, bias, dim, rows, c, 1, dots);
        }
    }
}

/* Sums [columns][rows][8] += two columns of a page. */
INLINE void trellis_value_columns(const uint8_t *level, const int16_t *w, int rows, int32_t *sums) {
    __m256i sum[MAX_ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) sum[r][c] = _mm256_loadu_si256((const __m256i *)(sums + 8 * (c * rows + r)));
    for (int h = 0; h < 8; h++) {
        const __m256i one = _mm256_load_si256((const __m256i *)(level + 32 * h));
        const __m256i two = _mm256_load_si256((const __m256i *)(level + 32 * (8 + h)));
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const __m256i even = four_of(w + r * BLOCK_TOKENS + 8 * h), odd = four_of(w + r * BLOCK_TOKENS + 8 * h + 4);
            add_products(&sum[r][0], &sum[r][0], one, even, odd);
            add_products(&sum[r][1], &sum[r][1], two, even, odd);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) _mm256_storeu_si256((__m256i *)(sums + 8 * (c * rows + r)), sum[r][c]);
}

/* Columns `apart` numbers apart, 2 partial sums of 4 dims each, to out [4 of_group dims]. */
INLINE void order_sums(const int32_t *from, int apart, const int of_group, int32_t *out) {
    __m256i *to = (__m256i *)out, part[4][2];
    for (int c = 0; c < of_group; c += 2) {
        const __m256i *one = (const __m256i *)(from + apart * c), *two = (const __m256i *)(from + apart * (c + 1));
        const __m256i both = _mm256_hadd_epi32(_mm256_loadu_si256(one), _mm256_loadu_si256(two));
        part[c / 2][0] = _mm256_shuffle_epi32(both, 0xD8); /* | dim 0: c, c + 1 | dim 1: c, c + 1 | dim 2 .. */
    }
    if (of_group == 2) {
        _mm256_storeu_si256(to, part[0][0]);
        return;
    }
    for (int c = 0; c < of_group / 2; c += 2) {
        const __m256i a = part[c][0], b = part[c + 1][0];
        part[c / 2][0] = _mm256_unpacklo_epi64(a, b); /* | dim 0: c .. c + 3 | dim 2 .. */
        part[c / 2][1] = _mm256_unpackhi_epi64(a, b); /* | dim 1: c .. c + 3 | dim 3 .. */
    }
    for (int i = 0; i < of_group / 4; i++) {
        const __m256i a = part[0][of_group == 8 ? i : 0], b = of_group == 8 ? part[1][i] : part[0][1];
        _mm256_storeu_si256(to + i, _mm256_permute2x128_si256(a, b, 0x20));
        _mm256_storeu_si256(to + i + of_group / 4, _mm256_permute2x128_si256(a, b, 0x31));
    }
}

INLINE void trellis_values(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                           const int16_t *w, const float *step, int rows, float *acc) {
    const int dim = codec->head_dim, of_group = columns_of(codec->bits), groups = (dim + 4 * of_group - 1) / (4 * of_group);
    const trellis_unpacker unpack = unpacker_of(codec);
    _Alignas(64) uint8_t level[LEVEL_BYTES + 64 * 16];
    lookup_tables tables;
    if (codec->bits < 4) make_tables(codec, &tables);
    int32_t sums[MAX_ROWS * 8 * (TQAI_MAX_HEAD_DIM + 16) / 4], ordered[TQAI_MAX_HEAD_DIM + 16], bias[MAX_ROWS] = {0};
    int16_t apart[MAX_ROWS * BLOCK_TOKENS]; /* weights of every 8 tokens: of the even ones, of the odd ones */
    const __m128i parted = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    for (int r = 0; r < rows; r++) {
        __m128i total = _mm_setzero_si128();
        for (int i = r * BLOCK_TOKENS; i < r * BLOCK_TOKENS + TQAI_PAGE_TOKENS * pages; i += 8) {
            const __m128i eight = _mm_loadu_si128((const __m128i *)(w + i));
            total = _mm_add_epi32(total, _mm_madd_epi16(eight, _mm_set1_epi16(1)));
            _mm_storeu_si128((__m128i *)(apart + i), _mm_shuffle_epi8(eight, parted));
        }
        total = _mm_add_epi32(total, _mm_shuffle_epi32(total, 0x4E));
        bias[r] = -128 * _mm_cvtsi128_si32(_mm_add_epi32(total, _mm_shuffle_epi32(total, 0xB1)));
    }
    memset(sums, 0, sizeof(int32_t) * 8 * (size_t)(rows * groups * of_group));
    for (int page = 0; page < pages; page++) {
        unpack(codec, 1, &tables, codes[page], next[page], level);
        for (int c = 0; c < groups * of_group; c += 2)
            trellis_value_columns(level + 32 * 8 * c, apart + TQAI_PAGE_TOKENS * page, rows, sums + 8 * rows * c);
    }
    for (int r = 0; r < rows; r++) {
        for (int group = 0; group < groups; group++)
            order_sums(sums + 8 * rows * of_group * group + 8 * r, 8 * rows, of_group, ordered + 4 * of_group * group);
        for (int d = 0; d < dim; d++) acc[r * dim + d] += (float)(int32_t)((uint32_t)ordered[d] + (uint32_t)bias[r]) * step[r];
    }
}

#define SPECIAL_TRELLIS(rows)                                                                                        \
    static __attribute__((noinline)) void keys_trellis_##rows(const tqai_codec *c, const uint8_t *const *codes,     \
                                                              const uint8_t *const *next, int pages,                \
                                                              const int16_t *q, int32_t *dots) {                    \
        trellis_keys(c, codes, next, pages, q, rows, dots);                                                         \
    }                                                                                                               \
    static __attribute__((noinline)) void values_trellis_##rows(const tqai_codec *c, const uint8_t *const *codes,   \
                                                                const uint8_t *const *next, int pages,              \
                                                                const int16_t *w, const float *step, float *acc) {  \
        trellis_values(c, codes, next, pages, w, step, rows, acc);                                                  \
    }
SPECIAL_TRELLIS(1) SPECIAL_TRELLIS(2) SPECIAL_TRELLIS(4)
