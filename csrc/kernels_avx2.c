/* kernels_avx2.c: AVX2.
 *
 * Half a line (32 bytes) holds 8 lanes of several units. A pass takes one or two of the units through all lines
 * of a side, unpacks them in registers and adds products to sums that stay in registers:
 *
 *   2 bits   byte e = 4 t + j        >> 2 s, & 3: unit s. Two byte shuffles look up the low and the high bytes
 *                                    of 32 levels, two byte unpacks put them together
 *   4 bits   word | n3 n2 | n1 n0 |  >> 4 s, & 0x0F0F: units s and s + 2, one in each byte of the words; two byte
 *                                    shuffles, then shifts and blends part the units
 *   3 bits   likewise >> 2 s, & 0x0303, bit 2 from the high plane: units s and s + 4
 *
 * vpmaddwd adds the products of two terms into a lane. 8-bit codes, and codecs with steps of their own, are
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

typedef struct {
    __m256i low, high; /* bytes of up to 16 levels, in both halves */
} levels;

/* The table of 4, 8 or 16 levels, repeated, as low and high bytes. */
INLINE levels level_table(const tqai_codec *codec, int bits) {
    const __m128i *from = (const __m128i *)codec->levels;
    const __m128i a = bits == 2 ? _mm_set1_epi64x(_mm_cvtsi128_si64(_mm_loadl_epi64(from))) : _mm_loadu_si128(from);
    const __m128i b = bits == 4 ? _mm_loadu_si128(from + 1) : a, low_byte = _mm_set1_epi16(0xFF);
    const __m128i low = _mm_packus_epi16(_mm_and_si128(a, low_byte), _mm_and_si128(b, low_byte));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
    return (levels){_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)};
}

/* What a pass reads: `lines` lines, a multiple of 4, of 4 (2 and 4 bits) or 8 (3 bits) units. */
typedef struct {
    const uint8_t *codes, *high, *next; /* high: plane of high bits; next: prefetched from */
    int lines;
} chunk;

/* Each of `passes` passes (a power of two) prefetches some of the lines. */
INLINE void prefetch_line(const chunk *c, int bits, int line, int passes, int pass) {
    if (line % 4 != pass % 4 || (passes == 8 && line % 8 != pass)) return;
    _mm_prefetch((const char *)c->next + LINE_BYTES * line, _MM_HINT_T1);
    if (bits == 3) _mm_prefetch((const char *)c->next + (c->high - c->codes) + LINE_BYTES * (line / 2), _MM_HINT_T1);
}

/* *sum += x, in the order in which it is written: the compiler would add up several lines first, and has not
 * registers enough for that. */
INLINE void add_to(__m256i *sum, __m256i x) {
    *sum = _mm256_add_epi32(*sum, x);
    __asm__("" : "+x"(*sum));
}

/* sum[r][0], sum[r][1] += products of the levels of unit s, 4 lanes of two partial sums each. */
INLINE void pass_of_bytes(levels table, const chunk *c, int groups, int half, int s, const int16_t *terms, int row,
                          int rows, __m256i (*sum)[2]) {
    for (int line4 = 0; line4 < c->lines; line4 += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const int line = line4 + i;
            const __m256i word = _mm256_loadu_si256((const __m256i *)(c->codes + LINE_BYTES * line + 32 * half));
            const __m256i index = _mm256_and_si256(_mm256_srli_epi16(word, 2 * s), _mm256_set1_epi8(3));
            const __m256i low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
            const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
            const int16_t *quad = terms + 4 * (line * (4 / groups) + s / groups);
            prefetch_line(c, 2, line, 8, 4 * half + s);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                int64_t four;
                memcpy(&four, quad + r * row, sizeof four);
                const __m256i factor = _mm256_set1_epi64x(four);
                add_to(&sum[r][0], _mm256_madd_epi16(a, factor));
                add_to(&sum[r][1], _mm256_madd_epi16(b, factor));
            }
        }
    }
}

INLINE __m256i pair_of(const int16_t *terms) {
    int32_t both;
    memcpy(&both, terms, sizeof both);
    return _mm256_set1_epi32(both);
}

