/* kernels_avx2.c: AVX2.
 *
 * Half a line (32 bytes) holds 8 lanes of several units of four terms (layout.h). A pass takes two units of every
 * quad of them through a side, unpacks their codes in registers and adds products to sums that stay in registers:
 *
 *   4 bits   byte e = | unit 1 | unit 0 |      >> 4 i, & 15: codes of unit i. A byte shuffle looks up 32 levels
 *                                              (+ 128, so that they have no sign; 128 times the sum of factors is
 *                                              taken off at the end)
 *   word     | term 1 | term 0 |               & 255: terms 0 and 2 of each lane; >> 8: terms 1 and 3
 *
 * 2 and 3 bits likewise. vpmaddwd adds the products of two terms into a lane. Levels that are no bytes take two byte
 * shuffles, one for their low and one for their high bytes. 8-bit codes, and codecs with steps of their own, are
 * unpacked into a buffer in the first-level cache first (generic.inc.h).
 */
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "isa.h"
#include "layout.h"

#include "vec_avx2.h"
static inline int of_bytes(const tqai_codec *codec) { return (void)codec, 0; }

#include "convert.inc.h"
#include "rotate.inc.h"
#include "codes.inc.h"
#include "softmax.inc.h"
#include "exact.inc.h"

#define INLINE static inline __attribute__((always_inline))

#define LEVEL_OFFSET 128

typedef struct {
    __m256i low, high; /* bytes of up to 16 levels, in both halves; of byte levels only low: + LEVEL_OFFSET */
} levels;

INLINE levels level_table(const tqai_codec *codec, int bits, int small) {
    uint8_t low[16], high[16];
    for (int i = 0; i < 16; i++) {
        const uint16_t level = (uint16_t)(codec->levels[i % (1 << bits)] + (small ? LEVEL_OFFSET : 0));
        low[i] = (uint8_t)level;
        high[i] = (uint8_t)(level >> 8);
    }
    return (levels){_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)low)),
                    _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)high))};
}

/* *sum += x, in the order in which it is written: the compiler would add up several lines first, and has not
 * registers enough for that. */
INLINE void add_to(__m256i *sum, __m256i x) {
    *sum = _mm256_add_epi32(*sum, x);
    __asm__("" : "+x"(*sum));
}

INLINE __m256i pair_of(const int16_t *terms) {
    int32_t both;
    memcpy(&both, terms, sizeof both);
    return _mm256_set1_epi32(both);
}

/* Factors of four terms in the order 0, 2, 1, 3, count a multiple of 16; bias[i] is what LEVEL_OFFSET adds to sums over
 * the fours 4 k + i, negative. */
INLINE void order_pairs(const int16_t *from, int count, int16_t *to, int32_t *bias) {
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < count; i += 16) {
        const __m256i x = _mm256_loadu_si256((const __m256i *)(from + i));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, _mm256_set1_epi16(1)));
        _mm256_storeu_si256((__m256i *)(to + i), _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(x, 0xD8), 0xD8));
    }
    const __m128i four = _mm_hadd_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    _mm_storeu_si128((__m128i *)bias, _mm_mullo_epi32(four, _mm_set1_epi32(-LEVEL_OFFSET)));
}

/* What a pass reads: `quads` quads, an even number, from `codes` and, of 3 bits, `high` on. */
typedef struct {
    const uint8_t *codes, *high, *next; /* next: prefetched from */
    int quads;
} chunk;

