/* kernels_avx512.c: AVX-512 with BW and VNNI.
 *
 * Levels of 2 to 4 bits that are bytes, and trellis codes, are products of bytes (bytes_avx512.inc.h). Other levels
 * have 16 bits; one quad is the four units that share one pair of terms, j and j + 2 of codes of 2 to 4 bits
 * (layout.h), j = 0 and 1 in turns:
 *
 *   64-byte line, 4 bits   word e = | unit 1, j 1 | unit 0, j 1 | unit 1, j 0 | unit 0, j 0 |
 *                                        >>12          >>8           >>4            .         shift
 *                          vpermw   16 levels, twice over: the lookup takes 5 bits of index, the code
 *                                   has 4, and the bit above it does not matter
 *                          vpdpwssd lane t += q[4p] * level(t, 4p) + q[4p+2] * level(t, 4p+2)
 *
 * 2 and 3 bits likewise, with the table repeated 8 and 4 times; 8 bits look up four times in 64 levels, and their
 * pairs are those of their units. The lookups run beside the products on other ports, so that unpacking is all but
 * free at four rows.
 */
#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include "isa.h"
#include "layout.h"

#include "vec_avx512.h"

static inline int with_vbmi(void) {
    return __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("gfni");
}

static inline int of_bytes(const tqai_codec *codec) {
    return codec->kind == TQAI_TRELLIS ? with_vbmi() : codec->kind == TQAI_SCALAR && codec->byte_levels != NULL;
}

#include "convert.inc.h"
#include "rotate.inc.h"
#include "codes.inc.h"
#include "softmax.inc.h"
#include "exact.inc.h"

#define INLINE static inline __attribute__((always_inline))

#define UNPACKED 16 /* "bits" of a side that a codec's own steps have unpacked to 16-bit levels (isa.h) */

typedef struct {
    __m512i part[8]; /* one table of 32 levels (2 to 4 bits) or eight of them (8 bits) */
} levels;

INLINE levels load_levels(const tqai_codec *codec, int bits) {
    levels out = {{_mm512_setzero_si512()}};
    int16_t level[32];
    if (bits == UNPACKED) return out;
    if (bits == 8) {
        for (int i = 0; i < 8; i++) out.part[i] = _mm512_loadu_si512(codec->levels + 32 * i);
    } else {
        for (int i = 0; i < 32; i++) level[i] = codec->levels[i % (1 << bits)];
        out.part[0] = _mm512_loadu_si512(level);
    }
    return out;
}

INLINE __m512i look_up8(const levels *table, __m512i index) {
    const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
    const __mmask32 top = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
    const __m512i a = _mm512_permutex2var_epi16(table->part[0], index, table->part[1]);
    const __m512i b = _mm512_permutex2var_epi16(table->part[2], index, table->part[3]);
    const __m512i c = _mm512_permutex2var_epi16(table->part[4], index, table->part[5]);
    const __m512i d = _mm512_permutex2var_epi16(table->part[6], index, table->part[7]);
    return _mm512_mask_blend_epi16(top, _mm512_mask_blend_epi16(upper, a, b), _mm512_mask_blend_epi16(upper, c, d));
}

/* Four quads, first .. first + 3: the levels of unit `unit` (0 to 15) after quad `first`, a multiple of 4. */
INLINE __m512i unit_levels(const levels *table, int bits, const uint8_t *codes, const uint8_t *high, int first,
                           int unit) {
    if (bits == UNPACKED) return _mm512_loadu_si512(codes + LINE_BYTES * (4 * first + unit));
    if (bits == 8) {
        const __m512i line = _mm512_loadu_si512(codes + LINE_BYTES * (2 * first + unit / 2));
        return look_up8(table, _mm512_srli_epi16(line, (unsigned)(unit % 2 * 8)));
    }
    /* of 64 codes; j is the pair of terms */
    const int per_line = bits == 4 ? 2 : 4, j = unit / 4 % 2, of_four = 4 * (unit / 8) + unit % 4;
    const __m512i line = _mm512_loadu_si512(codes + LINE_BYTES * ((2 * first + of_four) / per_line));
    __m512i index = _mm512_srli_epi16(line, (unsigned)(8 / per_line * (of_four % per_line) + 8 * j));
    if (bits == 3) {
        const __m512i top = _mm512_loadu_si512(high + LINE_BYTES * (first / 4));
        const int place = of_four + 8 * j;
        const __m512i bit = place >= 2 ? _mm512_srli_epi16(top, (unsigned)(place >= 2 ? place - 2 : 0))
                                       : _mm512_slli_epi16(top, (unsigned)(place >= 2 ? 0 : 2 - place));
        index = _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), index, bit, 0xCA); /* low 2 bits | bit 2 */
    }
    return _mm512_permutexvar_epi16(index, table->part[0]);
}

