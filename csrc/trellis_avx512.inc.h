/* trellis_avx512.inc.h: levels of trellis codes as bytes, for the products of bytes_avx512.inc.h; with VBMI and
 * GFNI 64 at a time.
 *
 * One instruction (vgf2p8affineqb) takes 64 bytes through a linear map over GF(2), two or three of them make
 * the indices m of 64 coordinates, and one (vpermb, vpermi2b) reads their levels from a table in registers:
 *
 *   keys      bytes k, k + 1 (k + 2) of 64 tokens, for each of four coordinates; these are interleaved within
 *             128-bit lanes to four units (trellis.h says why tokens lie as they do)
 *   values    bytes of 8 tokens for each of 8 coordinates, picked from the 8 tokens' row by vpermq:
 *             qword u = coordinate 8 a + u, byte v = token v; two such are two units
 *
 * Units of 64 are those of layout.h for 2 bits; keys are levels + 128, values are signed.
 */
#include "trellis.h"

#define WITH_VBMI __attribute__((target("avx512vbmi,gfni")))
#define VBMI_INLINE static inline __attribute__((always_inline, target("avx512vbmi,gfni")))

typedef struct {
    __m512i low, high; /* 128 levels; of 64 only the low ones */
} level_bytes;

VBMI_INLINE level_bytes load_level_bytes(const tqai_trellis *t, int offset) {
    const __m512i add = _mm512_set1_epi8((char)offset);
    return (level_bytes){_mm512_add_epi8(_mm512_loadu_si512(t->levels), add),
                         _mm512_add_epi8(_mm512_loadu_si512(t->levels + 64), add)};
}

VBMI_INLINE __m512i look_up_bytes(const level_bytes *table, const int index_bits, __m512i index) {
    if (index_bits == 7) return _mm512_permutex2var_epi8(table->low, index, table->high);
    return _mm512_permutexvar_epi8(index, table->low);
}

VBMI_INLINE void trellis_key_bytes(const tqai_codec *codec, const int bits, const int three, const int index_bits,
                                   const uint8_t *in, const uint8_t *ahead, uint8_t *out) {
    const tqai_trellis *t = codec->tables;
    const int row_bytes = tqai_trellis_row_bytes(codec);
    const level_bytes table = load_level_bytes(t, 128);
    for (int a = 0; a < codec->head_dim / 8; a++) {
        __m512i line[6];
#pragma GCC unroll 6
        for (int k = 0; k < bits + 2; k++) {
            const int at = bits * a + k;
            line[k] = _mm512_loadu_si512(in + 64 * (at < row_bytes ? at : at - row_bytes));
            if (k < bits) _mm_prefetch((const char *)ahead + 64 * at, _MM_HINT_T1);
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512i of[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const int u = 4 * half + j, k = bits * u / 8;
                const uint64_t *map = t->matrices + 3 * u;
                __m512i index = _mm512_xor_si512(
                    _mm512_gf2p8affine_epi64_epi8(line[k], _mm512_set1_epi64((long long)map[0]), 0),
                    _mm512_gf2p8affine_epi64_epi8(line[k + 1], _mm512_set1_epi64((long long)map[1]), 0));
                if (three && bits * u % 8 > 5)
                    index = _mm512_xor_si512(
                        index, _mm512_gf2p8affine_epi64_epi8(line[k + 2], _mm512_set1_epi64((long long)map[2]), 0));
                of[j] = look_up_bytes(&table, index_bits, index);
            }
            const __m512i low01 = _mm512_unpacklo_epi8(of[0], of[1]), high01 = _mm512_unpackhi_epi8(of[0], of[1]);
            const __m512i low23 = _mm512_unpacklo_epi8(of[2], of[3]), high23 = _mm512_unpackhi_epi8(of[2], of[3]);
            uint8_t *to = out + 64 * 4 * (2 * a + half);
            _mm512_store_si512(to, _mm512_unpacklo_epi16(low01, low23));
            _mm512_store_si512(to + 64, _mm512_unpackhi_epi16(low01, low23));
            _mm512_store_si512(to + 128, _mm512_unpacklo_epi16(high01, high23));
            _mm512_store_si512(to + 192, _mm512_unpackhi_epi16(high01, high23));
        }
    }
}

