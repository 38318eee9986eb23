// Vectors from pages.

#include "device.cuh"
#include "codes.cuh"
#include "decode_rows.cuh"

// Code i of register r, out of the words of one lane of a unit.
template <int BITS>
__device__ __forceinline__ u32 code_of(const u32* w, int r, int i) {
    if constexpr (BITS == 8) return (w[r] >> (8 * i)) & 0xff;
    const int pair = r >> 1, shift = 16 * (r & 1) + 4 * i;
    if constexpr (BITS == 4) {
        u32 n = (w[pair] >> shift) & 15;
        return n ^ ((n << 1) & 8) ^ 8;
    }
    if constexpr (BITS == 3) {
        if (pair < 3) return (w[pair] >> shift) & 7;
        return ((w[0] >> (shift + 3)) & 1) | ((w[1] >> (shift + 3)) & 1) << 1 | ((w[2] >> (shift + 3)) & 1) << 2;
    }
    if constexpr (BITS == 2) return (w[pair >> 1] >> (shift + 2 * (pair & 1))) & 3;
    return (w[0] >> (shift + pair)) & 1;
}

template <int D, int BITS, int ROUNDS, bool VALUES>
__device__ void decode_side(const Side& s, const u8* codes, const u16* scales, u8* smem, int out_dtype, int back) {
    constexpr int PITCH = ROW_PITCH(D);
    float* rows = (float*)smem;
    float* levels = rows + 64 * PITCH;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    for (int i = tid; i < (1 << BITS); i += CODE_THREADS) levels[i] = s.levels[i];
    __syncthreads();
    for (int k = tid; k < D / 16 * 32; k += CODE_THREADS) {
        const int u = k >> 5, l = k & 31, g = l >> 2, c = l & 3;
        u32 w[BITS];
        const u8* unit = codes + u * (BITS * 128);
#pragma unroll
        for (int j = 0; j < BITS; ++j) {
            int at = BITS == 8 ? (j >> 2) * 512 + l * 16 + (j & 3) * 4
                   : BITS == 4 ? l * 16 + j * 4
                   : BITS == 3 ? (j < 2 ? l * 8 + j * 4 : 256 + l * 4)
                   : BITS == 2 ? l * 8 + j * 4 : l * 4;
            w[j] = *(const u32*)(unit + at);
        }
#pragma unroll
        for (int r = 0; r < 8; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int token = VALUES ? 8 * (c + 4 * (r >> 2)) + 4 * ((r & 3) >> 1) + i : 8 * g + r;
                int dim = 16 * u + (VALUES ? g + 8 * (r & 1) : 4 * c + i);
                rows[token * PITCH + dim] = levels[code_of<BITS>(w, r, i)];
            }
    }
    __syncthreads();
    give_rows<D, ROUNDS>(s, rows, scales, out_dtype, back, warp, lane);
}

extern "C" __global__ void __launch_bounds__(CODE_THREADS) tqai_decode(const __grid_constant__ CodeParams p) {
    extern __shared__ __align__(128) u8 smem[];
    const u8* in = p.pages + (i64)blockIdx.x * PAGE_BYTES;
    if (blockIdx.y == 0) decode_side<DK, BK, ROTK, false>(p.side[0], in, (const u16*)(in + K_SCALES_AT), smem, p.out_dtype, p.back);
    else decode_side<DV, BV, ROTV, true>(p.side[1], in + V_CODES_AT, (const u16*)(in + V_SCALES_AT), smem, p.out_dtype, p.back);
}