/* sum[r][0] += products of unit s, sum[r][1] += those of unit s + 2 (4 bits) or s + 4 (3 bits); 8 lanes. */
INLINE void pass_of_words(levels table, const chunk *c, int bits, int groups, int half, int s, const int16_t *terms,
                          int row, int rows, __m256i (*sum)[2]) {
    const int units = bits == 4 ? 4 : 8, passes = bits == 4 ? 4 : 8;
    for (int line4 = 0; line4 < c->lines; line4 += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const int line = line4 + i;
            /* even bytes before odd ones, which the unpacks below put apart */
            const __m256i order = _mm256_broadcastsi128_si256(_mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0));
            const __m256i line_bytes = _mm256_loadu_si256((const __m256i *)(c->codes + LINE_BYTES * line + 32 * half));
            const __m256i word = bits == 4 ? _mm256_shuffle_epi8(line_bytes, order) : line_bytes;
            __m256i index = _mm256_srli_epi16(word, (bits == 4 ? 4 : 2) * s);
            if (bits == 4) {
                index = _mm256_and_si256(index, _mm256_set1_epi8(15));
            } else { /* bits 0..3 of the high plane belong to the low byte, 4..7 to the high byte, two places up */
                const __m256i *plane = (const __m256i *)(c->high + LINE_BYTES * (line / 2) + 32 * half);
                const __m256i top = _mm256_srli_epi16(_mm256_loadu_si256(plane), 8 * (i % 2) + s);
                const __m256i bit = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(top, _mm256_set1_epi16(1)), 2),
                                                    _mm256_slli_epi16(_mm256_and_si256(top, _mm256_set1_epi16(16)), 6));
                index = _mm256_or_si256(_mm256_and_si256(index, _mm256_set1_epi8(3)), bit);
            }
            const __m256i low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
            __m256i a, b;
            if (bits == 4) {
                a = _mm256_unpacklo_epi8(low, high);
                b = _mm256_unpackhi_epi8(low, high);
            } else {
                const __m256i low_byte = _mm256_set1_epi16(0xFF);
                a = _mm256_or_si256(_mm256_and_si256(low, low_byte), _mm256_slli_epi16(high, 8));
                b = _mm256_or_si256(_mm256_andnot_si256(low_byte, high), _mm256_srli_epi16(low, 8));
            }
            const int16_t *one = terms + 2 * (line * (units / groups) + s / groups), *two = one;
            if (units / 2 >= groups) two = terms + 2 * (line * (units / groups) + (s + units / 2) / groups);
            prefetch_line(c, bits, line, passes, passes / 2 * half + s);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const __m256i factor = pair_of(one + r * row);
                add_to(&sum[r][0], _mm256_madd_epi16(a, factor));
                add_to(&sum[r][1], _mm256_madd_epi16(b, two == one ? factor : pair_of(two + r * row)));
            }
        }
    }
}

INLINE int passes_of(int bits) { return bits == 4 ? 2 : 4; } /* over each half of the lines */

INLINE void clear_sums(int rows, __m256i (*sum)[2]) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
}

INLINE void keys_of(const tqai_codec *codec, int bits, const uint8_t *codes, const uint8_t *next, const int16_t *q,
                    int rows, int32_t *dots) {
    const int dim = codec->head_dim, passes = passes_of(bits);
    const levels table = level_table(codec, bits);
    const chunk c = {codes, codes + tqai_high_plane_at(dim), next, bits == 3 ? dim / 4 : dim * bits / 8};
#pragma GCC unroll 8
    for (int pass = 0; pass < 2 * passes; pass++) {
        const int half = pass / passes, s = pass % passes;
        __m256i sum[MAX_ROWS][2];
        clear_sums(rows, sum);
        if (bits == 2) pass_of_bytes(table, &c, 4, half, s, q, dim, rows, sum);
        else pass_of_words(table, &c, bits, 4, half, s, q, dim, rows, sum);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            int32_t *out = dots + r * BLOCK_TOKENS + 16 * s + 8 * half;
            if (bits == 4) {
                _mm256_storeu_si256((__m256i *)out, sum[r][0]);
                _mm256_storeu_si256((__m256i *)(out + 32), sum[r][1]);
            } else {
                _mm256_storeu_si256((__m256i *)out, bits == 2 ? _mm256_hadd_epi32(sum[r][0], sum[r][1])
                                                              : _mm256_add_epi32(sum[r][0], sum[r][1]));
            }
        }
    }
}

INLINE void add_scaled(float *out, __m256i sum, float step) {
    const __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(step));
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), value));
}

