// One page of trellis codes of one segment by one warp: logits, weights, sums of values; as `page.cuh` for
// scalar codes. Lane 4 g + c reads, of the keys, tokens 8 g .. 8 g + 7 of the dimensions of part c of four, and,
// of the values, tokens 16 n + 4 c .. 16 n + 4 c + 3 (n = 0 .. 3) of the dimensions of part g of eight: what of
// a row or a token lies in which lane of a product's factor does not matter as long as both factors agree.

using Keys = Runs<DK, BK, SK, PAIRK, 4>;
using Values = Runs<DV, BV, SV, PAIRV, 8>;

// What a warp has seen so far of a segment, in base 2.
struct Running {
#if BYTESV
    float o[V_UNITS][2];  // two dimensions of part g, see `place`
#else
    float o[V_UNITS][4];  // dimension of part g 2 u, high and low part of the weights; then dimension 2 u + 1
#endif
    float top, sum;

    __device__ __forceinline__ void clear() {
        top = NOTHING;
        sum = 0.0f;
#pragma unroll
        for (int u = 0; u < V_UNITS; ++u) set(u, 0, 0.0f), set(u, 1, 0.0f);
    }
    // The h-th output of unit u, and its place among the outputs.
#if BYTESV
    __device__ __forceinline__ float out(int u, int h) const { return o[u][h]; }
    __device__ __forceinline__ void set(int u, int h, float y) { o[u][h] = y; }
#else
    __device__ __forceinline__ float out(int u, int h) const { return o[u][2 * h] + o[u][2 * h + 1]; }
    __device__ __forceinline__ void set(int u, int h, float y) {
        o[u][2 * h] = y;
        o[u][2 * h + 1] = 0.0f;
    }
#endif
    __device__ __forceinline__ void fade(float f) {
        sum *= f;
#pragma unroll
        for (int u = 0; u < V_UNITS; ++u)
#pragma unroll
            for (int i = 0; i < (BYTESV ? 2 : 4); ++i) o[u][i] *= f;
    }
    __device__ __forceinline__ static int place(int u, int h, int g) {
        // as `PageSums` have the dimensions of a part
        const int first = SUMSV || TWOV ? 8 * (u / 4) + 4 * (u & 1) : 2 * u;
        return g * (DV / 8) + first + (SUMSV ? 2 * h + (u >> 1 & 1) : TWOV ? (u & 2) + h : h);
    }
};

#if BYTESV
#include "trellis_bytes.cuh"
#endif
#if !BYTESK || !BYTESV
#include "trellis_floats.cuh"
#endif
#if PAIRK || PAIRV
#include "trellis_pairs.cuh"
#endif
#if SPLITK || SPLITV
#include "trellis_split.cuh"
#endif
#if SUMSK || SUMSV
#include "trellis_sums.cuh"
#endif
#if TWOV
#include "trellis_split_two.cuh"
#endif
#if PARTSK || PARTSV
#include "trellis_parts.cuh"
#endif
#include "trellis_held.cuh"

