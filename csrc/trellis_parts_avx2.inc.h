/* trellis_parts_avx2.inc.h: levels of trellis codes of 4 bits with AVX2, which are sums of two parts (docs/format.md);
 * included by trellis_avx2.inc.h.
 *
 * A window is three nibbles. Two indices of 16, so that neither has to be taken out of the other; a byte shuffle each
 * looks up their parts. Bits of the index of trellis.h:
 *
 *   0 to 3, first[]    64 states: nibble 0 ^ map of nibble 1
 *                      256: nibble 0 ^ bits 1 to 4 of nibbles 1 and 2, shifts where one byte holds both, else two maps
 *   4 to 6, second[]   64 states: bits 4, 6, 5 as | 0 2 1 |: bits 0 and 1 of nibble 2 ^ map of nibble 1
 *                      256: as | 6 5 4 - |: nibble 2, bit 0 of which does not count, ^ map of nibble 1
 *
 * as the terms of docs/format.md have it: nibble 0 is in no second index. Tables and maps are few enough for registers,
 * so that a page side goes through the cache once, into the buffers drawn there. With the products in the same loop the
 * time is the same.
 */
typedef struct {
    __m256i to_first[3], to_second; /* of nibbles 1 and 2 (256 states), of nibble 1 */
    __m256i first, second;          /* levels + 128 */
} part_tables;

INLINE int place_of_second(const int state_bits, int bits) { return state_bits == 8 ? 2 * bits : bits >> 1 | (bits & 1) << 2; }

INLINE part_tables load_part_tables(const tqai_codec *codec, const int state_bits) {
    const tqai_trellis *t = codec->tables;
    const int8_t *levels = t->nibble_levels;
    uint8_t to_second[16], second[16] = {0};
    for (int i = 0; i < 16; i++) {
        to_second[i] = (uint8_t)place_of_second(state_bits, t->nibbles[16 + i] >> 4);
        const int place = place_of_second(state_bits, i / 2);
        second[place] = second[place | (state_bits == 8)] = (uint8_t)(levels[16 * (i / 2)] - levels[0]);
    }
    part_tables p = {.to_second = sixteen_bytes(to_second), .second = sixteen_bytes(second)};
    p.first = _mm256_add_epi8(sixteen_bytes((const uint8_t *)levels), _mm256_set1_epi8(-128));
    for (int j = 1; j < 3; j++) p.to_first[j] = _mm256_and_si256(sixteen_bytes(t->nibbles + 16 * j), _mm256_set1_epi8(15));
    return p;
}

/* Levels + 128 of the windows that begin at nibble[0]; `line`: nibbles 1 and 2 of them where `in_line`. */
INLINE __m256i levels_of_parts(const part_tables *p, const int state_bits, const __m256i *nibble, const int in_line,
                               __m256i line) {
    __m256i first, second = nibble[2];
    if (state_bits == 8 && in_line) {
        first = _mm256_and_si256(_mm256_srli_epi16(line, 1), _mm256_set1_epi8(15));
    } else {
        first = _mm256_shuffle_epi8(p->to_first[1], nibble[1]);
        if (state_bits == 8) first = _mm256_xor_si256(first, _mm256_shuffle_epi8(p->to_first[2], nibble[2]));
    }
    if (state_bits == 6) second = _mm256_and_si256(second, _mm256_set1_epi8(3));
    first = _mm256_xor_si256(first, nibble[0]);
    second = _mm256_xor_si256(second, _mm256_shuffle_epi8(p->to_second, nibble[1]));
    return _mm256_add_epi8(_mm256_shuffle_epi8(p->first, first), _mm256_shuffle_epi8(p->second, second));
}

/* Levels of a page, buffer [COLUMNS][head_dim / 2][32]. */
INLINE void key_levels_of_parts(const tqai_codec *codec, const int state_bits, const uint8_t *in, const uint8_t *next,
                                uint8_t *buffer) {
    const int64_t apart = 32 * tqai_trellis_row_bytes(codec); /* of the halves of a row */
    const part_tables p = load_part_tables(codec, state_bits);
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
                const __m256i line = two_lines(from + 64, second, upper);
                part_nibbles(line, nibble + 2);
                at[0] = levels_of_parts(&p, state_bits, nibble, 0, line);
                at[1] = levels_of_parts(&p, state_bits, nibble + 1, 1, line);
                nibble[0] = nibble[2];
                nibble[1] = nibble[3];
            }
        }
}

/* Levels of a page, buffer [row bytes / 4][2 columns][8 h][32]. */
INLINE void value_levels_of_parts(const tqai_codec *codec, const int state_bits, const uint8_t *in, const uint8_t *next,
                                  uint8_t *buffer) {
    const int row_bytes = tqai_trellis_row_bytes(codec);
    const part_tables p = load_part_tables(codec, state_bits);
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
            to[h] = levels_of_parts(&p, state_bits, nibble, 0, after);
            to[8 + h] = levels_of_parts(&p, state_bits, nibble + 1, 1, after);
        }
}
