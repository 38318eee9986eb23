/* trellis_levels_avx2.inc.h: levels of trellis codes of 1 to 3 bits with AVX2; included by trellis_avx2.inc.h.
 *
 * A window is two to four nibbles of the row. A linear map over GF(2) is the sum of what its nibbles map to, so
 * one byte shuffle per nibble and their exclusive or make the index of 32 levels at once; one of the nibbles maps
 * to itself where tqai_trellis_direct says so. Levels are looked up in tables of 16:
 *
 *   index byte   | top bit | 0 0 | bits 4 .. 0 |
 *   half h       table[h][0] at bits 4 .. 0, ^ table[h][1] at these - 16, as that holds levels 16 to 31 ^ levels 0 to 15
 *                and gives 0 where it is read below 0 (a byte shuffle does so where bit 7 is set); the top bit then
 *                chooses between the halves
 *
 *   keys     byte k of 32 tokens (trellis.h) makes coordinate i of these; words of two tokens of coordinates i and
 *            i + 1 are interleaved to  | i: t, t + 1 | i + 1: t, t + 1 |  in 32-bit lanes
 *   values   byte k of 8 tokens and of 4 places k: a column is 4 dims, | dim 0: token 0 .. 7 | dim 1 .. |
 *
 * A page side goes through the first-level cache twice, first all indices, then in their place all levels: so the
 * tables of either stay in registers, of which there are 16. With both in one loop the time is the same or longer.
 */
#include "trellis.h"

#define COLUMNS 4 /* of the key buffer: 16 tokens each, | pair of dims | column | 32 bytes | */
#define TABLES 2  /* of each half of the levels */

/* Bytes of the fewest coordinates that fill them. */
#define BYTES_AT_ONCE(bits) ((bits) == 3 ? 3 : 1)

/* Coordinates whose windows begin at the same bit of a nibble share their maps. */
INLINE int classes_of(const int bits) { return bits == 2 ? 2 : 4; }

typedef struct {
    uint8_t map[4][4][16];      /* of class, nibble: index with its top bit in bit 7 */
    uint8_t level[4][2][2][16]; /* of class, top bit, i: table[i] ^ table[i - 1] */
} lookup_tables;

static void make_tables(const tqai_codec *codec, lookup_tables *out) {
    const tqai_trellis *t = codec->tables;
    const int bits = codec->bits;
    const __m128i flip = _mm_set1_epi8(-128), low = _mm_set1_epi8(16 * TABLES - 1);
    for (int u = 0; u < classes_of(bits); u++) {
        for (int j = 0; j < 4; j++) {
            const __m128i map = _mm_loadu_si128((const __m128i *)(t->nibbles + 16 * (4 * u + j)));
            const __m128i top = _mm_cmpgt_epi8(map, low);
            _mm_storeu_si128((__m128i *)out->map[u][j], _mm_or_si128(_mm_and_si128(map, low), _mm_and_si128(top, flip)));
        }
        for (int half = 0; half < 2; half++)
            for (int i = 0; i < TABLES; i++) {
                const __m128i *from = (const __m128i *)(t->nibble_levels + 128 * u + 16 * (TABLES * half + i));
                const __m128i one = _mm_xor_si128(_mm_loadu_si128(from), i ? _mm_loadu_si128(from - 1) : flip);
                _mm_storeu_si128((__m128i *)out->level[u][half][i], one);
            }
    }
}

INLINE __m256i sixteen_bytes(const uint8_t *table) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)); }

/* x, computed here and in a register: the compiler would add up in another order and run out of registers. */
#define HERE(x) __asm__("" : "+x"(x))

typedef struct {
    __m256i of[4][4]; /* class, nibble */
} map_registers;

INLINE map_registers load_maps(const lookup_tables *t, const int bits, const int state_bits) {
    map_registers r;
#pragma GCC unroll 4
    for (int u = 0; u < classes_of(bits); u++)
#pragma GCC unroll 4
        for (int j = 0; j < tqai_trellis_nibbles(bits, state_bits, u); j++)
            if (j != tqai_trellis_direct(bits, state_bits, u)) {
                r.of[u][j] = sixteen_bytes(t->map[u][j]);
                if (bits % 2 == 0) HERE(r.of[u][j]); /* 1 and 3 bits have too many */
            }
    return r;
}

