/* trellis_avx512.inc.h: the integer sums of trellis codes with VBMI, VBMI2 and GFNI, as products of bytes
 * (bytes_avx512.inc.h has the factors), 64 to an instruction; no level is ever written to memory. Without these
 * (Intel before Ice Lake) the kernels of AVX2 serve.
 *
 * One instruction (vgf2p8affineqb) takes 64 bytes through a linear map over GF(2), one to three of them make the
 * indices m of 64 coordinates, and one (vpermb, vpermi2b) reads their levels from a table in registers. Maps and
 * products have the same two ports, so of 2 and 4 bits one byte of a window enters the index as it stands (trellis.h),
 * and one map is enough:
 *
 *   keys      2 and 4 bits: bytes of four places k .. k + 3 of 64 tokens are interleaved within 128-bit lanes to
 *             four units of 32-bit lanes (trellis.h says why tokens lie as they do), each makes levels of every second
 *             or fourth coordinate. 1 and 3 bits: bytes k, k + 1 (k + 2) of 64 tokens, for each of four coordinates,
 *             and their levels are interleaved
 *   values    2 and 4 bits (2 bits with one or two rows): coordinate u of 8 places of 8 tokens at once. Else bytes of
 *             8 tokens for each of 8 coordinates, picked from the 8 tokens' row by vpermq: qword u = coordinate
 *             8 a + u, byte v = token v. The two 32-bit lanes of a qword are added in the end
 *
 * The units of keys are those of layout.h. Keys are levels + 128, values are signed.
 */
#include "trellis.h"

#define WITH_VBMI __attribute__((target("avx512vbmi,avx512vbmi2,gfni")))
#define EVEN_LANES _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD_LANES _mm512_add_epi32(EVEN_LANES, _mm512_set1_epi32(1))
#define VBMI_INLINE static inline __attribute__((always_inline, target("avx512vbmi,avx512vbmi2,gfni")))

typedef struct {
    __m512i low, high; /* 128 levels; of 64 only the low ones */
} level_bytes;

VBMI_INLINE level_bytes load_level_bytes(const int8_t *levels, int offset) {
    const __m512i add = _mm512_set1_epi8((char)offset);
    return (level_bytes){_mm512_add_epi8(_mm512_loadu_si512(levels), add),
                         _mm512_add_epi8(_mm512_loadu_si512(levels + 64), add)};
}

VBMI_INLINE __m512i look_up_bytes(const level_bytes *table, const int bits, __m512i index) {
    if (TQAI_TRELLIS_INDEX_BITS(bits) == 7) return _mm512_permutex2var_epi8(table->low, index, table->high);
    return _mm512_permutexvar_epi8(index, table->low);
}

/* Tables and maps of the coordinates of a place of 2 and 4 bits, each in a basis of its own (trellis.h). */
typedef struct {
    level_bytes levels[4];
    __m512i map[4];
} place_tables;

VBMI_INLINE place_tables load_place_tables(const tqai_trellis *t, const int bits, int offset) {
    place_tables p;
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) {
        if (u >= 8 / bits) continue;
        p.levels[u] = load_level_bytes(t->place_levels + 128 * u, offset);
        p.map[u] = _mm512_set1_epi64((long long)t->place_maps[u]);
    }
    return p;
}

/* x ^ (y & mask) */
VBMI_INLINE __m512i add_masked(__m512i x, __m512i y, int mask) {
    return _mm512_ternarylogic_epi64(x, y, _mm512_set1_epi8((char)mask), 0x78);
}

/* Levels of coordinate u of a place, from its byte and the next. */
VBMI_INLINE __m512i levels_of_place(const place_tables *p, const int bits, const int state_bits, const int u, __m512i one,
                                    __m512i two) {
    const int direct = tqai_trellis_direct_bits(bits, state_bits, u), before = tqai_trellis_before(bits, state_bits, u);
    __m512i index = _mm512_gf2p8affine_epi64_epi8(before ? two : one, p->map[u], 0);
    if (direct) index = add_masked(index, before ? _mm512_srli_epi16(one, (unsigned)(bits * u)) : two, (1 << direct) - 1);
    return look_up_bytes(&p->levels[u], bits, index);
}

