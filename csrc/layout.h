/* layout.h: the order of codes inside the two code parts of a page, shared by every kernel.
 *
 * Codes of 2, 3 and 4 bits are grouped in units of 64 codes = 16 lanes x 4 terms, so that one 32-bit lane of a
 * register holds the four terms that a dot product of bytes adds, and no horizontal sums are needed:
 *
 *   keys     unit u = 4 * p + g         lane t, term j:  token 16 g + t,        dim 4 p + j
 *   values   unit u = 64 * c + n * p + g                 token 4 p + j,         dim 64 c + 16 g + t
 *            where c counts chunks of 64 dims and n is the number of groups of 16 dims in chunk c
 *            (4, but for the last chunk 1 or 2 where head_dim % 64 is 16 or 32)
 *
 * A page side has head_dim units. A plane of b bits (1, 2 or 4) is a run of 64-byte lines; byte e = 4 t + j of line
 * l holds code e of k = 8 / b units:
 *
 *   bit     7 ...                       2b ..... b   b-1 .... 0
 *   byte e  | unit l*k+k-1 | ...      | unit l*k+1 | unit l*k  |
 *
 *   the first line, b = 4, keys:  byte 0       byte 1        byte 2        byte 3        byte 4       ...  byte 63
 *     bits 0..3  token group 0    tok  0 dim 0 tok  0 dim 1  tok  0 dim 2  tok  0 dim 3  tok  1 dim 0 ...  tok 15 dim 3
 *     bits 4..7  token group 1    tok 16 ...
 *
 * Codes of 3 bits are two planes: first the low two bits of all units, then the high bit of all units.
 *
 * Codes of 8 bits, whose levels need 16 bits, lie for dot products of two terms: units of 32 codes = 16 lanes x 2
 * terms,
 *
 *   keys     unit u = 4 * p + g         lane t, term j:  token 16 g + t,        dim 2 p + j
 *   values   unit u = 128 * c + n * p + g                token 2 p + j,         dim 64 c + 16 g + t
 *
 * in 64-byte lines of 32 little-endian 16-bit words; word e = 2 t + j of line l holds code e of unit 2 l in its low
 * byte and of unit 2 l + 1 in its high one.
 */
#ifndef TQAI_LAYOUT_H
#define TQAI_LAYOUT_H

#include <stdint.h>

#define UNIT 32 /* codes of a unit of two terms */
#define LINE_BYTES 64

/* Bytes of the plane of low two bits, after which the plane of high bits of 3-bit codes begins. */
static inline int64_t tqai_high_plane_at(int head_dim) { return (int64_t)2 * head_dim * UNIT * 2 / 8; }

/* Groups of 16 dims in the chunk of 64 dims that begins at `dim`. */
static inline int tqai_chunk_groups(int head_dim, int dim) {
    int groups = (head_dim - dim) / 16;
    return groups > 4 ? 4 : groups;
}

/* A unit of 64 codes as the two units of two terms that hold its terms 0, 1 and 2, 3. */
static inline void tqai_halves(int is_value, int head_dim, int unit, int *first, int *second) {
    const int groups = is_value ? tqai_chunk_groups(head_dim, unit / 64 * 64) : 4;
    *first = 2 * unit - (is_value ? unit % 64 : unit) % groups;
    *second = *first + groups;
}

/* Terms of a lane. */
static inline int tqai_terms(int bits) { return bits == 8 ? 2 : 4; }

/* Code e of a unit of 64. */
static inline unsigned tqai_code_at(const uint8_t *codes, int bits, int head_dim, int unit, int e) {
    if (bits == 4) return codes[LINE_BYTES * (unit / 2) + e] >> (4 * (unit % 2)) & 15u;
    const unsigned low = codes[LINE_BYTES * (unit / 4) + e] >> (2 * (unit % 4)) & 3u;
    if (bits == 2) return low;
    return low | (codes[tqai_high_plane_at(head_dim) + LINE_BYTES * (unit / 8) + e] >> (unit % 8) & 1u) << 2;
}

static inline int tqai_served_dim(int head_dim) {
    return head_dim >= 16 && head_dim <= 256 && head_dim % 16 == 0 && (head_dim / 16) % 4 != 3;
}

static inline int tqai_served_bits(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

#endif