INLINE void part_nibbles(__m256i line, __m256i *nibble) {
    const __m256i keep = _mm256_set1_epi8(15);
    nibble[0] = _mm256_and_si256(line, keep);
    nibble[1] = _mm256_and_si256(_mm256_srli_epi16(line, 4), keep);
}

/* Indices of the levels of the coordinates whose windows begin in the first byte (3 bits: three bytes) of those
 * whose nibbles are given: to out + apart * u. */
INLINE void store_indices(const map_registers *maps, const int bits, const int state_bits, const __m256i *nibble,
                          uint8_t *out, int apart) {
    const int coordinates = BYTES_AT_ONCE(bits) * 8 / bits;
#pragma GCC unroll 8
    for (int u = 0; u < coordinates; u++) {
        const int start = bits * u / 4, count = tqai_trellis_nibbles(bits, state_bits, u);
        const int same = u % classes_of(bits), direct = tqai_trellis_direct(bits, state_bits, u);
        __m256i index = direct < 0 ? _mm256_setzero_si256() : nibble[start + direct];
#pragma GCC unroll 4
        for (int j = 0; j < count; j++)
            if (j != direct) index = _mm256_xor_si256(index, _mm256_shuffle_epi8(maps->of[same][j], nibble[start + j]));
        _mm256_store_si256((__m256i *)(out + apart * u), index);
    }
}

typedef struct {
    __m256i half[2][TABLES];
} level_registers;

INLINE level_registers load_levels_of(const lookup_tables *t, const int same) {
    level_registers r;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
        for (int i = 0; i < TABLES; i++) {
            r.half[half][i] = sixteen_bytes(t->level[same][half][i]);
            HERE(r.half[half][i]);
        }
    return r;
}

/* Levels + 128. */
INLINE __m256i look_up(const level_registers *r, const __m256i *at) {
    const __m256i index = _mm256_load_si256(at);
    __m256i x[TABLES], half[2];
    x[0] = _mm256_and_si256(index, _mm256_set1_epi8(16 * TABLES - 1));
#pragma GCC unroll 4
    for (int i = 1; i < TABLES; i++) {
        x[i] = _mm256_add_epi8(x[0], _mm256_set1_epi8((char)(-16 * i)));
        HERE(x[i]);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        half[h] = _mm256_shuffle_epi8(r->half[h][0], x[0]);
#pragma GCC unroll 4
        for (int i = 1; i < TABLES; i++) {
            half[h] = _mm256_xor_si256(half[h], _mm256_shuffle_epi8(r->half[h][i], x[i]));
            HERE(half[h]);
        }
    }
    return _mm256_blendv_epi8(half[0], half[1], index);
}

/* Indices of a page, buffer [head_dim][64 tokens]. */
INLINE void key_indices(const tqai_codec *codec, const int bits, const int state_bits, const lookup_tables *tables,
                        const uint8_t *in, uint8_t *buffer) {
    const int dim = codec->head_dim, bytes = BYTES_AT_ONCE(bits), step = 8 * bytes / bits;
    const map_registers maps = load_maps(tables, bits, state_bits);
#pragma GCC unroll 1
    for (int half = 0; half < 2; half++) {
        const uint8_t *from = in + 32 * half;
        __m256i nibble[8];
        part_nibbles(_mm256_loadu_si256((const __m256i *)from), nibble);
#pragma GCC unroll 1
        for (int i = 0; i < dim; i += step) {
#pragma GCC unroll 3
            for (int k = 1; k <= bytes; k++) {
                from = k == bytes && i + step >= dim ? in + 32 * half : from + 64;
                part_nibbles(_mm256_loadu_si256((const __m256i *)from), nibble + 2 * k);
            }
            store_indices(&maps, bits, state_bits, nibble, buffer + 64 * i + 32 * half, 64);
            nibble[0] = nibble[2 * bytes];
            nibble[1] = nibble[2 * bytes + 1];
        }
    }
}

/* Prefetch as much of `next` as the lookups have come on: evenly, as it has to come from memory. `at` bytes, and
 * `step` more with these, of as many 1-bit codes have been looked up. */
