/* layout.h: the order of codes inside the two code parts of a page, shared by every kernel.
 *
 * Codes are grouped in units of 32 codes = 16 lanes x 2 terms, so that one 32-bit lane of a register
 * holds the two terms that a 16-bit dot product adds, and no horizontal sums are needed:
 *
 *   keys     unit u = 4 * p + g      lane t, term j:  token 16 g + t,        dim 2 p + j
 *   values   unit u = 128 * c + n * p + g             token 2 p + j,         dim 64 c + 16 g + t
 *            where c counts chunks of 64 dims and n is the number of groups of 16 dims in chunk c
 *            (4, but for the last chunk 1 or 2 where head_dim % 64 is 16 or 32)
 *
 * A page side has 2 * head_dim units. A plane of b bits (1, 2, 4 or 8) is a run of 64-byte lines of 32
 * little-endian 16-bit words; word e of line l holds the codes e (= 2 t + j) of 16 / b units:
 *
 *   bit     15 ...                    2b ..... b   b-1 .... 0
 *   word e  | ...                  | unit l*k+1  | unit l*k   |       k = 16 / b units per line
 *
 *   64-byte line l, b = 4, keys:  word 0        word 1        word 2        ...  word 31
 *     bits  0..3   token group 0  tok 0 dim 2l  tok 0 dim 2l+1 tok 1 dim 2l ...  tok 15 dim 2l+1
 *     bits  4..7   token group 1  tok 16 ...
 *     bits  8..11  token group 2  tok 32 ...
 *     bits 12..15  token group 3  tok 48 ...
 *
 * Codes of 3 bits are two planes: first the low two bits of all units, then the high bit of all units.
 *
 * Codes of 2 bits have levels that 8-bit numbers hold exactly, so they lie for products of bytes, four terms a
 * lane: units of 64 codes = 16 lanes x 4 terms, in lines of 64 bytes, byte e = 4 t + j holding code e of 4 units:
 *
 *   keys     unit u = 4 * p + g        lane t, term j:  token 16 g + t,        dim 4 p + j
 *   values   unit u = 64 * c + n * p + g                token 4 p + j,         dim 64 c + 16 g + t
 *
 *   bit       7 6        5 4        3 2        1 0
 *   byte e  | unit 4l+3 | unit 4l+2 | unit 4l+1 | unit 4l |
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

/* A unit of 64 codes (2 bits) as the two units of two terms that hold its terms 0, 1 and 2, 3. */
static inline void tqai_halves(int is_value, int head_dim, int unit, int *first, int *second) {
    const int groups = is_value ? tqai_chunk_groups(head_dim, unit / 64 * 64) : 4;
    *first = 2 * unit - (is_value ? unit % 64 : unit) % groups;
    *second = *first + groups;
}

/* Terms of a lane. */
static inline int tqai_terms(int bits) { return bits == 2 ? 4 : 2; }

static inline int tqai_served_dim(int head_dim) {
    return head_dim >= 16 && head_dim <= 256 && head_dim % 16 == 0 && (head_dim / 16) % 4 != 3;
}

static inline int tqai_served_bits(int bits) { return bits == 2 || bits == 3 || bits == 4 || bits == 8; }

#endif