/* Units 4 p .. 4 p + 3 of coordinates 4 p .. 4 p + 3 (p odd: those of the upper four of eight). */
VBMI_INLINE void key_units(const tqai_trellis *t, const level_bytes *table, const int bits, const int state_bits, int upper,
                           const __m512i *line, __m512i *unit) {
    __m512i of[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const int u = 4 * upper + j, k = bits * u / 8;
        const uint64_t *map = t->matrices + 3 * u;
        __m512i index = _mm512_gf2p8affine_epi64_epi8(line[k], _mm512_set1_epi64((long long)map[0]), 0);
#pragma GCC unroll 2
        for (int more = 1; 8 * more < bits * u % 8 + bits + state_bits; more++) /* the window's further bytes */
            index = _mm512_xor_si512(
                index, _mm512_gf2p8affine_epi64_epi8(line[k + more], _mm512_set1_epi64((long long)map[more]), 0));
        of[j] = look_up_bytes(table, bits, index);
    }
    const __m512i low01 = _mm512_unpacklo_epi8(of[0], of[1]), high01 = _mm512_unpackhi_epi8(of[0], of[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(of[2], of[3]), high23 = _mm512_unpackhi_epi8(of[2], of[3]);
    unit[0] = _mm512_unpacklo_epi16(low01, low23);
    unit[1] = _mm512_unpackhi_epi16(low01, low23);
    unit[2] = _mm512_unpacklo_epi16(high01, high23);
    unit[3] = _mm512_unpackhi_epi16(high01, high23);
}

/* Bytes of four places of 32 tokens: | token: place 0 .. 3 |, units 2 half and 2 half + 1. */
VBMI_INLINE void key_words(const uint8_t *in, const int half, __m512i *word) {
    __m512i line[4], pair[2];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) line[k] = _mm512_loadu_si512(in + 64 * k);
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        pair[i] = half ? _mm512_unpackhi_epi8(line[2 * i], line[2 * i + 1]) : _mm512_unpacklo_epi8(line[2 * i], line[2 * i + 1]);
    word[0] = _mm512_unpacklo_epi16(pair[0], pair[1]);
    word[1] = _mm512_unpackhi_epi16(pair[0], pair[1]);
}

/* Dots of a page of 2 and 4 bits: bytes are interleaved, and not levels, of which a byte makes 2 or 4. Byte i of
 * `bytes` 4 (coordinates * j + u): of dim coordinates * (4 j + i) + u. */
VBMI_INLINE void trellis_key_places(const tqai_codec *codec, const place_tables *tables, const int bits, const int state_bits,
                                    const uint8_t *in, const uint8_t *ahead, const int8_t *bytes, const int32_t *bias,
                                    const int rows, int32_t *dots) {
    const int dim = codec->head_dim, words = tqai_trellis_row_bytes(codec) / 4, coordinates = 8 / bits;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        __m512i sum[BYTE_ROWS(MAX_ROWS)][2], next[2];
#pragma GCC unroll 6
        for (int b = 0; b < BYTE_ROWS(rows); b++) sum[b][0] = sum[b][1] = _mm512_set1_epi32(bias[b]);
        key_words(in, half, next);
        for (int j = 0; j < words; j++) {
            const __m512i one[2] = {next[0], next[1]};
            key_words(in + (j + 1 < words ? 256 * (j + 1) : 0), half, next);
            const __m512i two[2] = {_mm512_shrdi_epi32(one[0], next[0], 8), _mm512_shrdi_epi32(one[1], next[1], 8)};
            _mm_prefetch((const char *)ahead + 256 * j + 128 * half, _MM_HINT_T1);
            _mm_prefetch((const char *)ahead + 256 * j + 128 * half + 64, _MM_HINT_T1);
#pragma GCC unroll 4
            for (int u = 0; u < coordinates; u++) {
                const __m512i a = levels_of_place(tables, bits, state_bits, u, one[0], two[0]);
                const __m512i b = levels_of_place(tables, bits, state_bits, u, one[1], two[1]);
#pragma GCC unroll 6
                for (int r = 0; r < BYTE_ROWS(rows); r++) {
                    const __m512i factor = four_of(bytes + r * dim + 4 * (coordinates * j + u));
                    sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], a, factor);
                    sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], b, factor);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int g = 0; g < 2; g++)
                store_dots(sum[r][g], sum[rows + r / 2][g], r % 2, dots + r * BLOCK_TOKENS + 32 * half + 16 * g);
    }
}

