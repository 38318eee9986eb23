// Pages of trellis codes from vectors: rotate, the Viterbi algorithm of core/viterbi.py, scale, pack. A block has the 64
// tokens of one side of a page, each of its warps tokens t and t + 32 for a few t. The warps meet only to pack.
//
// Macros: HEAD_DIM, CODE_BITS, BITS_OF_STATE, HADAMARD_ROUNDS (0: a matrix), DTYPE (of the vectors); UNIT_SIXTEENTHS,
// MOST and BEYOND (see `trellis_distance.cuh`); INDEX_BITS of a level's index and ROW0 .. ROW6, the masks of the window
// that make it (core/trellis_code.py); WARPS of a block (4 with 64 states) and BLOCKS on a multiprocessor; APART0 and
// APART1 (see `trellis_circles.cuh`). DK, DV, BK, BV of device.cuh are not used but wanted.

#include "device.cuh"
#include "codes.cuh"
#include "quantize.cuh"
#include "trellis_lookup.cuh"

constexpr int D = HEAD_DIM, BITS = CODE_BITS, ROUNDS = HADAMARD_ROUNDS;
#include "trellis_distance.cuh"

#define WARP_TOKENS (PAGE_TOKENS / WARPS)

struct TrellisSide {
    const void* in;
    const float* plan;    // rotation
    i64 strides[3];       // page, head, token, in elements
    int codes_at, scales_at, values, least_squares;
};

struct TrellisParams {
    u8* pages;
    uint4* decisions;           // [blocks][steps][STEP_BYTES / 16]
    const float* window_levels; // [CHOICES * STATES]
    i64 page_bytes;
    int heads, items, sides;    // items: pages * heads * sides
    float per_deviation;        // levels per coordinate of a unit vector
    TrellisSide side[2];
    u32 levels[LEVELS];         // times -SHRINK, as float16, twice
};

struct Lane {
    u32* targets;  // [D][32], see `target_at`: two tokens' targets as float16, in levels times SHRINK; later their codes
    u32* tile;     // [TILE_WORDS] of this warp
    float* norms;  // [64]
    float* tops;   // [64] largest magnitude
    int lane, warp;
    // The first WARP_TOKENS lanes have one of the warp's tokens each, the others the same ones again.
    __device__ __forceinline__ int half() const { return lane / (WARP_TOKENS / 2) & 1; }
    __device__ __forceinline__ int token() const { return warp * (WARP_TOKENS / 2) + lane % (WARP_TOKENS / 2) + 32 * half(); }
    // Token l and l + 32 of dimension d; turned, so that lanes of different tokens or dimensions have other banks.
    __device__ __forceinline__ u32& target_at(int d, int l) const { return targets[d * 32 + ((l + d) & 31)]; }
    __device__ __forceinline__ u16* half_at(int d, int token) const { return (u16*)&target_at(d, token & 31) + (token >> 5); }
};

#if BITS_OF_STATE == 6
#include "trellis_circles.cuh"
#else
#include "trellis_circles_wide.cuh"
#endif

// Targets of the warp's tokens.
__device__ __forceinline__ void make_targets(const TrellisParams& p, const TrellisSide& s, const Lane& m, i64 base) {
    constexpr int N = (D + 31) / 32;
    float coming[N];
    auto token_of = [&](int i) { return m.warp * (WARP_TOKENS / 2) + i % (WARP_TOKENS / 2) + i / (WARP_TOKENS / 2) * 32; };
    auto load = [&](int token) {
#pragma unroll
        for (int i = 0; i < N; ++i) coming[i] = D % 32 == 0 || m.lane + 32 * i < D ? load_one(s.in, base + token * s.strides[2] + m.lane + 32 * i) : 0.0f;
    };
    load(token_of(0));
#pragma unroll 1
    for (int its = 0; its < WARP_TOKENS; ++its) {
        const int token = token_of(its);
        float v[N], top = 0.0f, norm = 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            v[i] = coming[i];
            top = max_nan(top, fabsf(v[i]));
        }
        if (its + 1 < WARP_TOKENS) load(token_of(its + 1));
#pragma unroll
        for (int o = 1; o < 32; o *= 2) top = max_nan(top, __shfl_xor_sync(FULL, top, o));
        const bool usable = top < INF && top >= 1.17549435e-38f;
        const int exponent = exponent_of(top);
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = usable ? scaled_down(v[i], exponent) : 0.0f;
        rotate<D, ROUNDS, false>(v, (float*)m.tile, s.plan, m.lane);
#pragma unroll
        for (int i = 0; i < N; ++i) norm = fmaf(v[i], v[i], norm);
#pragma unroll
        for (int o = 1; o < 32; o *= 2) norm += __shfl_xor_sync(FULL, norm, o);
        norm = sqrtf(norm);
        const float up = norm > 0.0f ? p.per_deviation * SHRINK / norm : 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (D % 32 == 0 || m.lane + 32 * i < D) *m.half_at(m.lane + 32 * i, token) = float_half(v[i] * up);
        if (m.lane == 0) {
            m.norms[token] = norm;
            m.tops[token] = top;
        }
    }
    __syncwarp();
}

