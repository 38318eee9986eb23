// One page of trellis codes of one segment by one warp: logits, weights, sums of values; as `page.cuh` for
// scalar codes. Lane 4 g + c reads, of the keys, tokens 8 g .. 8 g + 7 of the dimensions of part c of four, and,
// of the values, tokens 16 n + 4 c .. 16 n + 4 c + 3 (n = 0 .. 3) of the dimensions of part g of eight: what of
// a row or a token lies in which lane of a product's factor does not matter as long as both factors agree.

using Keys = Runs<DK, BK, SK, PAIRK, 4>;
using Values = Runs<DV, BV, SV, PAIRV, 8>;

// What a warp has seen so far of a segment, in base 2.
struct Running {
#if BYTESV
    float o[V_UNITS][2];  // dimensions of part g 2 u and 2 u + 1
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
    __device__ __forceinline__ static int place(int u, int h, int g) { return g * (DV / 8) + 2 * u + h; }
};

#if BYTESV
#include "trellis_bytes.cuh"
#endif
#if SPLITK || SPLITV
#include "trellis_split.cuh"
#endif
#if PARTSK || PARTSV
#include "trellis_parts.cuh"
#endif

#if !BYTESK
// Products of two tokens' keys with all query columns; x[0], x[1] for column c.
__device__ __forceinline__ void take_keys(const Query& q, const u32 (&w)[Keys::WORDS + 1], int run, float copy, int neighbour, float& x0, float& x1) {
    u32 bits[2][Keys::LENGTH / Keys::GRAIN + 1];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        const u32 next = __shfl_sync(FULL, Keys::head(w, run + t), neighbour);
#pragma unroll
        for (int at = 0; at < Keys::LENGTH; at += Keys::GRAIN) bits[t][at / Keys::GRAIN] = bits_at<Keys::LENGTH>(w, (run + t) * Keys::LENGTH, at, next);
    }
    auto level = [&](int t, int d) {
        const int at = d * BK;
        return look_up<Keys::WINDOW, COPIESK>(bits[t][at / Keys::GRAIN], at % Keys::GRAIN, copy);
    };
    float even[4] = {0.0f, 0.0f, 0.0f, 0.0f}, odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // two chains of products
#pragma unroll
    for (int s = 0; s < (PAIRK ? DK / 16 : DK / 8); ++s) {
        constexpr int STEP = Keys::STEP;
        const u32 a0 = level(0, 2 * STEP * s), a1 = level(1, 2 * STEP * s);
        const u32 a2 = level(0, 2 * STEP * s + STEP), a3 = level(1, 2 * STEP * s + STEP);
        if (PAIRK) mma_bf16(s & 1 ? odd : even, a0, a1, a2, a3, q.b[2 * s], q.b[2 * s + 1]);
        else mma_tf32(s & 1 ? odd : even, a0, a1, a2, a3, q.b[2 * s], q.b[2 * s + 1]);
    }
    x0 = (even[0] + odd[0]) + (even[1] + odd[1]);
    x1 = (even[2] + odd[2]) + (even[3] + odd[3]);
}

#endif

#if !BYTESV
// Four tokens' values times their weights (of column g / 2, part g % 2) onto the outputs.
__device__ __forceinline__ void take_values(Running& r, const u32 (&w)[Values::WORDS + 1], int run, float copy, int neighbour, const float* weights, u32 high) {
    const float4 f = *(const float4*)weights;
    const u32 b0 = __float_as_uint(part_of(f.x, high)), b1 = __float_as_uint(part_of(f.y, high));
    const u32 b2 = __float_as_uint(part_of(f.z, high)), b3 = __float_as_uint(part_of(f.w, high));
    u32 bits[4][Values::LENGTH / Values::GRAIN + 1];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        const u32 next = __shfl_sync(FULL, Values::head(w, run + t), neighbour);
#pragma unroll
        for (int at = 0; at < Values::LENGTH; at += Values::GRAIN) bits[t][at / Values::GRAIN] = bits_at<Values::LENGTH>(w, (run + t) * Values::LENGTH, at, next);
    }
    auto level = [&](int t, int d) {
        const int at = d * BV;
        return look_up<Values::WINDOW, COPIESV>(bits[t][at / Values::GRAIN], at % Values::GRAIN, copy);
    };