// `ask` is called when the keys and n = 0, 1, ... blocks of values have been used.
template <class Ask>
__device__ __forceinline__ void take_page(const Params& p, const Shared& m, const Query& q, Running& r, const Held& page, [[maybe_unused]] const u8* mask, int number, u8* scratch, int lane, const Ask& ask) {
    const int g = lane >> 2, c = lane & 3;
    float x[8], w[8];
    {
        [[maybe_unused]] const float copy = copy_address<COPIESK>(m.lut_k(), lane);
        const int neighbour = (lane & ~3) | ((lane + 1) & 3);
#pragma unroll
        for (int block = 0; block < Held::KEY_BLOCKS; ++block) {
            const u32(&words)[Keys::WORDS + 1] = page.keys[block];
#pragma unroll
            for (int i = 0; i < Keys::BLOCK; i += 2) {
                float &x0 = x[block * Keys::BLOCK + i], &x1 = x[block * Keys::BLOCK + i + 1];
#if PARTSK
                take_part_keys(p, q, words, i, neighbour, x0, x1);
#elif SUMSK
                take_sum_keys(p, q, words, i, copy, neighbour, x0, x1);
#elif SPLITK
                take_split_keys(p, q, words, i, copy, lane, neighbour, x0, x1);
#elif PAIRK
                take_pair_keys(p, q, words, i, copy, neighbour, x0, x1);
#else
                take_float_keys(q, words, i, copy, neighbour, x0, x1);
#endif
            }
        }
    }
    const auto logit = [&](int i) { return x[i]; };
    ask(0);
    scale_logits<!BYTESV>(p, q, logit, x, w, p.levels_v.unit, page.key_scales, page.value_scales, mask, number, g);
    take_exponentials(q, r, x, w);
    // from "lane 4 g + c has tokens 8 g .. of column c" to "lane 4 g + c has tokens 16 n + 4 c .. of column g / 2"
#if BYTESV
    float heaviest = max_nan(max_nan(max_nan(w[0], w[1]), max_nan(w[2], w[3])), max_nan(max_nan(w[4], w[5]), max_nan(w[6], w[7])));
#pragma unroll
    for (int o = 4; o < 32; o *= 2) heaviest = max_nan(heaviest, __shfl_xor_sync(FULL, heaviest, o));
    const float back = heaviest * (p.levels_v.unit * (1.0f / 65280.0f));
    __syncwarp();
    pass_weights(w, 65280.0f * rcp_fast(heaviest), scratch, g, c);
    __syncwarp();
    const u8* weights = scratch + g * WEIGHT_ROW + 4 * c;
    PageSums sums = {};
#if PARTSV
    begin_sums(sums, weights);
#endif
#else
    __syncwarp();
    float* pass = (float*)scratch + c * WEIGHT_PITCH + 8 * g;
    *(float4*)pass = make_float4(w[0], w[1], w[2], w[3]);
    *(float4*)(pass + 4) = make_float4(w[4], w[5], w[6], w[7]);
    __syncwarp();
    const float* weights = (const float*)scratch + (g >> 1) * WEIGHT_PITCH + 4 * c;
    const u32 high = g & 1 ? TF32_BITS : 0;
#endif
    [[maybe_unused]] const float copy = copy_address<COPIESV>(m.lut_v(), lane);
    const int neighbour = (lane + 4) & 31;
#pragma unroll
    for (int block = 0; block < Held::VALUE_BLOCKS; ++block) {
        const u32(&words)[Values::WORDS + 1] = page.values[block];
#pragma unroll
        for (int i = 0; i < Values::BLOCK; i += 4) {
            const int group = block * (Values::BLOCK / 4) + i / 4;
#if PARTSV
            take_part_values(p, sums, words, i, neighbour, *(const u32*)(weights + 16 * group));
#elif SUMSV
            take_sum_values(p, sums, words, i, copy, neighbour, *(const u32*)(weights + 16 * group));
#elif TWOV
            take_two_values(p, sums, words, i, copy, neighbour, *(const u32*)(weights + 16 * group));
#elif SPLITV
            take_split_values(p, sums, words, i, copy, lane, neighbour, *(const u32*)(weights + 16 * group));
#elif PAIRV
            take_pair_values(p, sums, words, i, copy, neighbour, *(const u32*)(weights + 16 * group));
#else
            take_float_values(r, words, i, copy, neighbour, weights + 16 * group, high);
#endif
        }
        ask(block + 1);
    }
#if BYTESV
#pragma unroll
    for (int u = 0; u < V_UNITS; ++u) {
        const int* even = sums.even[u / 2] + u % 2 * 2;
        const int* odd = sums.odd[u / 2] + u % 2 * 2;
        r.o[u][0] = fmaf((float)(even[0] * p.times256 + even[1]), back, r.o[u][0]);
        r.o[u][1] = fmaf((float)(odd[0] * p.times256 + odd[1]), back, r.o[u][1]);
    }
#endif
}
