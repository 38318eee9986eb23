/* trellis.h: what the kernels know of a trellis codec, and the order of its codes inside a page.
 *
 * A row is a circle of head_dim * bits bits, row_bytes bytes; coordinate i is decoded from the window of
 * L = bits + state_bits bits at bit i * bits (docs/format.md). Windows are found byte by byte:
 *
 *   coordinate i = 8 a + u   first byte  k = bits * a + (bits * u) / 8,   shift (bits * u) % 8,  then k + 1, k + 2
 *   m (index of a level)     = A[u] byte k ^ B[u] byte k + 1 ^ C[u] byte k + 2           over GF(2)
 *
 * so that a page side holds byte k of many tokens beside each other:
 *
 *   keys     byte k of token 16 g + t     at 64 k + 16 (t / 4) + 4 g + t % 4
 *
 *            64 tokens of byte k: | g 0 t 0-3 | g 1 t 0-3 | g 2 t 0-3 | g 3 t 0-3 | g 0 t 4-7 | g 1 t 4-7 | ...
 *            (interleaving four coordinates within 128-bit lanes then yields units of whole groups of 16 tokens)
 *
 *   values   byte k of token 8 h + v      at 8 (row_bytes h + k) + v
 */
#ifndef TQAI_TRELLIS_H
#define TQAI_TRELLIS_H

#include <stdint.h>

#include "tqai.h"

#define TQAI_TRELLIS_INDEX_BITS(bits) ((bits) == 4 ? 7 : 6)

/* tqai_codec.tables of the kind TQAI_TRELLIS. */
typedef struct {
    int32_t state_bits;            /* 6 or 8 */
    int32_t index_bits;            /* TQAI_TRELLIS_INDEX_BITS(bits) */
    float per_deviation;           /* sqrt(head_dim) / step: levels per coordinate of a unit vector */
    const int8_t *levels;          /* [128], of which 2^index_bits are used */
    const uint8_t *window_index;   /* [2^L]: m of every window */
    const int8_t *window_levels;   /* [2^L + 8]: levels[m], and what may be read beyond */
    const float *values;           /* [2^L]: the coordinate of every window */
    const uint64_t *matrices;      /* [8 u][3]: A, B, C; byte 7 - j is row j */
    const uint8_t *nibbles;        /* [8 u][4][16]: what the nibbles of a window add to its index, see below */
    const int8_t *nibble_levels;   /* [8 u][128]: level of such an index */
    const uint64_t *place_maps;    /* [4 u]: of 2 and 4 bits, see tqai_trellis_before */
    const int8_t *place_levels;    /* [4 u][128] */
} tqai_trellis;

/* The same window nibble by nibble, counted from nibble (bits * u) / 4 of the eight coordinates' bytes: how many
 * it has, and which of them maps to itself, to bits 0 to 3 of the index (a basis of the indices of its own for
 * every u makes that so); -1: none does. Of 4 bits bits 0 to 3 of the index are the first part's and bits 4 to
 * 6 the second's, but for what bit 3 adds to that: levels[x] = levels[x % 16] + levels[x & 120] - levels[x & 8]. */
static inline int tqai_trellis_nibbles(int bits, int state_bits, int u) { return (bits * u % 4 + state_bits + bits + 3) / 4; }

static inline int tqai_trellis_direct(int bits, int state_bits, int u) {
    if (bits == 4) return 0;
    if (state_bits == 8) return bits == 1 && u % 4 == 3 ? 2 : 1;
    if (bits == 2 && u % 2) return -1;
    return (bits * u % 4 + state_bits + bits) / 4 - 1; /* the last whole one */
}

/* Windows of 2 and 4 bits lie in two bytes at most, those of coordinates u < 8 / bits begin in the same one. The bits
 * in one of them, four at most, are bits 0 to 3 of the index (in a basis of coordinate u's own, place_levels) as
 * they stand; those in the other one go through a map, place_maps. So many in a byte as they stand: */
static inline int tqai_trellis_before(int bits, int state_bits, int u) { return bits * u + bits + state_bits > 12; }

static inline int tqai_trellis_direct_bits(int bits, int state_bits, int u) {
    const int over = bits * u + bits + state_bits - 8;
    return tqai_trellis_before(bits, state_bits, u) ? 8 - bits * u : over > 0 ? over : 0;
}

static inline int tqai_trellis_row_bytes(const tqai_codec *codec) { return codec->head_dim * codec->bits / 8; }

/* Where byte k of a token lies in the code part of its side. */
static inline int tqai_trellis_place(int is_value, int row_bytes, int token, int k) {
    if (is_value) return 8 * (row_bytes * (token / 8) + k) + token % 8;
    const int g = token / 16, t = token % 16;
    return 64 * k + 16 * (t / 4) + 4 * g + t % 4;
}

#endif
