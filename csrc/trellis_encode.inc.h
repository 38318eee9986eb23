/* trellis_encode.inc.h: the Viterbi algorithm of core/viterbi.py, many vectors at once; included by each
 * ISA's file after codes.inc.h.
 *
 * A lane is a vector; a register holds the path sum of one state, or the distance to one level, of LANES
 * vectors. Per step, with K = 2^bits and P = states / K:
 *
 *   distance[m]            of the target to each of the 64 or 128 levels, once
 *   sum'[P r + p]          = min over k of  sum[K p + k] + distance[index of window (P r + p) K + k]
 *
 * so the K sums of one p are read once for all r. The sums are kept, those of eight states of a vector beside
 * each other; which k it was is found again on the way back. Every instruction set computes the same numbers, of 16 bits:
 *
 *   targets, levels    in 1/128 level, targets at most 256 levels
 *   distances          d (d + 2 o) of d = level to the target, or to the outermost level for targets o beyond it
 *                      (what d^2 then adds is the same for all levels); d and d + 2 o count at most as 256, 128,
 *                      64 or 64 levels for 1, 2, 3, 4 bits, which is 2^14
 *   sums               less the least of them; at most 2^16 - 1, four times the largest distance
 */
#include <stdlib.h>

#include "trellis.h"
#include "trellis_lanes.h"

#define SEAM_STEPS 64
#define TARGET_UNITS 128 /* per level */
#define MOST_LEVEL 127
#define GRAIN (TQAI_PAGE_TOKENS / LANES)

/* Levels beyond which all are equally far: 256, 128, 64, 64 for 1, 2, 3, 4 bits. */
static inline int doublings_of(int bits) { return bits >= 3 ? 2 : bits - 1; }

/* sums: [2][states][LANES], those before even steps and those before odd steps; before the first they are the
 * caller's. kept: [steps - keep][states / 8][8 LANES], those before steps `keep` and later, as l_transpose leaves
 * them. The target of the first step is at target + 64 first, that of the last coordinate is followed by the first's. */
static inline __attribute__((always_inline)) void path_sums(const tqai_trellis *t, const int bits, const int state_bits,
                                                            const int16_t *target, int first, int steps, int dim,
                                                            uint16_t *sums, int keep, uint16_t *kept) {
    const int states = 1 << state_bits, choices = 1 << bits, parts = states / choices, levels = 1 << t->index_bits;
    _Alignas(64) uint16_t distance[128 * LANES];
    int at = first;
    for (int step = 0; step < steps; step++, at = at + 1 == dim ? 0 : at + 1) {
        const uint16_t *restrict from = sums + step % 2 * states * LANES;
        uint16_t *restrict to = sums + (step + 1) % 2 * states * LANES;
        if (step >= keep)
            for (int s = 0; s < states; s += 8, kept += 8 * LANES) l_transpose(from + s * LANES, kept);
        const lanes z = l_load((const uint16_t *)target + 64 * at);
        const lanes inner = l_within(z, l_set(MOST_LEVEL * TARGET_UNITS)), over = l_less(z, inner, 1 + doublings_of(bits));
        for (int m = 0; m < levels; m++) {
            const lanes d = l_less(inner, l_set(t->levels[m] * TARGET_UNITS), doublings_of(bits));
            l_store(distance + m * LANES, l_product(d, over));
        }
        lanes least = l_set(-1);
        for (int p = 0; p < parts; p++) {
            lanes before[16];
#pragma GCC unroll 16
            for (int k = 0; k < choices; k++) before[k] = l_load(from + (choices * p + k) * LANES);
            for (int r = 0; r < choices; r++) {
                const int state = parts * r + p;
                const uint8_t *index = t->window_index + choices * state;
                lanes best = l_add_limited(before[0], l_load(distance + index[0] * LANES));
#pragma GCC unroll 16
                for (int k = 1; k < choices; k++)
                    best = l_least(best, l_add_limited(before[k], l_load(distance + index[k] * LANES)));
                l_store(to + state * LANES, best);
                least = l_least(least, best);
            }
        }
        if (bits <= 2 || step % 2)
            for (int s = 0; s < states; s++) l_store(to + s * LANES, l_sub(l_load(to + s * LANES), least));
    }
}

static inline int limited16(int x) { return x > 32767 ? 32767 : x < -32768 ? -32768 : x; }

/* Which of the `choices` windows from `base` on is the cheapest end of a path, the first of equals: `from` has
 * the sums before it, the second eight 8 LANES further. The numbers are those of path_sums. */
