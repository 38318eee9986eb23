/* trellis_levels_avx2.inc.h: levels of trellis codes of 1 to 3 bits with AVX2; included by trellis_avx2.inc.h.
 *
 * A window is two to four nibbles of the row. A linear map over GF(2) is the sum of what its nibbles map to, so
 * one byte shuffle per nibble and their exclusive or make the index of 32 levels at once; one of the nibbles maps
 * to itself where tqai_trellis_direct says so. Levels are looked up in four tables of 16:
 *
 *   index x      | 0 0 | 5 4 | 3 2 1 0 |
 *   table i      levels 16 i .. 16 i + 15, ^ those of table i + 1, as it counts as well where table i does: where x is
 *                below 16 (i + 1). x + 112 - 16 i is negative elsewhere, and a byte shuffle gives 0 for that
 *
 * (a blend of two halves takes an instruction less, but has the same two ports as the shuffles, and the same time.)
 *
 *   keys     byte k of 32 tokens (trellis.h), its words interleaved with those of the byte half a row further on,
 *            | byte k: t, t + 1 | half a row on: t, t + 1 |  in 32-bit lanes: a column of the coordinates i and
 *            i + head_dim / 2
 *   values   byte k of 8 tokens and of 4 places k: a column is 4 dims, | dim 0: token 0 .. 7 | dim 1 .. |
 *
 * A page side goes through the first-level cache twice, first all indices, then in their place all levels: so the
 * tables of either stay in registers, of which there are 16. With indices and lookups in one loop, or lookups and
 * products, the time is the same or longer.
 */
#include "trellis.h"

#define COLUMNS 4 /* of the key buffer: 16 tokens each, | column | pair of dims | 32 bytes | */
#define TABLES 4

/* Bytes of the fewest coordinates that fill them. */
#define BYTES_AT_ONCE(bits) ((bits) == 3 ? 3 : 1)

/* Codes of 2 bits and 64 states have windows of two nibbles wherever they begin, if nibbles may begin at every second
 * bit. */
INLINE int of_two_nibbles(const int bits, const int state_bits) { return bits == 2 && state_bits == 6; }

/* Coordinates whose windows begin at the same bit of a nibble share their maps. */
INLINE int classes_of(const int bits, const int state_bits) { return bits != 2 ? 4 : of_two_nibbles(bits, state_bits) ? 1 : 2; }

typedef struct {
    uint8_t map[4][4][16];        /* of class, nibble */
    uint8_t level[4][TABLES][16]; /* of class: levels + 128 */
} lookup_tables;

static void make_tables(const tqai_codec *codec, lookup_tables *out) {
    const tqai_trellis *t = codec->tables;
    for (int u = 0; u < classes_of(codec->bits, t->state_bits); u++) {
        memcpy(out->map[u], t->nibbles + 64 * u, 64);
        for (int i = 0; i < TABLES; i++) {
            const __m128i *from = (const __m128i *)(t->nibble_levels + 128 * u + 16 * i);
            const __m128i beyond = i + 1 < TABLES ? _mm_loadu_si128(from + 1) : _mm_set1_epi8(-128);
            _mm_storeu_si128((__m128i *)out->level[u][i], _mm_xor_si128(_mm_loadu_si128(from), beyond));
        }
    }
}

INLINE __m256i sixteen_bytes(const uint8_t *table) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table)); }

/* x, computed here and in a register: the compiler would take another order, with which it runs out of registers or
 * cores find less to do at a time. */
#define HERE(x) __asm__ volatile("" : "+x"(x))

typedef struct {
    __m256i of[4][4];     /* class, nibble */
    __m256i back, turned; /* of a nibble with its halves exchanged, which are bits 0 and 1, 2 and 3: the nibble, its map */
} map_registers;

INLINE map_registers load_maps(const lookup_tables *t, const int bits, const int state_bits) {
    map_registers r;
#pragma GCC unroll 4
    for (int u = 0; u < classes_of(bits, state_bits); u++)
#pragma GCC unroll 4
        for (int j = 0; j < tqai_trellis_nibbles(bits, state_bits, u); j++)
            if (j != tqai_trellis_direct(bits, state_bits, u)) {
                r.of[u][j] = sixteen_bytes(t->map[u][j]);
                if (bits % 2 == 0) HERE(r.of[u][j]); /* 1 and 3 bits have too many */
            }
    if (of_two_nibbles(bits, state_bits)) {
        r.back = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        r.turned = _mm256_shuffle_epi8(r.of[0][0], r.back);
    }
    return r;
}

