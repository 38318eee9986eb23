/* trellis_avx2.inc.h: the integer sums of trellis codes with AVX2; included by kernels_avx2.c.
 *
 * A window is two to four nibbles of the row. A linear map over GF(2) is the sum of what its nibbles map to, so
 * one byte shuffle per nibble and their exclusive or make the index of 32 levels at once; one of the nibbles maps
 * to itself where tqai_trellis_direct says so. The levels are in tables of 16: `table[i]` ^ `table[i - 1]`, read
 * at index - 16 i, which gives 0 where that is below 0 (a byte shuffle does so where bit 7 is set).
 *
 *   keys     byte k of 32 tokens (trellis.h) makes coordinate i of these; words of two tokens of coordinates i and
 *            i + 1 are interleaved to  | i: t, t + 1 | i + 1: t, t + 1 |  in 32-bit lanes
 *   values   byte k of 8 tokens and of 4 places k: a column is 4 dims, | dim 0: token 0 .. 7 | dim 1 .. |
 *
 * Levels lie as bytes without sign (+ 128) in a buffer in the first-level cache, once for all query rows. Even
 * and odd bytes of a register are two registers of 16-bit numbers, and vpmaddwd sums pairs: two dims of the same
 * token for keys, two tokens of the same dim for values. What 128 adds to a sum is subtracted in the end; sums
 * may overflow on the way and are right afterwards.
 */
#include "trellis.h"

#define COLUMNS 4 /* of the key buffer: 16 tokens each, | pair of dims | column | 32 bytes | */
#define LEVEL_TABLES(bits) (TQAI_TRELLIS_INDEX_BITS(bits) == 7 ? 8 : 4)
#define LEVEL_BYTES (64 * TQAI_MAX_HEAD_DIM)

INLINE __m256i sixteen_bytes(const uint8_t *table) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)); }

/* Differences of the tables of 16 levels + 128: [8 u][LEVEL_TABLES(bits)][16]. */
INLINE void level_tables(const tqai_trellis *t, const int bits, uint8_t *out) {
    const int tables = LEVEL_TABLES(bits), count = bits == 3 ? 8 : 8 / bits;
    const __m128i flip = _mm_set1_epi8(-128);
    for (int u = 0; u < count; u++)
        for (int i = 0; i < tables; i++) {
            const __m128i *from = (const __m128i *)(t->nibble_levels + 128 * u + 16 * i);
            __m128i one = _mm_xor_si128(_mm_loadu_si128(from), i ? _mm_loadu_si128(from - 1) : flip);
            _mm_storeu_si128((__m128i *)(out + 16 * (tables * u + i)), one);
        }
}

INLINE __m256i nibble_of(const __m256i *line, int nibble) {
    const __m256i keep = _mm256_set1_epi8(15);
    return nibble % 2 ? _mm256_and_si256(_mm256_srli_epi16(line[nibble / 2], 4), keep) : _mm256_and_si256(line[nibble / 2], keep);
}