#ifdef __AVX2__
static inline __attribute__((always_inline)) int cheapest(const tqai_trellis *t, const int bits, int inner, int over,
                                                          int base, const uint16_t *from) {
    const int choices = 1 << bits;
    unsigned best = ~0u;
#pragma GCC unroll 2
    for (int half = 0; half < choices; half += 8) {
        __m128i sums = _mm_set1_epi16(-1);
        if (choices >= 8) sums = _mm_loadu_si128((const __m128i *)(from + half * LANES));
        else memcpy(&sums, from, 2 * (size_t)choices);
        const __m128i bytes = _mm_loadl_epi64((const __m128i *)(t->window_levels + base + half));
        __m128i d = _mm_subs_epi16(_mm_set1_epi16((short)inner), _mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7));
#pragma GCC unroll 2
        for (int i = 0; i < doublings_of(bits); i++) d = _mm_adds_epi16(d, d);
        const __m128i distance = _mm_mulhi_epi16(d, _mm_adds_epi16(d, _mm_set1_epi16((short)over)));
        const __m128i least = _mm_minpos_epu16(_mm_adds_epu16(sums, distance));
        const unsigned both = (unsigned)_mm_cvtsi128_si32(least); /* | k | cost | */
        const unsigned cost = (both & 0xFFFFu) << 4 | both >> 16 | (unsigned)half;
        best = cost < best ? cost : best;
    }
    return base | (int)(best & 15u);
}
#else
static inline __attribute__((always_inline)) int cheapest(const tqai_trellis *t, const int bits, int inner, int over,
                                                          int base, const uint16_t *from) {
    unsigned best = ~0u;
    for (int k = 0; k < 1 << bits; k++) {
        int d = limited16(inner - t->window_levels[base + k] * TARGET_UNITS);
        for (int i = 0; i < doublings_of(bits); i++) d = limited16(2 * d);
        unsigned cost = from[k / 8 * 8 * LANES + k % 8] + (unsigned)(d * limited16(d + over) >> 16);
        cost = (cost > 65535u ? 65535u : cost) << 4 | (unsigned)k;
        best = cost < best ? cost : best;
    }
    return base | (int)(best & 15u);
}
#endif

/* Back from the states after step `last` to those before step `until`, all lanes step by step, as their ways
 * do not wait for each other; codes (the low bits of the windows) where not null. */
static inline __attribute__((always_inline)) void way_back(const tqai_trellis *t, const int bits, const int state_bits,
                                                           const int16_t *target, int first, int dim,
                                                           const uint16_t *kept, int *state, int last, int until,
                                                           uint8_t *codes) {
    const int states = 1 << state_bits, choices = 1 << bits;
    int at = (first + last) % dim;
    for (int step = last; step >= until; step--, at = at ? at - 1 : dim - 1) {
        const uint16_t *sum = kept + (size_t)(step - until) * (size_t)(states * LANES);
        uint16_t inner[LANES], over[LANES];
        const lanes z = l_load((const uint16_t *)target + 64 * at), within = l_within(z, l_set(MOST_LEVEL * TARGET_UNITS));
        l_store(inner, within);
        l_store(over, l_less(z, within, 1 + doublings_of(bits)));
        for (int l = 0; l < LANES; l++) {
            const int base = state[l] * choices;
            const int before = base & (states - 1);
            const uint16_t *from = sum + before / 8 * 8 * LANES + l % 8 * LANES + l / 8 * 8 + before % 8;
            const int window = cheapest(t, bits, (int16_t)inner[l], (int16_t)over[l], base, from);
            if (codes) codes[64 * at + l] = (uint8_t)(window & (choices - 1));
            state[l] = window & (states - 1);
        }
    }
}

static inline __attribute__((always_inline)) void encode_lanes(const tqai_trellis *t, const int bits, const int state_bits,
                                                               const int16_t *target, int dim, uint16_t *sums,
                                                               uint8_t *codes) {
    const int states = 1 << state_bits, seam_first = (dim - SEAM_STEPS % dim) % dim;
    uint16_t *kept = sums + 2 * states * LANES;
    int state[LANES] = {0};
    memset(sums, 0, sizeof *sums * (size_t)(states * LANES));
    path_sums(t, bits, state_bits, target, seam_first, 2 * SEAM_STEPS, dim, sums, SEAM_STEPS, kept);
    for (int s = 1; s < states; s++) /* an even number of steps: the last sums are in the first half */
        for (int l = 0; l < LANES; l++)
            if (sums[s * LANES + l] < sums[state[l] * LANES + l]) state[l] = s;
    way_back(t, bits, state_bits, target, seam_first, dim, kept, state, 2 * SEAM_STEPS - 1, SEAM_STEPS, NULL);
    memset(sums, 0xFF, sizeof *sums * (size_t)(states * LANES));
    for (int l = 0; l < LANES; l++) sums[state[l] * LANES + l] = 0;
    path_sums(t, bits, state_bits, target, 0, dim, dim, sums, 0, kept);
    way_back(t, bits, state_bits, target, 0, dim, kept, state, dim - 1, 0, codes);
}

