/* trellis_tables.h: a trellis codec with random tables (but for the rows of 4 bits), for check_native.c. Every table
 * that the kernels read is made here from `rows` and `levels` alone, bit by bit as docs/format.md says.
 */
#include "trellis.h"

/* The rows of 4 bits are those of the format (`terms` of core/tables/trellis.json), of 64 and of 256 states: kernels
 * have their shifts in them. */
static const unsigned ROWS_OF_PARTS[2][7] = {{9, 18, 36, 72, 128, 272, 544}, {33, 66, 132, 264, 512, 1024, 2064}};

static int parity(unsigned x) { return __builtin_parity(x); }

/* The index of the level of a window, by the codec's rows. */
static unsigned index_of(const unsigned *rows, int index_bits, unsigned window) {
    unsigned m = 0;
    for (int j = 0; j < index_bits; j++) m |= (unsigned)parity(window & rows[j]) << j;
    return m;
}

/* Of nibble j of the window of coordinate u, bit i: its index. */
static unsigned of_bit(const unsigned *rows, int bits, int state_bits, int u, int j, int i) {
    const int bit = 4 * j + i - bits * u % 4;
    return bit >= 0 && bit < bits + state_bits ? index_of(rows, TQAI_TRELLIS_INDEX_BITS(bits), 1u << bit) : 0;
}

/* combined[x]: exclusive or of the basis vectors chosen by the bits of x; 0 where they depend on each other. */
static int combine(const unsigned *basis, int count, unsigned *combined) {
    uint8_t seen[128] = {0};
    for (unsigned x = 0; x < 1u << count; x++) {
        combined[x] = 0;
        for (int i = 0; i < count; i++)
            if (x >> i & 1) combined[x] ^= basis[i];
        if (seen[combined[x]]++) return 0;
    }
    return 1;
}

/* A whole basis that begins with the given vectors: of 4 bits the single bits of an index follow, as kernels take the
 * second part's for granted, else any will do. */
static int complete(unsigned *basis, int have, int bits, unsigned *combined) {
    const int index_bits = TQAI_TRELLIS_INDEX_BITS(bits);
    if (!combine(basis, have, combined)) return 0;
    for (int tries = 0; have < index_bits && tries < 1000; tries++) {
        basis[have] = bits == 4 && tries < index_bits ? 1u << tries : (unsigned)below(1 << index_bits);
        have += combine(basis, have + 1, combined);
    }
    return have == index_bits && combine(basis, have, combined);
}

/* What nibbles add to the index of coordinate u, and its levels; 0: these rows do not do. */
static int nibbles_make(const unsigned *rows, const int8_t *levels, int bits, int state_bits, int u, uint8_t *nibbles,
                        int8_t *nibble_levels) {
    const int index_bits = TQAI_TRELLIS_INDEX_BITS(bits), direct = tqai_trellis_direct(bits, state_bits, u);
    unsigned basis[7] = {0}, combined[128], renamed[128];
    int have = 0;
    for (int i = 0; i < 4 && direct >= 0; i++) basis[have++] = of_bit(rows, bits, state_bits, u, direct, i);
    if (!combine(basis, have, combined)) return 0;
    if (!complete(basis, have, bits, combined)) return 0;
    for (unsigned x = 0; x < 1u << index_bits; x++) {
        renamed[combined[x]] = x;
        nibble_levels[x] = levels[combined[x]];
    }
    for (int j = 0; j < tqai_trellis_nibbles(bits, state_bits, u); j++)
        for (unsigned n = 0; n < 16; n++) {
            unsigned index = 0;
            for (int i = 0; i < 4; i++)
                if (n >> i & 1) index ^= of_bit(rows, bits, state_bits, u, j, i);
            nibbles[16 * j + n] = (uint8_t)renamed[index];
        }
    return 1;
}