INLINE void prefetch_evenly(const uint8_t *next, const int bits, int at, int step) {
    if (bits * at % 64 < bits * step) _mm_prefetch((const char *)next + bits * at / 64 * 64, _MM_HINT_T1);
}

/* Levels of a page, buffer [head_dim / 2][COLUMNS][32]; column 2 upper + half. */
INLINE void key_levels(const tqai_codec *codec, const int bits, const int state_bits, const lookup_tables *tables,
                       const uint8_t *in, const uint8_t *next, uint8_t *buffer) {
    const int dim = codec->head_dim, classes = classes_of(bits);
    key_indices(codec, bits, state_bits, tables, in, buffer);
#pragma GCC unroll 2
    for (int c = 0; c < classes; c += 2) {
        const level_registers a = load_levels_of(tables, c), b = load_levels_of(tables, c + 1);
#pragma GCC unroll 1
        for (int i = c; i < dim; i += classes)
#pragma GCC unroll 1
            for (int half = 0; half < 2; half++) {
                __m256i *at = (__m256i *)(buffer + 64 * i) + half;
                prefetch_evenly(next, bits, 8 * (i + half), 8);
                const __m256i one = look_up(&a, at), two = look_up(&b, at + 2);
                at[0] = _mm256_unpacklo_epi16(one, two);
                at[2] = _mm256_unpackhi_epi16(one, two);
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

/* Indices of a page, buffer [groups][columns_of(bits)][8 h][32]: byte 8 q + v is token 8 h + v, dim 4 columns * group + columns * q + c. */
INLINE void value_indices(const tqai_codec *codec, const int bits, const int state_bits, const lookup_tables *tables,
                          const uint8_t *in, uint8_t *buffer) {
    const int bytes = BYTES_AT_ONCE(bits), row_bytes = tqai_trellis_row_bytes(codec);
    const int columns = columns_of(bits), places = 4 * bytes;
    const int groups = (row_bytes + places - 1) / places, last = places * (groups - 1);
    const map_registers maps = load_maps(tables, bits, state_bits);
    _Alignas(32) uint8_t tail[8][8 * 13]; /* the last places and the first again */
    const int whole = row_bytes % places == 0;
    if (!whole) memset(tail, 0, sizeof tail);
    for (int h = 0; h < 8; h++) {
        const uint8_t *row = in + 8 * row_bytes * h;
        if (whole) memcpy(tail[h], row + 8 * last, (size_t)(8 * places));
        else memcpy(tail[h], row + 8 * last, (size_t)(8 * (row_bytes - last)));
        memcpy(tail[h] + 8 * (row_bytes - last), row, 8);
    }
    for (int group = 0; group < groups; group++, buffer += 32 * 8 * columns) {
        const uint8_t *from = group == groups - 1 ? tail[0] : in + 8 * places * group;
        const int apart = group == groups - 1 ? (int)sizeof tail[0] : 8 * row_bytes;
#pragma GCC unroll 2
        for (int h = 0; h < 8; h++, from += apart) {
            __m256i nibble[8];
#pragma GCC unroll 4
            for (int k = 0; k <= bytes; k++) part_nibbles(four_places(from, bits, k), nibble + 2 * k);
            store_indices(&maps, bits, state_bits, nibble, buffer + 32 * h, 32 * 8);
        }
    }
}

/* Levels of a page, in the same places. */
INLINE void value_levels(const tqai_codec *codec, const int bits, const int state_bits, const lookup_tables *tables,
                         const uint8_t *in, const uint8_t *next, uint8_t *buffer) {
    const int of_group = 4 * columns_of(bits), columns = (codec->head_dim + of_group - 1) / of_group * columns_of(bits);
    value_indices(codec, bits, state_bits, tables, in, buffer);
#pragma GCC unroll 4
    for (int same = 0; same < classes_of(bits); same++) {
        const level_registers r = load_levels_of(tables, same);
#pragma GCC unroll 1
        for (int c = same; c < columns; c += classes_of(bits)) {
            __m256i *at = (__m256i *)(buffer + 32 * 8 * c);
#pragma GCC unroll 2
            for (int h = 0; h < 8; h++) {
                prefetch_evenly(next, bits, 4 * (8 * c + h), 4);
                at[h] = look_up(&r, at + h);
            }
        }
    }
}