template <bool VALUES>
__device__ __forceinline__ void pack_page(const Lane& m, u8* out) {
    using R = Runs<D, BITS, BITS_OF_STATE, false, VALUES ? 8 : 4>;
    const int g = m.lane >> 2, c = m.lane & 3, part = VALUES ? g : c;
    constexpr int QUADS = R::WORDS & ~3;
#pragma unroll 1
    for (int i = m.warp; i < R::TOKENS / R::BLOCK * R::WORDS; i += WARPS) {
        const int block = i / R::WORDS, k = i % R::WORDS;
        u32 word = 0;
#pragma unroll 1
        for (int j = 32 * k / BITS; j * BITS < 32 * k + 32; ++j) {
            const int run = block * R::BLOCK + j / R::DIMS, d = part * R::DIMS + j % R::DIMS;
            const int token = VALUES ? run / 4 * 16 + 4 * c + run % 4 : 8 * g + run;
            const u32 code = *m.half_at(d, token);
            const int shift = j * BITS - 32 * k;
            word |= shift >= 0 ? code << shift : code >> -shift;
        }
        const int at = k < QUADS ? (k & ~3) * 128 + m.lane * 16 + (k & 3) * 4
                     : (R::WORDS & 2) && k < QUADS + 2 ? QUADS * 128 + m.lane * 8 + (k - QUADS) * 4 : (R::WORDS - 1) * 128 + m.lane * 4;
        *(u32*)(out + block * (R::WORDS * 128) + at) = word;
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) tqai_encode(const __grid_constant__ TrellisParams p) {
    extern __shared__ __align__(128) u8 smem[];
    Lane m;
    m.lane = threadIdx.x & 31;
    m.warp = threadIdx.x >> 5;
    m.targets = (u32*)smem;
    m.tile = m.targets + D * 32 + m.warp * TILE_WORDS;
    m.norms = (float*)(m.targets + D * 32 + WARPS * TILE_WORDS);
    m.tops = m.norms + 64;
    constexpr int STEPS = D > SEAM_STEPS ? D : SEAM_STEPS;
    uint4* decisions = p.decisions + (i64)blockIdx.x * (STEPS * STEP_BYTES / 16);
#pragma unroll 1
    for (int item = blockIdx.x; item < p.items; item += gridDim.x) {
        const int at = item / p.sides, page = at / p.heads, head = at - page * p.heads;
        const TrellisSide& s = p.side[item - at * p.sides];
        make_targets(p, s, m, page * s.strides[0] + head * s.strides[1]);
        float product = 0.0f, square = 0.0f;
        take_circles(p, m, decisions, product, square);
        u8* out = p.pages + at * p.page_bytes;
        if (m.lane < WARP_TOKENS) {
            const int token = m.token();
            const float top = m.tops[token], norm = m.norms[token];
            const float scale = s.least_squares ? norm * (product / (square * SHRINK)) : norm;
            ((u16*)(out + s.scales_at))[token] = scale_bits(scale, exponent_of(top), top);
            if (!(top < INF && top >= 1.17549435e-38f)) {
                for (int k = 0; k < D; ++k) *m.half_at(k, token) = 0;
            }
        }
        __syncthreads();
        if (s.values) pack_page<true>(m, out + s.codes_at);
        else pack_page<false>(m, out + s.codes_at);
        __syncthreads();
    }
}