/* Of 2 and 4 bits, the map and the levels of coordinate u of a place, likewise. */
static int place_make(const unsigned *rows, const int8_t *levels, int bits, int state_bits, int u, uint64_t *map,
                      int8_t *place_levels) {
    const int before = tqai_trellis_before(bits, state_bits, u), direct = tqai_trellis_direct_bits(bits, state_bits, u);
    const int index_bits = TQAI_TRELLIS_INDEX_BITS(bits);
    unsigned basis[7] = {0}, combined[128], renamed[128], of[16];
    for (int i = 0; i < 16; i++) of[i] = i < bits * u || i >= bits * u + bits + state_bits ? 0 : index_of(rows, index_bits, 1u << (i - bits * u));
    for (int i = 0; i < direct; i++) basis[i] = of[(before ? bits * u : 8) + i];
    if (!complete(basis, direct, bits, combined)) return 0;
    for (unsigned x = 0; x < 1u << index_bits; x++) {
        renamed[combined[x]] = x;
        place_levels[x] = levels[combined[x]];
    }
    *map = 0;
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < index_bits; j++)
            *map |= (uint64_t)(renamed[of[(before ? 8 : 0) + i]] >> j & 1) << (8 * (7 - j) + i);
    return 1;
}

static void trellis_make(tqai_codec *c, int bits) {
    const int state_bits = below(2) ? 6 : 8, window_bits = bits + state_bits, index_bits = TQAI_TRELLIS_INDEX_BITS(bits);
    const size_t windows = (size_t)1 << window_bits;
    const float unit = (0.015f + 0.01f * uniform()) / sqrtf((float)c->head_dim);
    int8_t *levels = room(128), *window_levels = room(windows + 8), *nibble_levels = room(8 * 128), *place_levels = room(4 * 128);
    uint8_t *window_index = room(windows), *nibbles = room(8 * 4 * 16);
    float *values = room(sizeof(float) * windows);
    uint64_t *matrices = room(sizeof(uint64_t) * 8 * 3), *place_maps = room(sizeof(uint64_t) * 4);
    tqai_trellis *t = room(sizeof *t);
    unsigned rows[7];
    int8_t parts[24];
    for (int i = 0; i < 24; i++) parts[i] = (int8_t)(below(127) - 63);
    for (int i = 0; i < 128; i++) levels[i] = (int8_t)(bits == 4 ? parts[i % 16] + parts[16 + i / 16] : below(255) - 127);
    for (int whole = 0; !whole;) {
        for (int j = 0; j < index_bits; j++) {
            rows[j] = bits == 4 ? ROWS_OF_PARTS[state_bits == 8][j] : 1 + (unsigned)below((int)windows - 1);
        }
        whole = 1;
        for (int u = 0; u < 8 && whole; u++)
            whole = nibbles_make(rows, levels, bits, state_bits, u, nibbles + 64 * u, nibble_levels + 128 * u);
        for (int u = 0; bits % 2 == 0 && u < 8 / bits && whole; u++)
            whole = place_make(rows, levels, bits, state_bits, u, place_maps + u, place_levels + 128 * u);
    }
    for (unsigned w = 0; w < windows; w++) {
        window_index[w] = (uint8_t)index_of(rows, index_bits, w);
        window_levels[w] = levels[window_index[w]];
        values[w] = (float)window_levels[w] * unit;
    }
    memset(window_levels + windows, 0, 8);
    for (int u = 0; u < 8; u++)
        for (int i = 0; i < 3; i++) {
            uint64_t matrix = 0;
            for (int j = 0; j < index_bits; j++)
                matrix |= (uint64_t)((rows[j] << (bits * u % 8)) >> (8 * i) & 0xFF) << (8 * (7 - j));
            matrices[3 * u + i] = matrix;
        }
    *t = (tqai_trellis){.state_bits = state_bits, .index_bits = index_bits,
                        .per_deviation = 1.0f / unit, .levels = levels, .window_index = window_index,
                        .window_levels = window_levels, .values = values, .matrices = matrices, .nibbles = nibbles,
                        .nibble_levels = nibble_levels, .place_maps = place_maps, .place_levels = place_levels};
    c->bits = bits;
    c->kind = TQAI_TRELLIS;
    c->tables = t;
    c->level_step = unit;
    c->largest_sum = 2147483647.0f / 127.0f - 512.0f;
}

static void trellis_free(const tqai_codec *c) {
    const tqai_trellis *t = c->tables;
    if (!t) return;
    free((void *)t->levels);
    free((void *)t->window_levels);
    free((void *)t->window_index);
    free((void *)t->values);
    free((void *)t->matrices);
    free((void *)t->nibbles);
    free((void *)t->nibble_levels);
    free((void *)t->place_maps);
    free((void *)t->place_levels);
    free((void *)t);
}
