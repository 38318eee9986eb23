/* kernels_avx2.c: AVX2.
 *
 * Half a line (32 bytes, 16 words) at a time, two units at a time, one in each byte of the words:
 *
 *   4 bits   word | n3 n2 | n1 n0 |   & 0x0F0F ->   | n2 | n0 |   two byte shuffles: low and high bytes
 *                  high byte low byte                              of the level, then put together:
 *            unit 0 = hi(n0) lo(n0), unit 2 = hi(n2) lo(n2); after a shift by 4: units 1 and 3
 *   2 bits   likewise units s and s + 4 after a shift by 2 s; 3 bits add bit 2 from the high plane
 *
 * Levels go to a buffer in the first-level cache, then vpmaddwd adds the two terms of each lane.
 */
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "isa.h"
#include "layout.h"

#include "vec_avx2.h"
#include "convert.inc.h"
#include "rotate.inc.h"
#include "codes.inc.h"
#include "softmax.inc.h"
#include "exact.inc.h"

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    __m256i low, high; /* bytes of up to 16 levels, in both halves */
} levels;

INLINE levels level_table(const tqai_codec *codec) {
    uint8_t low[16], high[16];
    for (int i = 0; i < 16; i++) {
        const uint16_t level = (uint16_t)codec->levels[i & ((1 << codec->bits) - 1)];
        low[i] = (uint8_t)level;
        high[i] = (uint8_t)(level >> 8);
    }
    return (levels){_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)low)),
                    _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)high))};
}

/* Levels of the codes in the low and in the high bytes of `index`, to two units. */
INLINE void store_two(levels table, __m256i index, int16_t *of_low, int16_t *of_high) {
    const __m256i high_byte = _mm256_set1_epi16((short)0xFF00);
    const __m256i low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
    _mm256_store_si256((__m256i *)of_low, _mm256_blendv_epi8(low, _mm256_slli_epi16(high, 8), high_byte));
    _mm256_store_si256((__m256i *)of_high, _mm256_blendv_epi8(_mm256_srli_epi16(low, 8), high, high_byte));
}

static void load_levels(const tqai_codec *codec, const uint8_t *codes, int16_t *restrict level) {
    const int bits = codec->bits, per_line = bits == 3 ? 8 : 16 / bits, lines = 2 * codec->head_dim / per_line;
    const uint8_t *high = codes + tqai_high_plane_at(codec->head_dim);
    if (bits == 8) {
        for (int i = 0; i < 2 * lines * UNIT; i++)
            level[i / 2 % UNIT + (i / (2 * UNIT) * 2 + i % 2) * UNIT] = codec->levels[codes[i]];
        return;
    }
    const levels table = level_table(codec);
    for (int line = 0; line < lines; line++)
        for (int half = 0; half < 2; half++) {
            const __m256i word = _mm256_loadu_si256((const __m256i *)(codes + LINE_BYTES * line + 32 * half));
            int16_t *out = level + line * per_line * UNIT + 16 * half;
            if (bits == 4) {
                const __m256i keep = _mm256_set1_epi8(15);
                store_two(table, _mm256_and_si256(word, keep), out, out + 2 * UNIT);
                store_two(table, _mm256_and_si256(_mm256_srli_epi16(word, 4), keep), out + UNIT, out + 3 * UNIT);
                continue;
            }
            const __m256i keep = _mm256_set1_epi8(3), bit2 = _mm256_set1_epi8(4);
            __m256i top = _mm256_setzero_si256();
            if (bits == 3) { /* bits 0..3 to the low byte, 4..7 to the high byte, two places up */
                top = _mm256_loadu_si256((const __m256i *)(high + LINE_BYTES * (line / 2) + 32 * half));
                if (line % 2) top = _mm256_srli_epi16(top, 8);
                top = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(top, _mm256_set1_epi16(0x0F)), 2),
                                      _mm256_slli_epi16(_mm256_and_si256(top, _mm256_set1_epi16(0xF0)), 6));
            }
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++) {
                __m256i index = _mm256_and_si256(_mm256_srli_epi16(word, 2 * s), keep);
                if (bits == 3) index = _mm256_or_si256(index, _mm256_and_si256(_mm256_srli_epi16(top, s), bit2));
                store_two(table, index, out + s * UNIT, out + (s + 4) * UNIT);
            }
        }
}

INLINE __m256i pair_of(const int16_t *terms) {
    int32_t both;
    memcpy(&both, terms, sizeof both);
    return _mm256_set1_epi32(both);
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
            sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(a, pair));
            sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(b, pair));
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

#define KERNELS tqai_kernels_avx2
#define KERNELS_NAME "avx2"
#include "generic.inc.h"
#include "table.inc.h"
