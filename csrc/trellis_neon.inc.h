/* trellis_neon.inc.h: levels of a page side of trellis codes with NEON, in the units of isa.h; included by
 * kernels_neon.c.
 *
 * As trellis_avx2.inc.h: what the nibbles of a window map to adds up to the index of a level, 16 at a time; a table
 * of 64 levels is one lookup (tbl of four registers), one of 128 a second one (tbx).
 *
 *   keys     a load of four interleaved registers of 32-bit lanes (ld4) parts the 64 tokens of byte k by groups of
 *            16 tokens; two coordinates of a group are interleaved to a unit
 *   values   8 tokens of two places k become 8 bytes each of two dims, | dim | token 0 .. 7 |; a load of four
 *            interleaved registers of 16-bit lanes parts them by pairs of tokens, with 8 dims each
 */
#include "trellis.h"

#define TRELLIS_UNPACK trellis_levels_neon
#define MOST_ROW_BYTES (TQAI_MAX_HEAD_DIM / 2)

INLINE int8x16x4_t four_registers(const int8_t *from) {
    return (int8x16x4_t){{vld1q_s8(from), vld1q_s8(from + 16), vld1q_s8(from + 32), vld1q_s8(from + 48)}};
}

/* Levels of coordinate u (of 8); line 0 is byte 0 of the eight coordinates. */
INLINE int8x16_t sixteen_levels(const tqai_trellis *t, const int bits, const int state_bits, int u, const uint8x16_t *line) {
    const int start = bits * u / 4, nibbles = tqai_trellis_nibbles(bits, state_bits, u);
    const int direct = tqai_trellis_direct(bits, state_bits, u);
    uint8x16_t index = vdupq_n_u8(0);
    for (int j = 0; j < nibbles; j++) {
        const uint8x16_t both = line[(start + j) / 2];
        uint8x16_t nibble = (start + j) % 2 ? vshrq_n_u8(both, 4) : vandq_u8(both, vdupq_n_u8(15));
        if (j != direct) nibble = vqtbl1q_u8(vld1q_u8(t->nibbles + 16 * (4 * u + j)), nibble);
        index = veorq_u8(index, nibble);
    }
    const int8_t *levels = t->nibble_levels + 128 * u;
    const int8x16_t found = vqtbl4q_s8(four_registers(levels), index);
    if (TQAI_TRELLIS_INDEX_BITS(bits) == 6) return found;
    return vqtbx4q_s8(found, four_registers(levels + 64), vsubq_u8(index, vdupq_n_u8(64)));
}

INLINE void neon_keys(const tqai_codec *codec, const int bits, const int state_bits, const uint8_t *in, int16_t *level) {
    const tqai_trellis *t = codec->tables;
    const int row_bytes = tqai_trellis_row_bytes(codec), step = bits == 3 ? 8 : 8 / bits > 2 ? 8 / bits : 2;
    const int lines = bits * step / 8;
    for (int i = 0; i < codec->head_dim; i += step) {
        const int first = bits * i / 8;
        uint8x16_t line[4][4]; /* [group][byte] */
        for (int k = 0; k <= lines; k++) {
            uint32_t bytes[16];
            memcpy(bytes, in + 64 * (first + k < row_bytes ? first + k : 0), sizeof bytes);
            const uint32x4x4_t parted = vld4q_u32(bytes);
            for (int g = 0; g < 4; g++) line[g][k] = vreinterpretq_u8_u32(parted.val[g]);
        }
        for (int u = 0; u < step; u += 2)
            for (int g = 0; g < 4; g++) {
                const int8x16_t a = sixteen_levels(t, bits, state_bits, u, line[g]);
                const int8x16_t b = sixteen_levels(t, bits, state_bits, u + 1, line[g]);
                const int8x16_t low = vzip1q_s8(a, b), high = vzip2q_s8(a, b);
                int16_t *to = level + UNIT * (2 * (i + u) + g);
                vst1q_s16(to, vmovl_s8(vget_low_s8(low)));
                vst1q_s16(to + 8, vmovl_high_s8(low));
                vst1q_s16(to + 16, vmovl_s8(vget_low_s8(high)));
                vst1q_s16(to + 24, vmovl_high_s8(high));
            }
    }
}