INLINE void part_nibbles(__m256i line, __m256i *nibble) {
    const __m256i keep = _mm256_set1_epi8(15);
    nibble[0] = _mm256_and_si256(line, keep);
    nibble[1] = _mm256_and_si256(_mm256_srli_epi16(line, 4), keep);
}

/* Nibbles of 32 bytes, and bits 2 to 5, which only windows of two nibbles need. */
typedef struct {
    __m256i nibble[2], middle;
} parted;

INLINE parted part(__m256i line) {
    parted p;
    part_nibbles(line, p.nibble);
    p.middle = _mm256_and_si256(_mm256_srli_epi16(line, 2), _mm256_set1_epi8(15));
    return p;
}

/* Indices of the levels of the coordinates whose windows begin in the first of the bytes given (3 bits: the first
 * three): to out + apart * u. */
INLINE void store_indices(const map_registers *maps, const int bits, const int state_bits, const parted *byte,
                          uint8_t *out, int apart) {
    if (of_two_nibbles(bits, state_bits)) {
        /* bits 6 and 7 as they lie in their nibble, 2 and 3, so that bits 0 and 1 of the next byte come before them */
        const __m256i change = _mm256_and_si256(_mm256_xor_si256(byte[0].nibble[1], byte[1].nibble[0]), _mm256_set1_epi8(3));
        const __m256i turned = _mm256_xor_si256(byte[0].nibble[1], change);
        const __m256i first[3] = {byte[0].nibble[0], byte[0].middle, byte[0].nibble[1]};
        const __m256i second[4] = {byte[0].nibble[1], _mm256_shuffle_epi8(maps->back, turned), byte[1].nibble[0], byte[1].middle};
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) {
            const __m256i mapped = u < 3 ? _mm256_shuffle_epi8(maps->of[0][0], first[u]) : _mm256_shuffle_epi8(maps->turned, turned);
            _mm256_store_si256((__m256i *)(out + apart * u), _mm256_xor_si256(second[u], mapped));
        }
        return;
    }
    const int coordinates = BYTES_AT_ONCE(bits) * 8 / bits;
#pragma GCC unroll 8
    for (int u = 0; u < coordinates; u++) {
        const int start = bits * u / 4, count = tqai_trellis_nibbles(bits, state_bits, u);
        const int same = u % classes_of(bits, state_bits), direct = tqai_trellis_direct(bits, state_bits, u);
        __m256i index = direct < 0 ? _mm256_setzero_si256() : byte[(start + direct) / 2].nibble[(start + direct) % 2];
#pragma GCC unroll 4
        for (int j = 0; j < count; j++)
            if (j != direct)
                index = _mm256_xor_si256(index, _mm256_shuffle_epi8(maps->of[same][j], byte[(start + j) / 2].nibble[(start + j) % 2]));
        _mm256_store_si256((__m256i *)(out + apart * u), index);
    }
}

typedef struct {
    __m256i table[TABLES], more[TABLES - 1]; /* more: what is added to an index */
} level_registers;

INLINE level_registers load_levels_of(const lookup_tables *t, const int same) {
    level_registers r;
#pragma GCC unroll 4
    for (int i = 0; i < TABLES; i++) {
        r.table[i] = sixteen_bytes(t->level[same][i]);
        HERE(r.table[i]);
        if (i + 1 == TABLES) break;
        r.more[i] = _mm256_set1_epi8((char)(112 - 16 * i));
        HERE(r.more[i]);
    }
    return r;
}

/* Levels + 128. The index is read once for every use, which costs nothing, while a load of its own does. */
INLINE __m256i look_up(const level_registers *r, const __m256i *at) {
    __m256i x[TABLES];
#pragma GCC unroll 4
    for (int i = 0; i + 1 < TABLES; i++) __asm__ volatile("vpaddb %2, %1, %0" : "=x"(x[i]) : "x"(r->more[i]), "m"(*at));
    __asm__ volatile("vpshufb %2, %1, %0" : "=x"(x[TABLES - 1]) : "x"(r->table[TABLES - 1]), "m"(*at));
#pragma GCC unroll 4
    for (int i = 0; i + 1 < TABLES; i++) {
        x[i] = _mm256_shuffle_epi8(r->table[i], x[i]);
        HERE(x[i]);
    }
    x[0] = _mm256_xor_si256(x[0], x[1]);
    HERE(x[0]);
    x[2] = _mm256_xor_si256(x[2], x[3]);
    HERE(x[2]);
    x[0] = _mm256_xor_si256(x[0], x[2]);
    HERE(x[0]);
    return x[0];
}