/* Codes of units 2 * two and 2 * two + 1 of quad `quad`, odd or not; half h. */
INLINE void two_indices(const chunk *c, int bits, int quad, int odd, int h, int two, __m256i *index) {
    const int line = bits == 4 ? 2 * quad + two : quad;
    const __m256i bytes = _mm256_loadu_si256((const __m256i *)(c->codes + LINE_BYTES * line + 32 * h));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        const int down = bits == 4 ? 4 * i : 4 * two + 2 * i;
        index[i] = _mm256_and_si256(_mm256_srli_epi16(bytes, down), _mm256_set1_epi8(bits == 4 ? 15 : 3));
        if (bits == 3) {
            const int bit = 4 * odd + 2 * two + i;
            const __m256i top = _mm256_loadu_si256((const __m256i *)(c->high + LINE_BYTES * (quad / 2) + 32 * h));
            const __m256i there = bit < 2 ? _mm256_slli_epi16(top, 2 - bit) : _mm256_srli_epi16(top, bit - 2);
            index[i] = _mm256_or_si256(index[i], _mm256_and_si256(there, _mm256_set1_epi8(4)));
        }
    }
    /* each of the four passes prefetches some of the lines */
    if (bits == 4 ? odd == h : quad % 4 == 2 * h + two) _mm_prefetch((const char *)c->next + LINE_BYTES * line, _MM_HINT_T1);
    if (bits == 3 && !odd && quad % 4 == 2 * h + two) _mm_prefetch((const char *)c->next + (c->high - c->codes) + LINE_BYTES * (quad / 2), _MM_HINT_T1);
}

/* 32 levels as words: terms 0 and 2 of every lane, terms 1 and 3. */
INLINE void pairs_of_levels(levels table, int small, __m256i index, __m256i *even, __m256i *odd) {
    const __m256i low = _mm256_shuffle_epi8(table.low, index), low_byte = _mm256_set1_epi16(0xFF);
    *even = _mm256_and_si256(low, low_byte);
    *odd = _mm256_srli_epi16(low, 8);
    if (!small) {
        const __m256i high = _mm256_shuffle_epi8(table.high, index);
        *even = _mm256_or_si256(*even, _mm256_slli_epi16(high, 8));
        *odd = _mm256_or_si256(*odd, _mm256_andnot_si256(low_byte, high));
    }
}

/* sum[r][i] += products of unit 2 * two + i of every quad, lanes 8 h .. 8 h + 7. Factors of four terms are in the
 * order 0, 2, 1, 3; those of unit s of quad q are the (4 q + s) / groups'th. */
INLINE void pass(levels table, const chunk *c, int bits, int small, int groups, int h, int two, const int16_t *factors,
                 int row, int rows, __m256i (*sum)[2]) {
    for (int first = 0; first < c->quads; first += 2, factors += 2 * 16 / groups) {
#pragma GCC unroll 2
        for (int q = 0; q < 2; q++) {
            __m256i index[2], even[2], odd[2];
            two_indices(c, bits, first + q, q, h, two, index);
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) pairs_of_levels(table, small, index[i], &even[i], &odd[i]);
            const int16_t *at[2] = {factors + 4 * ((4 * q + 2 * two) / groups), factors + 4 * ((4 * q + 2 * two + 1) / groups)};
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++) add_to(&sum[r][i], _mm256_madd_epi16(even[i], pair_of(at[i] + r * row)));
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
                for (int i = 0; i < 2; i++) add_to(&sum[r][i], _mm256_madd_epi16(odd[i], pair_of(at[i] + r * row + 2)));
        }
    }
}

/* Sums of units 2 * two + i, from what is to be taken off; unit s of quad q has the (4 q + s) / groups'th factors. */
INLINE void set_sums(int small, int32_t (*bias)[4], int groups, int two, int rows, __m256i (*sum)[2]) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const uint32_t *b = (const uint32_t *)bias[r]; /* modulo 2^32, as the sums are */
            const uint32_t total = groups == 4 ? b[0] + b[1] + b[2] + b[3] : groups == 2 ? b[two] + b[two + 2] : b[2 * two + i];
            sum[r][i] = _mm256_set1_epi32(small ? (int32_t)total : 0);
        }
}