VBMI_INLINE void trellis_value_bytes(const tqai_codec *codec, const int bits, const int three, const int index_bits,
                                     const uint8_t *in, const uint8_t *ahead, uint8_t *out) {
    const tqai_trellis *t = codec->tables;
    const int dim = codec->head_dim, row_bytes = tqai_trellis_row_bytes(codec);
    const level_bytes table = load_level_bytes(t, 0);
    int64_t first[8];
    uint64_t maps[3][8];
    for (int u = 0; u < 8; u++) {
        first[u] = bits * u / 8;
        for (int i = 0; i < 3; i++) maps[i][u] = t->matrices[3 * u + i];
    }
    const __m512i one = _mm512_loadu_si512(first), two = _mm512_add_epi64(one, _mm512_set1_epi64(1));
    const __m512i next = _mm512_add_epi64(one, _mm512_set1_epi64(2));
    const __m512i map0 = _mm512_loadu_si512(maps[0]), map1 = _mm512_loadu_si512(maps[1]), map2 = _mm512_loadu_si512(maps[2]);
    /* tokens 0 to 3, then 4 to 7, of 16 coordinates */
    const __m512i low_four = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i high_four = _mm512_add_epi32(low_four, _mm512_set1_epi32(1));
    for (int h = 0; h < 8; h++, in += 8 * row_bytes, ahead += 8 * row_bytes) {
        _Alignas(64) uint8_t last[64] = {0}; /* the bytes of the last 8 coordinates, and the first ones again */
        memcpy(last, in + 8 * (row_bytes - bits), 8 * (size_t)bits);
        memcpy(last + 8 * bits, in, 16);
        for (int b = 0; b < dim / 16; b++) {
            __m512i of[2];
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                const int a = 2 * b + j, is_last = j == 1 && a == dim / 8 - 1;
                const __m512i row = is_last ? _mm512_load_si512(last)
                                            : _mm512_maskz_loadu_epi64((__mmask8)((4 << bits) - 1), in + 8 * bits * a);
                __m512i index = _mm512_xor_si512(_mm512_gf2p8affine_epi64_epi8(_mm512_permutexvar_epi64(one, row), map0, 0),
                                                 _mm512_gf2p8affine_epi64_epi8(_mm512_permutexvar_epi64(two, row), map1, 0));
                if (three)
                    index = _mm512_xor_si512(index, _mm512_gf2p8affine_epi64_epi8(_mm512_permutexvar_epi64(next, row), map2, 0));
                of[j] = look_up_bytes(&table, index_bits, index);
            }
            _mm_prefetch((const char *)ahead + 16 * bits * b, _MM_HINT_T1);
            const int chunk = b / 4, groups = tqai_chunk_groups(dim, 64 * chunk);
            uint8_t *to = out + 64 * (64 * chunk + 2 * h * groups + b % 4);
            _mm512_store_si512(to, _mm512_permutex2var_epi32(of[0], low_four, of[1]));
            _mm512_store_si512(to + 64 * groups, _mm512_permutex2var_epi32(of[0], high_four, of[1]));
        }
    }
}

#define TRELLIS_BYTES(bits, three, index_bits)                                                                 \
    WITH_VBMI static __attribute__((noinline)) void trellis_bytes_##bits##_##three##_##index_bits(             \
        const tqai_codec *codec, int is_value, const uint8_t *in, const uint8_t *ahead, uint8_t *out) {        \
        if (is_value) trellis_value_bytes(codec, bits, three, index_bits, in, ahead, out);                     \
        else trellis_key_bytes(codec, bits, three, index_bits, in, ahead, out);                                \
    }
TRELLIS_BYTES(1, 0, 6) TRELLIS_BYTES(2, 0, 6) TRELLIS_BYTES(3, 0, 6) TRELLIS_BYTES(4, 0, 6) TRELLIS_BYTES(3, 1, 6)
TRELLIS_BYTES(1, 0, 7) TRELLIS_BYTES(2, 0, 7) TRELLIS_BYTES(3, 0, 7) TRELLIS_BYTES(4, 0, 7) TRELLIS_BYTES(3, 1, 7)

/* Without VBMI and GFNI (Intel before Ice Lake): the 16-bit levels of trellis_levels.inc.h, as bytes. */
static void trellis_bytes_plain(const tqai_codec *codec, int is_value, const uint8_t *in, uint8_t *out) {
    const int dim = codec->head_dim;
    _Alignas(64) int16_t level[2 * TQAI_MAX_HEAD_DIM * UNIT];
    tqai_kernels_avx512.steps[TQAI_TRELLIS]->unpack(codec, is_value, in, level);
    for (int unit = 0; unit < dim; unit++) {
        int half[2];
        tqai_halves(is_value, dim, unit, &half[0], &half[1]);
        for (int e = 0; e < 64; e++)
            out[64 * unit + e] = (uint8_t)(level[half[e % 4 / 2] * UNIT + 2 * (e / 4) + e % 2] + (is_value ? 0 : 128));
    }
}

/* Levels of a page side: out [head_dim units][64], 64-byte aligned. `ahead` (any address) is prefetched as `in`
 * is read. */
static void trellis_bytes(const tqai_codec *codec, int is_value, const uint8_t *in, const uint8_t *ahead, uint8_t *out) {
    const tqai_trellis *t = codec->tables;
    const int wide = t->index_bits == 7;
    if (!(__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni"))) trellis_bytes_plain(codec, is_value, in, out);
    else if (codec->bits == 1) (wide ? trellis_bytes_1_0_7 : trellis_bytes_1_0_6)(codec, is_value, in, ahead, out);
    else if (codec->bits == 2) (wide ? trellis_bytes_2_0_7 : trellis_bytes_2_0_6)(codec, is_value, in, ahead, out);
    else if (codec->bits == 4) (wide ? trellis_bytes_4_0_7 : trellis_bytes_4_0_6)(codec, is_value, in, ahead, out);
    else if (t->state_bits == 6) (wide ? trellis_bytes_3_0_7 : trellis_bytes_3_0_6)(codec, is_value, in, ahead, out);
    else (wide ? trellis_bytes_3_1_7 : trellis_bytes_3_1_6)(codec, is_value, in, ahead, out);
}