/* Codes of a column of keys: of a byte of the first and one of the second half of the row. */
INLINE __m256i two_lines(const uint8_t *one, const uint8_t *two, const int upper) {
    const __m256i a = _mm256_loadu_si256((const __m256i *)one), b = _mm256_loadu_si256((const __m256i *)two);
    return upper ? _mm256_unpackhi_epi16(a, b) : _mm256_unpacklo_epi16(a, b);
}

/* Indices of a page, buffer [COLUMNS][head_dim / 2][32]; column 2 upper + half. */
INLINE void key_indices(const tqai_codec *codec, const int bits, const int state_bits, const lookup_tables *tables,
                        const uint8_t *in, uint8_t *buffer) {
    const int bytes = BYTES_AT_ONCE(bits), step = 8 * bytes / bits;
    const int64_t apart = 32 * tqai_trellis_row_bytes(codec); /* of the halves of a row */
    const map_registers maps = load_maps(tables, bits, state_bits);
#pragma GCC unroll 2
    for (int upper = 0; upper < 2; upper++)
#pragma GCC unroll 1
        for (int half = 0; half < 2; half++) {
            const uint8_t *from = in + 32 * half, *last = from + apart - 64 * bytes;
            parted byte[4] = {part(two_lines(from, from + apart, upper))};
#pragma GCC unroll 2
            for (; from < last; from += 64 * bytes, buffer += 32 * step) {
#pragma GCC unroll 3
                for (int k = 1; k <= bytes; k++) byte[k] = part(two_lines(from + 64 * k, from + 64 * k + apart, upper));
                store_indices(&maps, bits, state_bits, byte, buffer, 32);
                byte[0] = byte[bytes];
            }
#pragma GCC unroll 3
            for (int k = 1; k <= bytes; k++) /* the first half follows the second */
                byte[k] = part(two_lines(from + 64 * k, k < bytes ? from + 64 * k + apart : in + 32 * half, upper));
            store_indices(&maps, bits, state_bits, byte, buffer, 32);
            buffer += 32 * step;
        }
}

/* Levels in the places of four indices, `apart` numbers apart. As much of *next is prefetched as four are of a page:
 * evenly, as it has to come from memory. */
INLINE void look_up_four(const level_registers *r, const int bits, __m256i *at, const int apart, const uint8_t **next) {
    _mm_prefetch((const char *)*next, _MM_HINT_T1);
    *next += 16 * bits;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) at[apart * i] = look_up(r, at + apart * i);
}

/* Levels of a page, in the same places. */
INLINE void key_levels(const tqai_codec *codec, const int bits, const int state_bits, const lookup_tables *tables,
                       const uint8_t *in, const uint8_t *next, uint8_t *buffer) {
    const int indices = COLUMNS * codec->head_dim / 2, classes = classes_of(bits, state_bits);
    key_indices(codec, bits, state_bits, tables, in, buffer);
#pragma GCC unroll 4
    for (int same = 0; same < classes; same++) {
        const level_registers r = load_levels_of(tables, same);
#pragma GCC unroll 1
        for (int i = same; i < indices; i += 4 * classes) look_up_four(&r, bits, (__m256i *)buffer + i, classes, &next);
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
            parted byte[4];
#pragma GCC unroll 4
            for (int k = 0; k <= bytes; k++) byte[k] = part(four_places(from, bits, k));
            store_indices(&maps, bits, state_bits, byte, buffer + 32 * h, 32 * 8);
        }
    }
}

/* Levels of a page, in the same places. */
INLINE void value_levels(const tqai_codec *codec, const int bits, const int state_bits, const lookup_tables *tables,
                         const uint8_t *in, const uint8_t *next, uint8_t *buffer) {
    const int of_group = 4 * columns_of(bits), columns = (codec->head_dim + of_group - 1) / of_group * columns_of(bits);
    value_indices(codec, bits, state_bits, tables, in, buffer);
#pragma GCC unroll 4
    for (int same = 0; same < classes_of(bits, state_bits); same++) {
        const level_registers r = load_levels_of(tables, same);
#pragma GCC unroll 1
        for (int c = same; c < columns; c += classes_of(bits, state_bits)) {
            look_up_four(&r, bits, (__m256i *)buffer + 8 * c, 1, &next);
            look_up_four(&r, bits, (__m256i *)buffer + 8 * c + 4, 1, &next);
        }
    }
}