VBMI_INLINE void trellis_key_dots(const tqai_codec *codec, const int bits, const int state_bits, const uint8_t *const *codes,
                                  const uint8_t *const *next, int pages, const int16_t *q, const int rows, int32_t *dots) {
    const tqai_trellis *t = codec->tables;
    const int dim = codec->head_dim, row_bytes = tqai_trellis_row_bytes(codec);
    const level_bytes table = load_level_bytes(t->levels, 128);
    int8_t bytes[BYTE_ROWS(MAX_ROWS) * TQAI_MAX_HEAD_DIM];
    int32_t bias[BYTE_ROWS(MAX_ROWS)];
    split_keys(q, dim, rows, bytes, bias);
    if (bits % 2 == 0) {
        const place_tables tables = load_place_tables(t, bits, 128);
        const __m128i order = bits == 2 ? _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)
                                        : _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
        for (int i = 0; i < BYTE_ROWS(rows) * dim; i += 16) {
            __m128i *at = (__m128i *)(bytes + i);
            _mm_storeu_si128(at, _mm_shuffle_epi8(_mm_loadu_si128(at), order));
        }
        for (int page = 0; page < pages; page++)
            trellis_key_places(codec, &tables, bits, state_bits, codes[page], next[page], bytes, bias, rows,
                               dots + TQAI_PAGE_TOKENS * page);
        return;
    }
    for (int page = 0; page < pages; page++, dots += TQAI_PAGE_TOKENS) {
        const uint8_t *in = codes[page], *ahead = next[page];
        __m512i sum[BYTE_ROWS(MAX_ROWS)][4];
#pragma GCC unroll 6
        for (int b = 0; b < BYTE_ROWS(rows); b++)
#pragma GCC unroll 4
            for (int g = 0; g < 4; g++) sum[b][g] = _mm512_set1_epi32(bias[b]);
        for (int a = 0; a < dim / 8; a++) {
            __m512i line[6];
#pragma GCC unroll 6
            for (int k = 0; k < bits + 2; k++) {
                const int at = bits * a + k;
                line[k] = _mm512_loadu_si512(in + 64 * (at < row_bytes ? at : at - row_bytes));
                if (k < bits) _mm_prefetch((const char *)ahead + 64 * at, _MM_HINT_T1);
            }
#pragma GCC unroll 2
            for (int upper = 0; upper < 2; upper++) {
                __m512i unit[4];
                key_units(t, &table, bits, state_bits, upper, line, unit);
#pragma GCC unroll 6
                for (int b = 0; b < BYTE_ROWS(rows); b++) {
                    const __m512i factor = four_of(bytes + b * dim + 4 * (2 * a + upper));
#pragma GCC unroll 4
                    for (int g = 0; g < 4; g++) sum[b][g] = _mm512_dpbusd_epi32(sum[b][g], unit[g], factor);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int g = 0; g < 4; g++) store_dots(sum[r][g], sum[rows + r / 2][g], r % 2, dots + r * BLOCK_TOKENS + 16 * g);
    }
}

/* Which of the row's bytes the eight coordinates read, and the maps of these. */
typedef struct {
    __m512i one, two, next, map[3];
} value_maps;

VBMI_INLINE value_maps load_value_maps(const tqai_trellis *t, const int bits) {
    int64_t first[8];
    uint64_t maps[3][8];
    for (int u = 0; u < 8; u++) {
        first[u] = bits * u / 8;
        for (int i = 0; i < 3; i++) maps[i][u] = t->matrices[3 * u + i];
    }
    value_maps m = {.one = _mm512_loadu_si512(first)};
    m.two = _mm512_add_epi64(m.one, _mm512_set1_epi64(1));
    m.next = _mm512_add_epi64(m.one, _mm512_set1_epi64(2));
    for (int i = 0; i < 3; i++) m.map[i] = _mm512_loadu_si512(maps[i]);
    return m;
}

/* Levels of 8 tokens and 8 coordinates, whose bytes begin at `in`. After them come the next ones (or scales, which
 * nobody looks at), or at the end of the circle its beginning, `first`. */
VBMI_INLINE __m512i value_levels(const value_maps *m, const level_bytes *table, const int bits, const int state_bits,
                                 const uint8_t *in, const uint8_t *first) {
    const int three = bits == 3 && state_bits == 8; /* the only windows in three bytes */
    __m512i row = _mm512_loadu_si512(in);
    if (first) row = _mm512_mask_loadu_epi64(row, (__mmask8)(3 << bits), first - 8 * bits);
    __m512i index = _mm512_xor_si512(_mm512_gf2p8affine_epi64_epi8(_mm512_permutexvar_epi64(m->one, row), m->map[0], 0),
                                     _mm512_gf2p8affine_epi64_epi8(_mm512_permutexvar_epi64(m->two, row), m->map[1], 0));
    if (three)
        index = _mm512_xor_si512(index, _mm512_gf2p8affine_epi64_epi8(_mm512_permutexvar_epi64(m->next, row), m->map[2], 0));
    return look_up_bytes(table, bits, index);
}

/* Dims d .. d + 15, the last of the row or not. */
VBMI_INLINE void trellis_value_dims(const tqai_codec *codec, const value_maps *maps, const level_bytes *table, const int bits,
                                    const int state_bits, const uint8_t *const *codes, const uint8_t *const *next, int pages,
                                    const int8_t *bytes, const float *step, const int rows, int d, const int last, float *acc) {
    const int dim = codec->head_dim, row_bytes = tqai_trellis_row_bytes(codec), at = bits * d;
    __m512i sum[BYTE_ROWS(MAX_ROWS)][2];
#pragma GCC unroll 6
    for (int b = 0; b < BYTE_ROWS(rows); b++) sum[b][0] = sum[b][1] = _mm512_setzero_si512();
    for (int page = 0; page < pages; page++)
        for (int h = 0; h < 8; h++) {
            const uint8_t *in = codes[page] + 8 * row_bytes * h;
            _mm_prefetch((const char *)next[page] + 8 * row_bytes * h + at, _MM_HINT_T1);
            const __m512i low = value_levels(maps, table, bits, state_bits, in + at, NULL);
            const __m512i high = value_levels(maps, table, bits, state_bits, in + at + 8 * bits, last ? in : NULL);
#pragma GCC unroll 6
            for (int b = 0; b < BYTE_ROWS(rows); b++) {
                int64_t eight;
                memcpy(&eight, bytes + b * BLOCK_TOKENS + TQAI_PAGE_TOKENS * page + 8 * h, sizeof eight);
                const __m512i weight = _mm512_set1_epi64(eight);
                sum[b][0] = _mm512_dpbusd_epi32(sum[b][0], weight, low);
                sum[b][1] = _mm512_dpbusd_epi32(sum[b][1], weight, high);
            }
        }
    __m512 total[BYTE_ROWS(MAX_ROWS)];
#pragma GCC unroll 6
    for (int b = 0; b < BYTE_ROWS(rows); b++) {
        const __m512i even = _mm512_permutex2var_epi32(sum[b][0], EVEN_LANES, sum[b][1]);
        const __m512i odd = _mm512_permutex2var_epi32(sum[b][0], ODD_LANES, sum[b][1]);
        total[b] = _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd));
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) add_sums(total[r], total[rows + r / 2], r % 2, step[r], acc + r * dim + d);
}