INLINE void keys_of(const tqai_codec *codec, int bits, int small, const uint8_t *const *codes, const uint8_t *const *next,
                    int pages, const int16_t *q, int rows, int32_t *dots) {
    const int dim = codec->head_dim;
    const levels table = level_table(codec, bits, small);
    int16_t factors[MAX_ROWS * TQAI_MAX_HEAD_DIM];
    int32_t bias[MAX_ROWS][4];
    for (int r = 0; r < rows; r++) order_pairs(q + r * dim, dim, factors + r * dim, bias[r]);
    for (int page = 0; page < pages; page++, dots += TQAI_PAGE_TOKENS) {
        const chunk c = {codes[page], codes[page] + tqai_high_plane_at(dim), next[page], dim / 4};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const int h = i / 2, two = i % 2;
            __m256i sum[MAX_ROWS][2];
            set_sums(small, bias, 4, two, rows, sum);
            pass(table, &c, bits, small, 4, h, two, factors, dim, rows, sum);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                int32_t *out = dots + r * BLOCK_TOKENS + 32 * two + 8 * h;
                _mm256_storeu_si256((__m256i *)out, sum[r][0]);
                _mm256_storeu_si256((__m256i *)(out + 16), sum[r][1]);
            }
        }
    }
}

INLINE void add_scaled(float *out, __m256i sum, float step) {
    const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(step));
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), value));
}

/* The chunk of `groups` groups of 16 dims that begins at dim 64 * at. */
INLINE void values_of_chunk(const tqai_codec *codec, int bits, int small, levels table, const uint8_t *const *codes,
                            const uint8_t *const *next, int pages, const int16_t *factors, int32_t (*bias)[4],
                            const float *step, int rows, int at, int groups, float *acc) {
    const int dim = codec->head_dim;
    const int64_t start = (int64_t)LINE_BYTES * 16 * at * (bits == 4 ? 2 : 1), high = tqai_high_plane_at(dim) + LINE_BYTES * 8 * at;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const int h = i / 2, two = i % 2;
        __m256i sum[MAX_ROWS][2];
        set_sums(small, bias, groups, two, rows, sum);
        for (int page = 0; page < pages; page++) {
            const chunk c = {codes[page] + start, codes[page] + high, next[page] + start, 4 * groups};
            pass(table, &c, bits, small, groups, h, two, factors + TQAI_PAGE_TOKENS * page, BLOCK_TOKENS, rows, sum);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int k = 0; k < 2; k++) add_scaled(acc + r * dim + 64 * at + 16 * ((2 * two + k) % groups) + 8 * h, sum[r][k], step[r]);
    }
}

INLINE void values_of(const tqai_codec *codec, int bits, int small, const uint8_t *const *codes, const uint8_t *const *next,
                      int pages, const int16_t *w, const float *step, int rows, float *acc) {
    const levels table = level_table(codec, bits, small);
    int16_t factors[MAX_ROWS * BLOCK_TOKENS];
    int32_t bias[MAX_ROWS][4];
    for (int r = 0; r < rows; r++)
        order_pairs(w + r * BLOCK_TOKENS, TQAI_PAGE_TOKENS * pages, factors + r * BLOCK_TOKENS, bias[r]);
    for (int at = 0; at < (codec->head_dim + 63) / 64; at++) {
        const int groups = tqai_chunk_groups(codec->head_dim, 64 * at);
        if (groups == 4) values_of_chunk(codec, bits, small, table, codes, next, pages, factors, bias, step, rows, at, 4, acc);
        else if (groups == 2) values_of_chunk(codec, bits, small, table, codes, next, pages, factors, bias, step, rows, at, 2, acc);
        else values_of_chunk(codec, bits, small, table, codes, next, pages, factors, bias, step, rows, at, 1, acc);
    }
}

/* A function of its own for every number of bits and rows, of byte levels (small) or not, so that all of the above
 * unrolls. */