/* Levels + 128 of coordinate u (of 8) of two registers of bytes; line 0 is byte 0 of the eight coordinates. */
INLINE void two_levels(const tqai_trellis *t, const uint8_t *tables, const int bits, const int state_bits,
                       int u, const __m256i *one, const __m256i *two, __m256i *out) {
    const int start = bits * u / 4, nibbles = tqai_trellis_nibbles(bits, state_bits, u);
    const int direct = tqai_trellis_direct(bits, state_bits, u), count = LEVEL_TABLES(bits);
    const uint8_t *at = tables + 16 * count * (bits == 3 ? u : u % (8 / bits));
    __m256i index[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 4
    for (int j = 0; j < nibbles; j++) {
        __m256i a = nibble_of(one, start + j), b = nibble_of(two, start + j);
        if (j != direct) {
            const __m256i map = sixteen_bytes(t->nibbles + 16 * (4 * u + j));
            a = _mm256_shuffle_epi8(map, a);
            b = _mm256_shuffle_epi8(map, b);
        }
        index[0] = _mm256_xor_si256(index[0], a);
        index[1] = _mm256_xor_si256(index[1], b);
    }
    const __m256i levels = sixteen_bytes(at), down = _mm256_set1_epi8(-16);
    out[0] = _mm256_shuffle_epi8(levels, index[0]);
    out[1] = _mm256_shuffle_epi8(levels, index[1]);
#pragma GCC unroll 8
    for (int i = 1; i < count; i++) {
        const __m256i more = sixteen_bytes(at + 16 * i);
        index[0] = _mm256_add_epi8(index[0], down);
        index[1] = _mm256_add_epi8(index[1], down);
        out[0] = _mm256_xor_si256(out[0], _mm256_shuffle_epi8(more, index[0]));
        out[1] = _mm256_xor_si256(out[1], _mm256_shuffle_epi8(more, index[1]));
    }
}

/* out [head_dim / 2][COLUMNS][32]; column 2 half + upper. */
INLINE void key_levels(const tqai_codec *codec, const int bits, const int state_bits,
                       const uint8_t *tables, const uint8_t *in, const uint8_t *next, uint8_t *out) {
    const tqai_trellis *t = codec->tables;
    const int row_bytes = tqai_trellis_row_bytes(codec), step = bits == 3 ? 8 : 8 / bits > 2 ? 8 / bits : 2;
    for (int i = 0; i < codec->head_dim; i += step) {
        const int first = bits * i / 8, lines = bits * step / 8;
        __m256i line[2][4];
#pragma GCC unroll 4
        for (int k = 0; k <= lines; k++) {
            const uint8_t *from = in + 64 * (first + k < row_bytes ? first + k : 0);
            line[0][k] = _mm256_loadu_si256((const __m256i *)from);
            line[1][k] = _mm256_loadu_si256((const __m256i *)(from + 32));
            if (k < lines) _mm_prefetch((const char *)next + 64 * (first + k), _MM_HINT_T1);
        }
#pragma GCC unroll 4
        for (int u = 0; u < step; u += 2, out += 32 * COLUMNS) {
            __m256i a[2], b[2];
            two_levels(t, tables, bits, state_bits, u, line[0], line[1], a);
            two_levels(t, tables, bits, state_bits, u + 1, line[0], line[1], b);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                _mm256_store_si256((__m256i *)(out + 64 * half), _mm256_unpacklo_epi16(a[half], b[half]));
                _mm256_store_si256((__m256i *)(out + 64 * half + 32), _mm256_unpackhi_epi16(a[half], b[half]));
            }
        }
    }
}

/* Of 4 groups of `bits` bytes, byte k of each, 8 tokens. */
INLINE __m256i four_places(const uint8_t *from, const int bits, int k) {
    const __m256i *at = (const __m256i *)(from + 8 * k);
    if (bits != 3) return _mm256_loadu_si256(at);
    const __m256i a = _mm256_blend_epi32(_mm256_loadu_si256(at), _mm256_loadu_si256((const __m256i *)(from + 8 * k + 16)), 0x0C);
    const __m256i b = _mm256_blend_epi32(_mm256_loadu_si256((const __m256i *)(from + 8 * k + 32)),
                                         _mm256_loadu_si256((const __m256i *)(from + 8 * k + 48)), 0xC0);
    return _mm256_blend_epi32(a, b, 0xF0);
}

/* Columns of 4 dims of a value side: 4 places hold 32 / bits dims (3 bits: 4 groups of 3 bytes hold 32), and
 * column c of a group of places has the dims first + apart * (0, 1, 2, 3) + c. */
INLINE int columns_of(const int bits) { return bits == 3 ? 8 : 8 / bits; }