INLINE void values_of_chunk(const tqai_codec *codec, int bits, levels table, const uint8_t *const *codes,
                            const uint8_t *const *next, int pages, const int16_t *w, const float *step, int rows,
                            int at, int groups, float *acc) {
    const int dim = codec->head_dim, passes = passes_of(bits), lines = bits == 3 ? 4 * groups : 2 * bits * groups;
    const int64_t start = bits == 3 ? 1024 * at : 512 * bits * at, high = tqai_high_plane_at(dim) + 512 * at;
#pragma GCC unroll 8
    for (int pass = 0; pass < 2 * passes; pass++) {
        const int half = pass / passes, s = pass % passes;
        __m256i sum[MAX_ROWS][2];
        clear_sums(rows, sum);
        for (int page = 0; page < pages; page++) {
            const chunk c = {codes[page] + start, codes[page] + high, next[page] + start, lines};
            const int16_t *weight = w + TQAI_PAGE_TOKENS * page;
            if (bits == 2) pass_of_bytes(table, &c, groups, half, s, weight, BLOCK_TOKENS, rows, sum);
            else pass_of_words(table, &c, bits, groups, half, s, weight, BLOCK_TOKENS, rows, sum);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            float *out = acc + r * dim + 64 * at + 16 * (s % groups) + 8 * half;
            if (bits == 4 && groups == 4) {
                add_scaled(out, sum[r][0], step[r]);
                add_scaled(out + 32, sum[r][1], step[r]);
            } else {
                add_scaled(out, bits == 2 ? _mm256_hadd_epi32(sum[r][0], sum[r][1]) : _mm256_add_epi32(sum[r][0], sum[r][1]), step[r]);
            }
        }
    }
}

INLINE void values_of(const tqai_codec *codec, int bits, const uint8_t *const *codes, const uint8_t *const *next,
                      int pages, const int16_t *w, const float *step, int rows, float *acc) {
    const levels table = level_table(codec, bits);
    for (int at = 0; at < (codec->head_dim + 63) / 64; at++) {
        const int groups = tqai_chunk_groups(codec->head_dim, 64 * at);
        if (groups == 4) values_of_chunk(codec, bits, table, codes, next, pages, w, step, rows, at, 4, acc);
        else if (groups == 2) values_of_chunk(codec, bits, table, codes, next, pages, w, step, rows, at, 2, acc);
        else values_of_chunk(codec, bits, table, codes, next, pages, w, step, rows, at, 1, acc);
    }
}

/* A function of its own for every number of bits and rows, so that all of the above unrolls. */
#define SPECIAL(bits, rows)                                                                                          \
    static __attribute__((noinline)) void keys_##bits##_##rows(const tqai_codec *c, const uint8_t *codes,           \
                                                               const uint8_t *next, const int16_t *q, int32_t *d) { \
        keys_of(c, bits, codes, next, q, rows, d);                                                                  \
    }                                                                                                               \
    static __attribute__((noinline)) void values_##bits##_##rows(                                                   \
        const tqai_codec *c, const uint8_t *const *codes, const uint8_t *const *next, int pages, const int16_t *w,  \
        const float *step, float *acc) {                                                                            \
        values_of(c, bits, codes, next, pages, w, step, rows, acc);                                                 \
    }
#define ALL_ROWS(bits) SPECIAL(bits, 1) SPECIAL(bits, 2) SPECIAL(bits, 4)
ALL_ROWS(2) ALL_ROWS(3) ALL_ROWS(4)

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
#define BY_BITS(name, ...)                             \
    do {                                               \
        if (codec->bits == 2) BY_ROWS(name, 2, __VA_ARGS__); \
        else if (codec->bits == 3) BY_ROWS(name, 3, __VA_ARGS__); \
        else BY_ROWS(name, 4, __VA_ARGS__);            \
    } while (0)

static int in_registers(const tqai_codec *codec) { return codec->kind == TQAI_SCALAR && codec->bits <= 4; }

static void key_dots(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                     const int16_t *q, int rows, int32_t *dots) {
    if (codec->kind == TQAI_TRELLIS) BY_ROWS(keys, trellis, codec, codes, next, pages, q, dots);
    else if (!in_registers(codec)) key_dots_unpacked(codec, codes, next, pages, q, rows, dots);
    else
        for (int page = 0; page < pages; page++)
            BY_BITS(keys, codec, codes[page], next[page], q, dots + TQAI_PAGE_TOKENS * page);
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