#define SPECIAL(bits, small, rows)                                                                                   \
    static __attribute__((noinline)) void keys_##bits##_##small##_##rows(                                            \
        const tqai_codec *c, const uint8_t *const *p, const uint8_t *const *next, int pages, const int16_t *q,       \
        int32_t *dots) {                                                                                             \
        keys_of(c, bits, small, p, next, pages, q, rows, dots);                                                      \
    }                                                                                                                \
    static __attribute__((noinline)) void values_##bits##_##small##_##rows(                                          \
        const tqai_codec *c, const uint8_t *const *p, const uint8_t *const *next, int pages, const int16_t *w,       \
        const float *step, float *acc) {                                                                             \
        values_of(c, bits, small, p, next, pages, w, step, rows, acc);                                               \
    }
#define ALL_ROWS(bits, small) SPECIAL(bits, small, 1) SPECIAL(bits, small, 2) SPECIAL(bits, small, 4)
ALL_ROWS(2, 0) ALL_ROWS(3, 0) ALL_ROWS(4, 0) ALL_ROWS(2, 1) ALL_ROWS(3, 1) ALL_ROWS(4, 1)

/* 32 of 128 bytes, `table[i]` ^ `table[i - 1]` of 16 each: a lookup gives 0 where its index is below 0. */
INLINE __m256i look_up128(const __m128i *table, __m256i index) {
    __m256i found = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        found = _mm256_xor_si256(found, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table[i]), index));
        index = _mm256_sub_epi8(index, _mm256_set1_epi8(16));
    }
    return found;
}

/* Levels of a side of 8-bit codes; they are symmetric, level[255 - i] = -level[i]. */
static void load_levels(const tqai_codec *codec, int is_value, const uint8_t *codes, int16_t *restrict level) {
    uint8_t bytes[2][128];
    __m128i table[2][8];
    (void)is_value;
    for (int i = 127; i >= 0; i--) {
        const uint16_t one = (uint16_t)codec->levels[128 + i], before = i < 16 ? 0 : (uint16_t)codec->levels[112 + i];
        bytes[0][i] = (uint8_t)(one ^ before);
        bytes[1][i] = (uint8_t)((one ^ before) >> 8);
    }
    for (int i = 0; i < 16; i++) table[i / 8][i % 8] = _mm_loadu_si128((const __m128i *)(bytes[i / 8] + 16 * (i % 8)));
    for (int line = 0; line < codec->head_dim; line++)
        for (int half = 0; half < 2; half++) {
            const __m256i code = _mm256_loadu_si256((const __m256i *)(codes + LINE_BYTES * line + 32 * half));
            const __m256i below = _mm256_cmpgt_epi8(code, _mm256_set1_epi8(-1)); /* codes under 128: negative */
            const __m256i index = _mm256_xor_si256(_mm256_and_si256(code, _mm256_set1_epi8(127)),
                                                   _mm256_and_si256(below, _mm256_set1_epi8(127)));
            const __m256i low = look_up128(table[0], index), high = look_up128(table[1], index);
            const __m256i high_byte = _mm256_set1_epi16((short)0xFF00);
            const __m256i a = _mm256_blendv_epi8(low, _mm256_slli_epi16(high, 8), high_byte);
            const __m256i b = _mm256_blendv_epi8(_mm256_srli_epi16(low, 8), high, high_byte);
            const __m256i sign_a = _mm256_srai_epi16(_mm256_slli_epi16(below, 8), 8), sign_b = _mm256_srai_epi16(below, 8);
            int16_t *out = level + 2 * line * UNIT + 16 * half;
            _mm256_store_si256((__m256i *)out, _mm256_sub_epi16(_mm256_xor_si256(a, sign_a), sign_a));
            _mm256_store_si256((__m256i *)(out + UNIT), _mm256_sub_epi16(_mm256_xor_si256(b, sign_b), sign_b));
        }
}