/* out [groups][columns_of(bits)][8 h][32]: byte 8 q + v is token 8 h + v, dim 4 columns * group + columns * q + c. */
INLINE void value_levels(const tqai_codec *codec, const int bits, const int state_bits,
                         const uint8_t *tables, const uint8_t *in, const uint8_t *next, uint8_t *out) {
    const tqai_trellis *t = codec->tables;
    const int row_bytes = tqai_trellis_row_bytes(codec), columns = columns_of(bits), places = bits == 3 ? 12 : 4;
    const int groups = (row_bytes + places - 1) / places, last = places * (groups - 1), lines = bits == 3 ? 3 : 1;
    _Alignas(32) uint8_t tail[8][8 * 16]; /* the last places and the first again */
    for (int h = 0; h < 8; h++)
        for (int k = 0; k < 16; k++) {
            const int from = last + k < row_bytes ? last + k : 0;
            uint64_t eight;
            memcpy(&eight, in + 8 * (row_bytes * h + from), 8);
            memcpy(tail[h] + 8 * k, &eight, 8);
        }
    for (int group = 0; group < groups; group++, out += 32 * 8 * columns) {
        const uint8_t *from = group == groups - 1 ? tail[0] : in + 8 * places * group;
        const int apart = group == groups - 1 ? 8 * 16 : 8 * row_bytes;
        for (int h = 0; h < 8; h += 2, from += 2 * apart) {
            __m256i line[2][4];
#pragma GCC unroll 4
            for (int k = 0; k <= lines; k++) {
                line[0][k] = four_places(from, bits, k);
                line[1][k] = four_places(from + apart, bits, k);
            }
            _mm_prefetch((const char *)next + 8 * places * (4 * group + h / 2), _MM_HINT_T1);
            if (bits == 3) _mm_prefetch((const char *)next + 8 * places * (4 * group + h / 2) + 64, _MM_HINT_T1);
#pragma GCC unroll 8
            for (int c = 0; c < columns; c++) {
                __m256i level[2];
                two_levels(t, tables, bits, state_bits, c, line[0], line[1], level);
                _mm256_store_si256((__m256i *)(out + 32 * (8 * c + h)), level[0]);
                _mm256_store_si256((__m256i *)(out + 32 * (8 * c + h + 1)), level[1]);
            }
        }
    }
}

#define TRELLIS_LEVELS(bits, state_bits)                                                                             \
    static __attribute__((noinline)) void trellis_levels_##bits##_##state_bits(                                     \
        const tqai_codec *codec, int is_value, const uint8_t *tables, const uint8_t *in, const uint8_t *next,       \
        uint8_t *out) {                                                                                             \
        if (is_value) value_levels(codec, bits, state_bits, tables, in, next, out);                                 \
        else key_levels(codec, bits, state_bits, tables, in, next, out);                                                    \
    }
TRELLIS_LEVELS(1, 6) TRELLIS_LEVELS(2, 6) TRELLIS_LEVELS(3, 6) TRELLIS_LEVELS(4, 6)
TRELLIS_LEVELS(1, 8) TRELLIS_LEVELS(2, 8) TRELLIS_LEVELS(3, 8) TRELLIS_LEVELS(4, 8)
typedef void (*trellis_unpacker)(const tqai_codec *, int, const uint8_t *, const uint8_t *, const uint8_t *, uint8_t *);

static trellis_unpacker unpacker_of(const tqai_codec *codec) {
    static const trellis_unpacker of[2][4] = {
        {trellis_levels_1_6, trellis_levels_2_6, trellis_levels_3_6, trellis_levels_4_6},
        {trellis_levels_1_8, trellis_levels_2_8, trellis_levels_3_8, trellis_levels_4_8}};
    return of[((const tqai_trellis *)codec->tables)->state_bits == 8][codec->bits - 1];
}

INLINE void add_products(__m256i *even_sum, __m256i *odd_sum, __m256i levels, __m256i even, __m256i odd) {
    const __m256i a = _mm256_and_si256(levels, _mm256_set1_epi16(255)), b = _mm256_srli_epi16(levels, 8);
    *even_sum = _mm256_add_epi32(*even_sum, _mm256_madd_epi16(a, even));
    *odd_sum = _mm256_add_epi32(*odd_sum, _mm256_madd_epi16(b, odd));
    /* here and now: else GCC makes the products of all rows first, and runs out of registers */
    __asm__("" : "+x"(*even_sum), "+x"(*odd_sum));
}