/* Dims of the places `at` to at + 7 (2 and 4 bits: a place, a byte, begins 4 or 2 whole windows, of which none goes
 * further than the next): coordinate u of all places at once, so that nothing need be picked.
 *
 *   qword k = place at + k, byte v = token v     sum [u], qword k: dim 8 / bits * (at + k) + u, in two lanes */
VBMI_INLINE void trellis_value_places(const tqai_codec *codec, const place_tables *tables, const int bits, const int state_bits,
                                      const uint8_t *const *codes, const uint8_t *const *next, int pages, const int8_t *bytes,
                                      const float *step, const int rows, int at, const int last, float *acc) {
    const int dim = codec->head_dim, row_bytes = tqai_trellis_row_bytes(codec), coordinates = 8 / bits;
    const int end = row_bytes - 1 - at; /* the place that the first one follows, if it is one of these */
    __m512i sum[BYTE_ROWS(MAX_ROWS)][4];
#pragma GCC unroll 6
    for (int b = 0; b < BYTE_ROWS(rows); b++)
#pragma GCC unroll 4
        for (int u = 0; u < coordinates; u++) sum[b][u] = _mm512_setzero_si512();
    for (int page = 0; page < pages; page++)
        for (int h = 0; h < 8; h++) {
            const uint8_t *row = codes[page] + 8 * row_bytes * h, *in = row + 8 * at;
            const __m512i one = _mm512_loadu_si512(in);
            __m512i two = _mm512_loadu_si512(in + 8);
            if (last) two = _mm512_mask_loadu_epi64(two, (__mmask8)(1 << end), row - 8 * end);
            _mm_prefetch((const char *)next[page] + (in - codes[page]), _MM_HINT_T1);
#pragma GCC unroll 4
            for (int u = 0; u < coordinates; u++) {
                const __m512i level = levels_of_place(tables, bits, state_bits, u, one, two);
#pragma GCC unroll 6
                for (int b = 0; b < BYTE_ROWS(rows); b++) {
                    int64_t eight;
                    memcpy(&eight, bytes + b * BLOCK_TOKENS + TQAI_PAGE_TOKENS * page + 8 * h, sizeof eight);
                    sum[b][u] = _mm512_dpbusd_epi32(sum[b][u], _mm512_set1_epi64(eight), level);
                }
            }
        }
    const __m512i lower = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), upper = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    __m512 total[BYTE_ROWS(MAX_ROWS)][2];
