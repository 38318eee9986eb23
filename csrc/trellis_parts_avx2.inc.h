/* trellis_parts_avx2.inc.h: levels of trellis codes of 4 bits with AVX2, which are sums of two parts (docs/format.md);
 * included by trellis_avx2.inc.h.
 *
 * The nibbles of a window make the index of 32 levels as in trellis_levels_avx2.inc.h; two byte shuffles look up the
 * parts:
 *
 *   index byte   | 0 | 6 5 4 3 2 1 0 |      first[bits 3 .. 0] + second[bits 6 .. 3]
 *
 * (bit 3 counts in both, so that the nibble that maps to itself may add to the second index.) Tables and maps are few
 * enough for registers, so that a page side goes through the cache once, into the buffers drawn there. With the
 * products in the same loop the time is the same.
 */
typedef struct {
    __m256i map[3], first, second; /* of the three nibbles; levels + 128 */
} part_tables;

INLINE part_tables load_part_tables(const tqai_codec *codec) {
    const tqai_trellis *t = codec->tables;
    const int8_t *levels = t->nibble_levels;
    int8_t second[16];
    for (int i = 0; i < 16; i++) second[i] = (int8_t)(levels[8 * i] - levels[8 * (i % 2)]);
    part_tables p = {.first = _mm256_add_epi8(sixteen_bytes((const uint8_t *)levels), _mm256_set1_epi8(-128)),
                     .second = sixteen_bytes((const uint8_t *)second)};
    for (int j = 0; j < 3; j++) p.map[j] = sixteen_bytes(t->nibbles + 16 * j);
    return p;
}

/* Levels + 128 of the windows that begin at nibble[0]. */
INLINE __m256i levels_of_parts(const part_tables *p, const int state_bits, const __m256i *nibble) {
    const int direct = tqai_trellis_direct(4, state_bits, 0);
    __m256i index = nibble[direct];
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++)
        if (j != direct) index = _mm256_xor_si256(index, _mm256_shuffle_epi8(p->map[j], nibble[j]));
    const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(index, 3), _mm256_set1_epi8(15));
    return _mm256_add_epi8(_mm256_shuffle_epi8(p->first, index), _mm256_shuffle_epi8(p->second, upper));
}

/* Levels of a page, buffer [COLUMNS][head_dim / 2][32]. */
INLINE void key_levels_of_parts(const tqai_codec *codec, const int state_bits, const uint8_t *in, const uint8_t *next,
                                uint8_t *buffer) {
    const int64_t apart = 32 * tqai_trellis_row_bytes(codec); /* of the halves of a row */
    const part_tables p = load_part_tables(codec);
    __m256i *at = (__m256i *)buffer;
#pragma GCC unroll 2
    for (int upper = 0; upper < 2; upper++)
#pragma GCC unroll 1
        for (int half = 0; half < 2; half++) {
            const uint8_t *from = in + 32 * half, *end = from + apart;
            __m256i nibble[4];
            part_nibbles(two_lines(from, end, upper), nibble);
#pragma GCC unroll 2
            for (; from < end; from += 64, at += 2, next += 32) {
                const uint8_t *second = from + 64 < end ? from + 64 + apart : in + 32 * half; /* the first half follows it */
                _mm_prefetch((const char *)next, _MM_HINT_T1);
                part_nibbles(two_lines(from + 64, second, upper), nibble + 2);
                at[0] = levels_of_parts(&p, state_bits, nibble);
                at[1] = levels_of_parts(&p, state_bits, nibble + 1);
                nibble[0] = nibble[2];
                nibble[1] = nibble[3];
            }
        }
}

/* Levels of a page, buffer [row bytes / 4][2 columns][8 h][32]. */
INLINE void value_levels_of_parts(const tqai_codec *codec, const int state_bits, const uint8_t *in, const uint8_t *next,
                                  uint8_t *buffer) {
    const int row_bytes = tqai_trellis_row_bytes(codec);
    const part_tables p = load_part_tables(codec);
    __m256i *to = (__m256i *)buffer;
#pragma GCC unroll 1
    for (int place = 0; place < row_bytes; place += 4, to += 16)
#pragma GCC unroll 2
        for (int h = 0; h < 8; h++) {
            const uint8_t *row = in + 8 * row_bytes * h, *at = row + 8 * place;
            __m256i nibble[4], after = _mm256_loadu_si256((const __m256i *)(at + 8));
            if (place + 4 == row_bytes) /* the first place follows the last one */
                after = _mm256_blend_epi32(after, _mm256_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)row)), 0xC0);
            if (h % 2) _mm_prefetch((const char *)next + 64 * place + 32 * (h - 1), _MM_HINT_T1);
            part_nibbles(_mm256_loadu_si256((const __m256i *)at), nibble);
            part_nibbles(after, nibble + 2);
            to[h] = levels_of_parts(&p, state_bits, nibble);
            to[8 + h] = levels_of_parts(&p, state_bits, nibble + 1);
        }
}