/* Where the factors of a pair of terms lie: quad `quad`, the p'th of its `pairs`. */
INLINE int pair_at(int bits, int quad, int pairs, int p) {
    return bits < 8 ? 4 * (quad / 2 * pairs + p) + 2 * (quad % 2) : 2 * (quad * pairs + p);
}

/* Factors [rows][from_row] with those of four terms in the order 0, 2, 1, 3, where codes have less than 8 bits. */
INLINE const int16_t *in_pairs(int bits, const int16_t *from, int from_row, int count, int rows, int16_t *to) {
    if (bits >= 8) return from;
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < count; i += 4) {
            const int16_t *four = from + r * from_row + i;
            int16_t *out = to + r * from_row + i;
            out[0] = four[0];
            out[1] = four[2];
            out[2] = four[1];
            out[3] = four[3];
        }
    return to;
}

/* The lines of four quads, first .. , into the second-level cache. */
INLINE void prefetch_quads(const tqai_codec *codec, const uint8_t *codes, int bits, int first) {
    const int lines = bits == 3 ? 2 : bits; /* of four quads */
    if (bits == UNPACKED) return;
    for (int i = 0; i < lines; i++) _mm_prefetch((const char *)(codes + LINE_BYTES * (first * lines / 4 + i)), _MM_HINT_T1);
    if (bits == 3) _mm_prefetch((const char *)(codes + tqai_high_plane_at(codec->head_dim) + LINE_BYTES * (first / 4)), _MM_HINT_T1);
}

INLINE __m512i pair_of(const int16_t *terms) {
    int32_t both;
    memcpy(&both, terms, sizeof both);
    return _mm512_set1_epi32(both);
}

INLINE void key_dots_of(const tqai_codec *codec, int bits, const uint8_t *codes, const uint8_t *next,
                        const int16_t *q, int rows, int32_t *dots) {
    const int dim = codec->head_dim;
    const uint8_t *high = codes + tqai_high_plane_at(dim);
    const levels table = load_levels(codec, bits);
    int16_t ordered[MAX_ROWS * TQAI_MAX_HEAD_DIM];
    q = in_pairs(bits, q, dim, dim, rows, ordered);
    __m512i sum[MAX_ROWS][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++) sum[r][g] = _mm512_setzero_si512();
    for (int first = 0; first < dim / 2; first += 4) {
        prefetch_quads(codec, next, bits, first);
#pragma GCC unroll 4
        for (int s = 0; s < 4; s++) {
            __m512i level[4];
#pragma GCC unroll 4
            for (int g = 0; g < 4; g++) level[g] = unit_levels(&table, bits, codes, high, first, 4 * s + g);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const __m512i pair = pair_of(q + r * dim + pair_at(bits, first + s, 1, 0));
#pragma GCC unroll 4
                for (int g = 0; g < 4; g++) sum[r][g] = _mm512_dpwssd_epi32(sum[r][g], level[g], pair);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int g = 0; g < 4; g++) _mm512_storeu_si512(dots + r * BLOCK_TOKENS + 16 * g, sum[r][g]);
}

/* One chunk of `groups` (1, 2 or 4) groups of 16 dims; a quad holds 4 / groups pairs of tokens. */
INLINE void value_chunk(const tqai_codec *codec, int bits, const levels *table, const uint8_t *const *codes,
                        const uint8_t *const *next, int pages, const int16_t *w, const float *step, int rows,
                        int chunk, int groups, float *acc) {
    const int dim = codec->head_dim, pairs = 4 / groups;
    __m512i sum[MAX_ROWS][4];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) sum[r][g] = _mm512_setzero_si512();
    for (int page = 0; page < pages; page++) {
        const uint8_t *high = codes[page] + tqai_high_plane_at(dim);
        const int16_t *weight = w + TQAI_PAGE_TOKENS * page;
        for (int quad = 0; quad < 32 / pairs; quad += 4) {
            prefetch_quads(codec, next[page], bits, 32 * chunk + quad);
#pragma GCC unroll 4
            for (int s = 0; s < 4; s++) {
                __m512i level[4];
#pragma GCC unroll 4
                for (int u = 0; u < 4; u++)
                    level[u] = unit_levels(table, bits, codes[page], high, 32 * chunk + quad, 4 * s + u);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                    for (int p = 0; p < pairs; p++) {
                        const __m512i pair = pair_of(weight + r * BLOCK_TOKENS + pair_at(bits, quad + s, pairs, p));
#pragma GCC unroll 4
                        for (int g = 0; g < groups; g++)
                            sum[r][g] = _mm512_dpwssd_epi32(sum[r][g], level[p * groups + g], pair);
                    }
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int g = 0; g < groups; g++) {
            float *out = acc + r * dim + 64 * chunk + 16 * g;
            const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][g]), _mm512_set1_ps(step[r]));
            _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), value));
        }
}