#pragma GCC unroll 6
    for (int b = 0; b < BYTE_ROWS(rows); b++) {
        __m512i pair[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
#pragma GCC unroll 2
        for (int u = 0; u < coordinates; u += 2) { /* | dim u, dim u + 1 | of every place */
            const __m512i first = _mm512_mask_blend_epi32(0xAAAA, sum[b][u], _mm512_slli_epi64(sum[b][u + 1], 32));
            const __m512i second = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(sum[b][u], 32), sum[b][u + 1]);
            pair[u / 2] = _mm512_add_epi32(first, second);
        }
        const __m512i low = bits == 4 ? pair[0] : _mm512_permutex2var_epi64(pair[0], lower, pair[1]);
        total[b][0] = _mm512_cvtepi32_ps(low);
        total[b][1] = _mm512_cvtepi32_ps(_mm512_permutex2var_epi64(pair[0], upper, pair[1]));
    }
    const int d = coordinates * at;
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        add_sums(total[r][0], total[rows + r / 2][0], r % 2, step[r], acc + r * dim + d);
        if (bits == 2 && d + 16 < dim) add_sums(total[r][1], total[rows + r / 2][1], r % 2, step[r], acc + r * dim + d + 16);
    }
}

VBMI_INLINE void trellis_value_sums(const tqai_codec *codec, const int bits, const int state_bits,
                                    const uint8_t *const *codes, const uint8_t *const *next, int pages, const int16_t *w,
                                    const float *step, const int rows, float *acc) {
    int8_t bytes[BYTE_ROWS(MAX_ROWS) * BLOCK_TOKENS];
    int d = 0;
    split_rows(w, BLOCK_TOKENS, TQAI_PAGE_TOKENS * pages, rows, 0, bytes, BLOCK_TOKENS);
    const tqai_trellis *t = codec->tables;
    if (bits == 4 || (bits == 2 && rows <= 2)) { /* of 2 bits four rows would need more registers than there are */
        const int row_bytes = tqai_trellis_row_bytes(codec);
        const place_tables tables = load_place_tables(t, bits, 0);
        for (; d < row_bytes - 8; d += 8)
            trellis_value_places(codec, &tables, bits, state_bits, codes, next, pages, bytes, step, rows, d, 0, acc);
        trellis_value_places(codec, &tables, bits, state_bits, codes, next, pages, bytes, step, rows, d, 1, acc);
        return;
    }
    const level_bytes table = load_level_bytes(t->levels, 0);
    const value_maps maps = load_value_maps(t, bits);
    for (; d < codec->head_dim - 16; d += 16)
        trellis_value_dims(codec, &maps, &table, bits, state_bits, codes, next, pages, bytes, step, rows, d, 0, acc);
    trellis_value_dims(codec, &maps, &table, bits, state_bits, codes, next, pages, bytes, step, rows, d, 1, acc);
}