/* sum[r] [16 lanes] += over `count` units, `stride` apart: products with the pairs terms[r * row + 2 i]. */
INLINE void add_units(const int16_t *units, int stride, int count, const int16_t *terms, int row, int rows,
                      __m256i (*sum)[2]) {
    for (int i = 0; i < count; i++) {
        const __m256i a = _mm256_load_si256((const __m256i *)(units + i * stride));
        const __m256i b = _mm256_load_si256((const __m256i *)(units + i * stride + 16));
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const __m256i pair = pair_of(terms + r * row + 2 * i);
            add_to(&sum[r][0], _mm256_madd_epi16(a, pair));
            add_to(&sum[r][1], _mm256_madd_epi16(b, pair));
        }
    }
}

INLINE void keys_group(const int16_t *level, const int16_t *q, int rows, int dim, int group, int32_t *dots) {
    __m256i sum[MAX_ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    add_units(level + group * UNIT, 4 * UNIT, dim / 2, q, dim, rows, sum);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        __m256i *out = (__m256i *)(dots + r * BLOCK_TOKENS + 16 * group);
        _mm256_storeu_si256(out, sum[r][0]);
        _mm256_storeu_si256(out + 1, sum[r][1]);
    }
}

INLINE void values_column(const int16_t *units, int stride, const int16_t *w, int rows, int dim, int32_t *out) {
    __m256i sum[MAX_ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        sum[r][0] = _mm256_loadu_si256((const __m256i *)(out + r * dim));
        sum[r][1] = _mm256_loadu_si256((const __m256i *)(out + r * dim + 8));
    }
    add_units(units, stride, 32, w, BLOCK_TOKENS, rows, sum);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        _mm256_storeu_si256((__m256i *)(out + r * dim), sum[r][0]);
        _mm256_storeu_si256((__m256i *)(out + r * dim + 8), sum[r][1]);
    }
}

#include "trellis_avx2.inc.h"

#define KERNELS tqai_kernels_avx2
#define KERNELS_NAME "avx2"
#include "generic.inc.h"

#define BY_ROWS(name, bits, ...)                       \
    do {                                               \
        if (rows == 4) name##_##bits##_4(__VA_ARGS__); \
        else if (rows == 2) name##_##bits##_2(__VA_ARGS__); \
        else name##_##bits##_1(__VA_ARGS__);           \
    } while (0)
#define BY_BITS_OF(name, small, ...)                                    \
    do {                                                                \
        if (codec->bits == 2) BY_ROWS(name, 2_##small, __VA_ARGS__);    \
        else if (codec->bits == 3) BY_ROWS(name, 3_##small, __VA_ARGS__); \
        else BY_ROWS(name, 4_##small, __VA_ARGS__);                     \
    } while (0)
#define BY_BITS(name, ...)                                       \
    do {                                                         \
        if (codec->byte_levels) BY_BITS_OF(name, 1, __VA_ARGS__); \
        else BY_BITS_OF(name, 0, __VA_ARGS__);                   \
    } while (0)

static int in_registers(const tqai_codec *codec) { return codec->kind == TQAI_SCALAR && codec->bits <= 4; }

static void key_dots(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                     const int16_t *q, int rows, int fine, int32_t *dots) {
    if (codec->kind == TQAI_TRELLIS) BY_ROWS(keys, trellis, codec, codes, next, pages, q, dots);
    else if (!in_registers(codec)) key_dots_unpacked(codec, codes, next, pages, q, rows, fine, dots);
    else BY_BITS(keys, codec, codes, next, pages, q, dots);
}

static void value_sums(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                       const int16_t *w, const float *step, int rows, float *acc) {
    if (codec->kind == TQAI_TRELLIS) BY_ROWS(values, trellis, codec, codes, next, pages, w, step, acc);
    else if (!in_registers(codec)) value_sums_unpacked(codec, codes, next, pages, w, step, rows, acc);
    else BY_BITS(values, codec, codes, next, pages, w, step, acc);
}

#define KEY_DOTS key_dots
#define VALUE_SUMS value_sums
#include "table.inc.h"