INLINE void value_sums_of(const tqai_codec *codec, int bits, const uint8_t *const *codes, const uint8_t *const *next,
                          int pages, const int16_t *w, const float *step, int rows, float *acc) {
    const levels table = load_levels(codec, bits);
    int16_t ordered[MAX_ROWS * BLOCK_TOKENS];
    w = in_pairs(bits, w, BLOCK_TOKENS, TQAI_PAGE_TOKENS * pages, rows, ordered);
    for (int chunk = 0; chunk < (codec->head_dim + 63) / 64; chunk++) {
        const int groups = tqai_chunk_groups(codec->head_dim, 64 * chunk);
        if (groups == 4) value_chunk(codec, bits, &table, codes, next, pages, w, step, rows, chunk, 4, acc);
        else if (groups == 2) value_chunk(codec, bits, &table, codes, next, pages, w, step, rows, chunk, 2, acc);
        else value_chunk(codec, bits, &table, codes, next, pages, w, step, rows, chunk, 1, acc);
    }
}

/* A function of its own for every number of bits and rows, so that all of the above unrolls. */
#define SPECIAL(bits, rows)                                                                                     \
    static __attribute__((noinline)) void keys_##bits##_##rows(const tqai_codec *c, const uint8_t *codes,       \
                                                               const uint8_t *next, const int16_t *q,           \
                                                               int32_t *dots) {                                 \
        key_dots_of(c, bits, codes, next, q, rows, dots);                                                           \
    }                                                                                                           \
    static __attribute__((noinline)) void values_##bits##_##rows(const tqai_codec *c, const uint8_t *const *p,  \
                                                                 const uint8_t *const *next, int pages,         \
                                                                 const int16_t *w, const float *step, float *acc) { \
        value_sums_of(c, bits, p, next, pages, w, step, rows, acc);                                             \
    }
#define ALL_ROWS(bits) SPECIAL(bits, 1) SPECIAL(bits, 2) SPECIAL(bits, 4)
ALL_ROWS(2) ALL_ROWS(3) ALL_ROWS(4) ALL_ROWS(8) ALL_ROWS(16)

#include "bytes_avx512.inc.h"
#include "plain_avx512.inc.h"
#include "trellis_avx512.inc.h"

#define BY_ROWS(name, bits, ...)                       \
    do {                                               \
        if (rows == 4) name##_##bits##_4(__VA_ARGS__); \
        else if (rows == 2) name##_##bits##_2(__VA_ARGS__); \
        else name##_##bits##_1(__VA_ARGS__);           \
    } while (0)
#define BY_BITS(name, bits, ...)                        \
    switch (bits) {                                     \
        case 2: BY_ROWS(name, 2, __VA_ARGS__); break;   \
        case 3: BY_ROWS(name, 3, __VA_ARGS__); break;   \
        case 4: BY_ROWS(name, 4, __VA_ARGS__); break;   \
        default: BY_ROWS(name, 8, __VA_ARGS__); break;  \
    }

#define BY_BYTES(name, ...)                                                  \
    do {                                                                     \
        if (codec->bits == 2) BY_ROWS(name, bytes_2, __VA_ARGS__);           \
        else if (codec->bits == 3) BY_ROWS(name, bytes_3, __VA_ARGS__);      \
        else BY_ROWS(name, bytes_4, __VA_ARGS__);                            \
    } while (0)

#define KERNELS tqai_kernels_avx512
#define KERNELS_NAME "avx512"

static void prefetch_side(const tqai_codec *codec, const uint8_t *codes) {
    for (int i = 0; i < 8 * codec->head_dim * codec->bits; i += LINE_BYTES) _mm_prefetch((const char *)codes + i, _MM_HINT_T1);
}

static void split_queries(const tqai_codec *codec, const int16_t *q, int rows, tqai_query_bytes *to) {
    if (rows == 4) split_keys(q, codec->head_dim, 4, to->bytes, to->bias);
    else if (rows == 2) split_keys(q, codec->head_dim, 2, to->bytes, to->bias);
    else split_keys(q, codec->head_dim, 1, to->bytes, to->bias);
}

static void key_dots(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                     const int16_t *q, int rows, int32_t *dots) {
    if (codec->kind == TQAI_TRELLIS) {
        BY_TRELLIS(keys, codec, codes, next, pages, q, dots);
        return;
    }
    for (int page = 0; page < pages; page++, dots += TQAI_PAGE_TOKENS) {
        if (codec->kind == TQAI_SCALAR) {
            BY_BITS(keys, codec->bits, codec, codes[page], next[page], q, dots)
        } else {
            _Alignas(64) int16_t level[2 * TQAI_MAX_HEAD_DIM * UNIT];
            KERNELS.steps[codec->kind]->unpack(codec, 0, codes[page], level);
            prefetch_side(codec, next[page]);
            BY_ROWS(keys, 16, codec, (const uint8_t *)level, (const uint8_t *)level, q, dots);
        }
    }
}