INLINE void neon_values(const tqai_codec *codec, const int bits, const int state_bits, const uint8_t *in, int16_t *level) {
    const tqai_trellis *t = codec->tables;
    const int dim = codec->head_dim, row_bytes = tqai_trellis_row_bytes(codec);
    const int places = bits == 3 ? 3 : 1, columns = bits == 3 ? 8 : 8 / bits; /* of half a register */
    for (int h = 0; h < 8; h++) {
        uint8_t row[8 * (MOST_ROW_BYTES + 1)];
        int8_t tile[8 * TQAI_MAX_HEAD_DIM];
        memcpy(row, in + 8 * row_bytes * h, 8 * (size_t)row_bytes);
        memcpy(row + 8 * row_bytes, row, 8); /* a circle */
        for (int first = 0; first < row_bytes; first += 2 * places) {
            uint8x16_t line[4];
            for (int k = 0; k <= places; k++)
                line[k] = vcombine_u8(vld1_u8(row + 8 * (first + k)), vld1_u8(row + 8 * (first + places + k)));
            for (int c = 0; c < columns; c++) {
                const int8x16_t found = sixteen_levels(t, bits, state_bits, c, line);
                int8_t *to = tile + 8 * (columns * (first / places) + c);
                vst1_s8(to, vget_low_s8(found));
                vst1_s8(to + 8 * columns, vget_high_s8(found));
            }
        }
        for (int d = 0; d < dim; d += 8) {
            const int chunk = d / 64, groups = tqai_chunk_groups(dim, 64 * chunk);
            uint16_t pairs[32];
            memcpy(pairs, tile + 8 * d, sizeof pairs);
            const uint16x8x4_t parted = vld4q_u16(pairs);
            for (int p = 0; p < 4; p++) {
                const int8x16_t eight = vreinterpretq_s8_u16(parted.val[p]);
                int16_t *to = level + UNIT * (128 * chunk + groups * (4 * h + p) + d % 64 / 16) + 2 * (d % 16);
                vst1q_s16(to, vmovl_s8(vget_low_s8(eight)));
                vst1q_s16(to + 8, vmovl_high_s8(eight));
            }
        }
    }
}

/* A function of its own for every number of bits and states, so that the loops over nibbles unroll. */
#define NEON_LEVELS(bits, state_bits)                                                                              \
    static __attribute__((noinline)) void neon_levels_##bits##_##state_bits(const tqai_codec *codec, int is_value, \
                                                                            const uint8_t *in, int16_t *level) {   \
        if (is_value) neon_values(codec, bits, state_bits, in, level);                                             \
        else neon_keys(codec, bits, state_bits, in, level);                                                        \
    }
NEON_LEVELS(1, 6) NEON_LEVELS(2, 6) NEON_LEVELS(3, 6) NEON_LEVELS(4, 6)
NEON_LEVELS(1, 8) NEON_LEVELS(2, 8) NEON_LEVELS(3, 8) NEON_LEVELS(4, 8)

static void trellis_levels_neon(const tqai_codec *codec, int is_value, const uint8_t *in, int16_t *level) {
    static void (*const of[2][4])(const tqai_codec *, int, const uint8_t *, int16_t *) = {
        {neon_levels_1_6, neon_levels_2_6, neon_levels_3_6, neon_levels_4_6},
        {neon_levels_1_8, neon_levels_2_8, neon_levels_3_8, neon_levels_4_8}};
    of[((const tqai_trellis *)codec->tables)->state_bits == 8][codec->bits - 1](codec, is_value, in, level);
}