/* A function of its own for every number of bits and states, so that the loops over choices unroll. */
#define TRELLIS_ENCODER(bits, state_bits)                                                                            \
    static __attribute__((noinline)) void encode_##bits##_##state_bits(const tqai_trellis *t, const int16_t *target, \
                                                                       int dim, uint16_t *sums, uint8_t *codes) {   \
        encode_lanes(t, bits, state_bits, target, dim, sums, codes);                                                 \
    }
TRELLIS_ENCODER(1, 6) TRELLIS_ENCODER(2, 6) TRELLIS_ENCODER(3, 6) TRELLIS_ENCODER(4, 6)
TRELLIS_ENCODER(1, 8) TRELLIS_ENCODER(2, 8) TRELLIS_ENCODER(3, 8) TRELLIS_ENCODER(4, 8)
typedef void (*trellis_encoder)(const tqai_trellis *, const int16_t *, int, uint16_t *, uint8_t *);
static const trellis_encoder trellis_encoders[2][4] = {{encode_1_6, encode_2_6, encode_3_6, encode_4_6},
                                                       {encode_1_8, encode_2_8, encode_3_8, encode_4_8}};

/* Targets [dim][64] of 16 rows, in 1/128 level, at most 256 levels; the rotated rows [dim][16] go to x, their
 * norms and exponents beside. */
static void targets16(const tqai_codec *codec, const void *rows, int64_t row_stride, int dtype, float *restrict x,
                      int16_t *restrict target, float *restrict norm, int *restrict exponent, int *restrict kind) {
    const tqai_trellis *t = codec->tables;
    const int dim = codec->head_dim;
    float row[TQAI_MAX_HEAD_DIM], up[16];
    for (int l = 0; l < 16; l++) {
        to_float(at(rows, dtype, l * row_stride), dtype, dim, row);
        uint32_t largest = 0;
        for (int i = 0; i < dim; i++) {
            const uint32_t magnitude = float_to_bits(row[i]) & 0x7FFFFFFFu;
            largest = magnitude > largest ? magnitude : largest;
        }
        kind[l] = largest >= 0x7F800000u ? 2 : largest < 0x00800000u ? 1 : 0; /* not finite, zero, usable */
        exponent[l] = kind[l] ? 0 : (int)(largest >> 23) - 127;
        const float down = bits_to_float((uint32_t)(127 - exponent[l] / 2) << 23);
        const float rest = bits_to_float((uint32_t)(127 - (exponent[l] - exponent[l] / 2)) << 23);
        for (int i = 0; i < dim; i++) x[16 * i + l] = kind[l] ? 0.0f : row[i] * down * rest;
        norm[l] = 0.0f;
    }
    rotate16(codec, x, 0);
    for (int i = 0; i < dim; i++)
        for (int l = 0; l < 16; l++) norm[l] += x[16 * i + l] * x[16 * i + l];
    for (int l = 0; l < 16; l++) {
        norm[l] = norm[l] > 0.0f ? sqrtf(norm[l]) : 1.0f;
        up[l] = t->per_deviation * (float)TARGET_UNITS / norm[l];
    }
    for (int i = 0; i < dim; i++)
        for (int l = 0; l < 16; l++) {
            float z = x[16 * i + l] * up[l];
            z = z > 32767.0f ? 32767.0f : z;
            z = z < -32767.0f ? -32767.0f : z;
            target[64 * i + l] = (int16_t)lrintf(z);
        }
}

/* Values of 16 rows of codes [dim][64], as [dim][16]. */
static void values16(const tqai_codec *codec, const uint8_t *restrict codes, float *restrict value) {
    const tqai_trellis *t = codec->tables;
    const int dim = codec->head_dim, bits = codec->bits, top = t->state_bits;
    uint32_t window[16] = {0};
    /* the window of coordinate i is its code and the low bits of window i + 1 */
    for (int i = dim + 7; i >= 0; i--) {
        const uint8_t *code = codes + 64 * (i % dim);
        for (int l = 0; l < 16; l++) window[l] = ((window[l] << bits) | code[l]) & ((1u << (top + bits)) - 1u);
        if (i < dim)
            for (int l = 0; l < 16; l++) value[16 * i + l] = t->values[window[l]];
    }
}

static void trellis_pack(const tqai_codec *codec, int is_value, const uint8_t *codes, uint8_t *out) {
    const int bits = codec->bits, row_bytes = tqai_trellis_row_bytes(codec);
    for (int token = 0; token < TQAI_PAGE_TOKENS; token++) {
        uint32_t held = 0;
        int have = 0, k = 0;
        for (int i = 0; i < codec->head_dim; i++) {
            held |= (uint32_t)codes[64 * i + token] << have;
            for (have += bits; have >= 8; have -= 8, held >>= 8)
                out[tqai_trellis_place(is_value, row_bytes, token, k++)] = (uint8_t)held;
        }
    }
}