static void key_logits(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                       const int16_t *q, const tqai_query_bytes *bytes, int rows, int fine, const float *key_scale,
                       float *logit, float *largest) {
    if (codec->kind == TQAI_SCALAR && of_bytes(codec) && !fine) {
        BY_BYTES(keys, codec, codes, next, pages, bytes, key_scale, logit, largest);
    } else if (codec->kind == TQAI_TRELLIS && !of_bytes(codec)) {
        tqai_kernels_avx2.key_logits(codec, codes, next, pages, q, bytes, rows, 0, key_scale, logit, largest);
    } else {
        _Alignas(64) int32_t dots[MAX_ROWS * BLOCK_TOKENS];
        key_dots(codec, codes, next, pages, q, rows, dots);
        to_logits(dots, key_scale, TQAI_PAGE_TOKENS * pages, rows, logit, largest);
    }
}

static void value_sums(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                       const int16_t *w, const float *step, int rows, float *acc) {
    float finer[MAX_ROWS];
    if (of_bytes(codec)) {
        if (bytes_suffice(w, TQAI_PAGE_TOKENS * pages, rows)) {
            if (codec->kind == TQAI_TRELLIS) {
                BY_TRELLIS(values, codec, codes, next, pages, w, step, acc);
                return;
            }
            int8_t bytes[BYTE_ROWS(MAX_ROWS) * BLOCK_TOKENS];
            split_rows(w, BLOCK_TOKENS, TQAI_PAGE_TOKENS * pages, rows, 0, bytes, BLOCK_TOKENS);
            BY_BYTES(values, codec, codes, next, pages, bytes, step, acc);
            return;
        }
        for (int r = 0; r < rows; r++) finer[r] = step[r] * (1.0f / FACTOR_PARTS);
        step = finer;
    }
    if (codec->kind == TQAI_TRELLIS) {
        tqai_kernels_avx2.value_sums(codec, codes, next, pages, w, step, rows, acc);
        return;
    }
    if (codec->kind != TQAI_SCALAR) {
        _Alignas(64) int16_t level[2 * TQAI_MAX_HEAD_DIM * UNIT];
        const uint8_t *const unpacked = (const uint8_t *)level;
        for (int page = 0; page < pages; page++) {
            KERNELS.steps[codec->kind]->unpack(codec, 1, codes[page], level);
            prefetch_side(codec, next[page]);
            BY_ROWS(values, 16, codec, &unpacked, &unpacked, 1, w + TQAI_PAGE_TOKENS * page, step, acc);
        }
        return;
    }
    BY_BITS(values, codec->bits, codec, codes, next, pages, w, step, acc)
}

static void range_of_bits(const float *x, int n, uint32_t *least, uint32_t *most);

/* values_block where nothing is hidden, if it serves the block; else 0. */
static int plain_block(const float *logit, const float *largest, uint32_t key_most, const float *factor, const float *scale,
                       const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next, int pages, int rows,
                       row_state *state, float *acc) {
    if (codec->kind != TQAI_SCALAR || !of_bytes(codec)) return 0;
    uint32_t least, most;
    range_of_bits(scale, TQAI_PAGE_TOKENS * pages, &least, &most);
    /* keys: no NaN, nothing infinite, so none among the logits; values: far from the ends of floats, too */
    if (key_most > float_to_bits(0x1p80f) || least < float_to_bits(0x1p-80f) || most > float_to_bits(0x1p80f)) return 0;
    if (bits_to_float(most) > PLAIN_SPREAD * bits_to_float(least)) return 0;
    _Alignas(64) int8_t bytes[BYTE_ROWS(MAX_ROWS) * BLOCK_TOKENS];
    float step[MAX_ROWS];
    const int done = rows == 4   ? plain_weights_4(logit, largest, factor, scale, least, most, codec, pages, state, acc, bytes, step)
                     : rows == 2 ? plain_weights_2(logit, largest, factor, scale, least, most, codec, pages, state, acc, bytes, step)
                                 : plain_weights_1(logit, largest, factor, scale, least, most, codec, pages, state, acc, bytes, step);
    if (done) BY_BYTES(values, codec, codes, next, pages, bytes, step, acc);
    return done;
}

#define PLAIN_BLOCK plain_block
#define SPLIT_QUERIES split_queries
#define KEY_LOGITS key_logits
#define VALUE_SUMS value_sums
#include "table.inc.h"