#define TRELLIS_ROWS(bits, state_bits, rows)                                                                         \
    WITH_VBMI static __attribute__((noinline)) void keys_trellis_##bits##_##state_bits##_##rows(                     \
        const tqai_codec *c, const uint8_t *const *p, const uint8_t *const *next, int pages, const int16_t *q,       \
        int32_t *dots) {                                                                                             \
        trellis_key_dots(c, bits, state_bits, p, next, pages, q, rows, dots);                                        \
    }                                                                                                                \
    WITH_VBMI static __attribute__((noinline)) void values_trellis_##bits##_##state_bits##_##rows(                   \
        const tqai_codec *c, const uint8_t *const *p, const uint8_t *const *next, int pages, const int16_t *w,       \
        const float *step, float *acc) {                                                                             \
        trellis_value_sums(c, bits, state_bits, p, next, pages, w, step, rows, acc);                                 \
    }
#define TRELLIS_STATES(bits, state_bits)                                                                             \
    TRELLIS_ROWS(bits, state_bits, 1) TRELLIS_ROWS(bits, state_bits, 2) TRELLIS_ROWS(bits, state_bits, 4)
TRELLIS_STATES(1, 6) TRELLIS_STATES(2, 6) TRELLIS_STATES(3, 6) TRELLIS_STATES(4, 6)
TRELLIS_STATES(1, 8) TRELLIS_STATES(2, 8) TRELLIS_STATES(3, 8) TRELLIS_STATES(4, 8)

/* name(keys, values)_trellis_<bits>_<state bits>_<rows>(codec, ...) */
#define BY_TRELLIS_BITS(name, state_bits, ...)                                                                       \
    do {                                                                                                             \
        if (codec->bits == 1) BY_ROWS(name, trellis_1_##state_bits, __VA_ARGS__);                                    \
        else if (codec->bits == 2) BY_ROWS(name, trellis_2_##state_bits, __VA_ARGS__);                               \
        else if (codec->bits == 3) BY_ROWS(name, trellis_3_##state_bits, __VA_ARGS__);                               \
        else BY_ROWS(name, trellis_4_##state_bits, __VA_ARGS__);                                                     \
    } while (0)
#define BY_TRELLIS(name, ...)                                                                                        \
    do {                                                                                                             \
        if (((const tqai_trellis *)codec->tables)->state_bits == 6) BY_TRELLIS_BITS(name, 6, __VA_ARGS__);           \
        else BY_TRELLIS_BITS(name, 8, __VA_ARGS__);                                                                  \
    } while (0)