#pragma unroll
    for (int u = 0; u < V_UNITS; ++u) {
        if (PAIRV) {
            const u32 e0 = level(0, 2 * u), e1 = level(1, 2 * u), e2 = level(2, 2 * u), e3 = level(3, 2 * u);
            mma_bf16(r.o[u], __byte_perm(e0, e1, 0x5410), __byte_perm(e0, e1, 0x7632), __byte_perm(e2, e3, 0x5410),
                     __byte_perm(e2, e3, 0x7632), __byte_perm(b0, b1, 0x7632), __byte_perm(b2, b3, 0x7632));
        } else {
            mma_tf32(r.o[u], level(0, 2 * u), level(0, 2 * u + 1), level(1, 2 * u), level(1, 2 * u + 1), b0 & 0xffffe000u, b1 & 0xffffe000u);
            mma_tf32(r.o[u], level(2, 2 * u), level(2, 2 * u + 1), level(3, 2 * u), level(3, 2 * u + 1), b2 & 0xffffe000u, b3 & 0xffffe000u);
        }
    }
}

#endif

// `halfway` is called when all has been read of the keys, and before anything is of the values.
template <class Halfway>
__device__ __forceinline__ void take_page(const Params& p, const Shared& m, const Query& q, Running& r, const u8* data, [[maybe_unused]] const u8* mask, int page, u8* scratch, int lane, const Halfway& halfway) {
    const int g = lane >> 2, c = lane & 3;
    float x[8], w[8];
    {
        [[maybe_unused]] const float copy = copy_address<COPIESK>(m.lut_k(), lane);
        const int neighbour = (lane & ~3) | ((lane + 1) & 3);
#pragma unroll 4
        for (int block = 0; block < 8 / Keys::BLOCK; ++block) {
            u32 words[Keys::WORDS + 1];
            load_words<Keys::WORDS>(data + block * (Keys::WORDS * 128), lane, words);
            // Logits move down the register file, so that the loop need not be unrolled.
#pragma unroll
            for (int i = 0; i + Keys::BLOCK < 8; ++i) x[i] = x[i + Keys::BLOCK];
#pragma unroll
            for (int i = 0; i < Keys::BLOCK; i += 2) {
#if PARTSK
                take_part_keys(p, q, words, i, neighbour, x[8 - Keys::BLOCK + i], x[9 - Keys::BLOCK + i]);
#elif SPLITK
                take_split_keys(p, q, words, i, copy, neighbour, x[8 - Keys::BLOCK + i], x[9 - Keys::BLOCK + i]);
#else
                take_keys(q, words, i, copy, neighbour, x[8 - Keys::BLOCK + i], x[9 - Keys::BLOCK + i]);
#endif
            }
        }
    }
    const auto logit = [&](int i) { return x[i]; };
    scale_logits<true>(p, q, logit, x, w, p.levels_v.unit, data, mask, page, g, halfway);
    take_exponentials(q, r, x, w);
    // from "lane 4 g + c has tokens 8 g .. of column c" to "lane 4 g + c has tokens 16 n + 4 c .. of column g / 2"
#if BYTESV
    float heaviest = max_nan(max_nan(max_nan(w[0], w[1]), max_nan(w[2], w[3])), max_nan(max_nan(w[4], w[5]), max_nan(w[6], w[7])));
#pragma unroll
    for (int o = 4; o < 32; o *= 2) heaviest = max_nan(heaviest, __shfl_xor_sync(FULL, heaviest, o));
    const float back = heaviest * (1.0f / 65280.0f);
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
    const u32 high = g & 1 ? HIGH_BITS(PAIRV) : 0;
#endif
    [[maybe_unused]] const float copy = copy_address<COPIESV>(m.lut_v(), lane);
    const int neighbour = (lane + 4) & 31;
#pragma unroll 4
    for (int block = 0; block < 16 / Values::BLOCK; ++block) {
        u32 words[Values::WORDS + 1];
        load_words<Values::WORDS>(data + V_CODES_AT + block * (Values::WORDS * 128), lane, words);
#pragma unroll
        for (int i = 0; i < Values::BLOCK; i += 4) {
            const int group = block * (Values::BLOCK / 4) + i / 4;
#if PARTSV
            take_part_values(p, sums, words, i, neighbour, *(const u32*)(weights + 16 * group));
#elif SPLITV
            take_split_values(sums, words, i, copy, neighbour, *(const u32*)(weights + 16 * group));
#else
            take_values(r, words, i, copy, neighbour, weights + 16 * group, high);
#endif
        }
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

__device__ __forceinline__ void take_page(const Params& p, const Shared& m, const Query& q, Running& r, const u8* data, const u8* mask, int page, u8* scratch, int lane) {
    take_page(p, m, q, r, data, mask, page, scratch, lane, [] {});
}