static void trellis_unpack(const tqai_codec *codec, int is_value, const uint8_t *in, uint8_t *codes) {
    const int bits = codec->bits, row_bytes = tqai_trellis_row_bytes(codec);
    for (int token = 0; token < TQAI_PAGE_TOKENS; token++) {
        uint32_t held = 0;
        int have = 0, k = 0;
        for (int i = 0; i < codec->head_dim; i++) {
            for (; have < bits; have += 8)
                held |= (uint32_t)in[tqai_trellis_place(is_value, row_bytes, token, k++)] << have;
            codes[64 * i + token] = (uint8_t)(held & ((1u << bits) - 1u));
            held >>= bits;
            have -= bits;
        }
    }
}

static void trellis_encode_side(const tqai_codec *codec, int is_value, const void *rows, int64_t row_stride, int dtype,
                                uint8_t *out, uint16_t *scales) {
    const tqai_trellis *t = codec->tables;
    const int dim = codec->head_dim, longest = dim > SEAM_STEPS ? dim : SEAM_STEPS;
    _Alignas(64) float x[4][16 * TQAI_MAX_HEAD_DIM];
    _Alignas(64) int16_t target[64 * TQAI_MAX_HEAD_DIM];
    uint8_t codes[64 * TQAI_MAX_HEAD_DIM];
    float norm[64], value[16 * TQAI_MAX_HEAD_DIM];
    int exponent[64], kind[64];
    for (int g = 0; g < 4; g++)
        targets16(codec, at(rows, dtype, 16 * g * row_stride), row_stride, dtype, x[g], target + 16 * g, norm + 16 * g,
                  exponent + 16 * g, kind + 16 * g);
    const size_t bytes = sizeof(uint16_t) * ((size_t)(longest + 2) << t->state_bits) * LANES;
    uint16_t *sums = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (sums)
        for (int part = 0; part < GRAIN; part++)
            trellis_encoders[t->state_bits == 8][codec->bits - 1](t, target + LANES * part, dim, sums, codes + LANES * part);
    for (int l = 0; l < 64; l++)
        if (kind[l] || !sums)
            for (int i = 0; i < dim; i++) codes[64 * i + l] = 0;
    for (int g = 0; g < 4; g++) {
        float product[16] = {0}, square[16] = {0};
        values16(codec, codes + 16 * g, value);
        for (int i = 0; i < dim; i++)
            for (int l = 0; l < 16; l++) {
                product[l] += x[g][16 * i + l] * value[16 * i + l];
                square[l] += value[16 * i + l] * value[16 * i + l];
            }
        for (int l = 0; l < 16; l++) {
            const int row = 16 * g + l;
            double scale = codec->scale_norm ? (double)norm[row] : (double)product[l] / (double)square[l];
            scale = ldexp(scale, exponent[row]);
            if (scale > 0x1.fep127) scale = 0x1.fep127;
            /* without memory for the sums nothing is coded, and NaN says so */
            scales[row] = kind[row] == 2 || !sums ? 0x7FC0 : kind[row] ? 0 : to_bf16((float)scale);
        }
    }
    free(sums);
    trellis_pack(codec, is_value, codes, out);
}

static void trellis_decode_side(const tqai_codec *codec, int is_value, const uint8_t *in, const float *scales,
                                int dtype, void *out) {
    const int dim = codec->head_dim;
    const float largest = dtype == TQAI_FLOAT16 ? 65504.0f : dtype == TQAI_BFLOAT16 ? 0x1.fep127f : FLT_MAX;
    uint8_t codes[64 * TQAI_MAX_HEAD_DIM];
    float x[16 * TQAI_MAX_HEAD_DIM], row[TQAI_MAX_HEAD_DIM];
    trellis_unpack(codec, is_value, in, codes);
    for (int t = 0; t < TQAI_PAGE_TOKENS; t += 16) {
        values16(codec, codes + t, x);
        rotate16(codec, x, 1); /* the scale comes last: the rotation of a huge vector could overflow */
        for (int l = 0; l < 16; l++) {
            const float scale = scales[t + l];
            for (int i = 0; i < dim; i++) {
                float value = x[16 * i + l] * scale;
                value = value > largest ? largest : value;
                row[i] = value < -largest ? -largest : value;
            }
            from_float(row, dtype, dim, (char *)out + (size_t)(t + l) * (size_t)dim * (dtype == TQAI_FLOAT32 ? 4 : 2));
        }
    }
}