/* `count` columns of the key buffer from column `first` on. */
INLINE void trellis_key_columns(const uint8_t *level, const int16_t *q, const int32_t *bias, int dim, int rows, int first,
                                int count, int32_t *dots) {
    __m256i sum[MAX_ROWS][2][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int c = 0; c < count; c++) sum[r][c][0] = sum[r][c][1] = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int p = 0; p < dim / 2; p++) {
        const __m256i *at = (const __m256i *)(level + 32 * (COLUMNS * p + first));
#pragma GCC unroll 2
        for (int c = 0; c < count; c++) {
            const __m256i levels = _mm256_load_si256(at + c);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const __m256i pair = pair_of(q + r * dim + 2 * p);
                add_products(&sum[r][c][0], &sum[r][c][1], levels, pair, pair);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int c = 0; c < count; c++) {
            int32_t *out = dots + r * BLOCK_TOKENS + 32 * ((first + c) % 2) + 8 * ((first + c) / 2);
            const __m256i even = _mm256_add_epi32(sum[r][c][0], _mm256_set1_epi32(bias[r]));
            const __m256i odd = _mm256_add_epi32(sum[r][c][1], _mm256_set1_epi32(bias[r]));
            _mm256_storeu_si256((__m256i *)out, _mm256_unpacklo_epi32(even, odd));
            _mm256_storeu_si256((__m256i *)(out + 16), _mm256_unpackhi_epi32(even, odd));
        }
}

INLINE void trellis_keys(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                         const int16_t *q, int rows, int32_t *dots) {
    const int dim = codec->head_dim;
    const trellis_unpacker unpack = unpacker_of(codec);
    _Alignas(64) uint8_t level[LEVEL_BYTES], tables[8 * 128];
    level_tables(codec->tables, codec->bits, tables);
    int32_t bias[MAX_ROWS] = {0};
    for (int r = 0; r < rows; r++) {
        for (int d = 0; d < dim; d++) bias[r] += q[r * dim + d];
        bias[r] *= -128;
    }
    for (int page = 0; page < pages; page++, dots += TQAI_PAGE_TOKENS) {
        unpack(codec, 0, tables, codes[page], next[page], level);
        if (rows <= 2) {
            trellis_key_columns(level, q, bias, dim, rows, 0, 2, dots);
            trellis_key_columns(level, q, bias, dim, rows, 2, 2, dots);
        } else {
#pragma GCC unroll 4
            for (int c = 0; c < COLUMNS; c++) trellis_key_columns(level, q, bias, dim, rows, c, 1, dots);
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
            int64_t four[2];
            memcpy(four, w + r * BLOCK_TOKENS + 8 * h, sizeof four);
            const __m256i even = _mm256_set1_epi64x(four[0]), odd = _mm256_set1_epi64x(four[1]);
            add_products(&sum[r][0], &sum[r][0], one, even, odd);
            add_products(&sum[r][1], &sum[r][1], two, even, odd);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) _mm256_storeu_si256((__m256i *)(sums + 8 * (c * rows + r)), sum[r][c]);
}

INLINE void trellis_values(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                           const int16_t *w, const float *step, int rows, float *acc) {
    const int dim = codec->head_dim, of_group = columns_of(codec->bits), groups = (dim + 4 * of_group - 1) / (4 * of_group);
    const trellis_unpacker unpack = unpacker_of(codec);
    _Alignas(64) uint8_t level[LEVEL_BYTES + 64 * 16], tables[8 * 128];
    level_tables(codec->tables, codec->bits, tables);
    int32_t sums[MAX_ROWS * 8 * (TQAI_MAX_HEAD_DIM + 16) / 4], bias[MAX_ROWS] = {0};
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
        unpack(codec, 1, tables, codes[page], next[page], level);
        for (int c = 0; c < groups * of_group; c += 2)
            trellis_value_columns(level + 32 * 8 * c, apart + TQAI_PAGE_TOKENS * page, rows, sums + 8 * rows * c);
    }
    for (int group = 0; group < groups; group++)
        for (int c = 0; c < of_group; c++)
            for (int q = 0; q < 4; q++) {
                const int d = of_group * (4 * group + q) + c;
                for (int r = 0; r < rows && d < dim; r++) {
                    const uint32_t *of = (const uint32_t *)sums + 8 * (rows * (of_group * group + c) + r) + 2 * q;
                    acc[r * dim + d] += (float)(int32_t)(of[0] + of[1] + (uint32_t)bias[r]) * step[r];
                }
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
