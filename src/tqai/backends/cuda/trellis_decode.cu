// Vectors from pages of trellis codes; as `decode.cu` for scalar ones. `levels` are the values of all windows.

#include "device.cuh"
#include "codes.cuh"
#include "decode_rows.cuh"
#include "trellis_lookup.cuh"

// Word k of a block of a lane; the inverse of `load_words`.
template <int N>
__device__ __forceinline__ u32 word_at(const u8* block, int k, int lane) {
    constexpr int QUADS = N & ~3;
    const int at = k < QUADS ? (k & ~3) * 128 + lane * 16 + (k & 3) * 4
                 : (N & 2) && k < QUADS + 2 ? QUADS * 128 + lane * 8 + (k - QUADS) * 4 : (N - 1) * 128 + lane * 4;
    return *(const u32*)(block + at);
}

// So many bits, 12 at most, of the run of a token in a part of the dimensions, from bit `at` on.
template <class Side>
__device__ __forceinline__ u32 bits_of(const u8* codes, bool values, int token, int part, int at) {
    const int run = values ? token / 16 * 4 + token % 4 : token % 8;
    const int lane = values ? 4 * part + token / 4 % 4 : token / 8 * 4 + part;
    const u8* block = codes + run / Side::BLOCK * (Side::WORDS * 128);
    const int bit = run % Side::BLOCK * Side::LENGTH + at, k = bit >> 5;
    const u32 low = word_at<Side::WORDS>(block, k, lane), high = k + 1 < Side::WORDS ? word_at<Side::WORDS>(block, k + 1, lane) : 0;
    return __funnelshift_r(low, high, bit & 31);
}

template <int D, int BITS, int STATE_BITS, int ROUNDS, bool VALUES>
__device__ void decode_trellis_side(const Side& s, const u8* codes, const u16* scales, u8* smem, int out_dtype, int back) {
    using R = Runs<D, BITS, STATE_BITS, false, VALUES ? 8 : 4>;
    constexpr int PITCH = ROW_PITCH(D), WINDOW = BITS + STATE_BITS, PARTS = VALUES ? 8 : 4;
    float* rows = (float*)smem;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
#pragma unroll 4
    for (int k = tid; k < 64 * D; k += CODE_THREADS) {
        const int token = k & 63, dim = k >> 6, part = dim / R::DIMS, at = dim % R::DIMS * BITS, have = R::LENGTH - at;
        u32 w = bits_of<R>(codes, VALUES, token, part, at);
        if (have < WINDOW) w = (w & ((1u << have) - 1)) | bits_of<R>(codes, VALUES, token, (part + 1) % PARTS, 0) << have;
        rows[token * PITCH + dim] = __ldg(s.levels + (w & ((1u << WINDOW) - 1)));
    }
    __syncthreads();
    give_rows<D, ROUNDS>(s, rows, scales, out_dtype, back, warp, lane);
}

extern "C" __global__ void __launch_bounds__(CODE_THREADS) tqai_decode(const __grid_constant__ CodeParams p) {
    extern __shared__ __align__(128) u8 smem[];
    const u8* in = p.pages + (i64)blockIdx.x * PAGE_BYTES;
    if (blockIdx.y == 0) decode_trellis_side<DK, BK, SK, ROTK, false>(p.side[0], in, (const u16*)(in + K_SCALES_AT), smem, p.out_dtype, p.back);
    else decode_trellis_side<DV, BV, SV, ROTV, true>(p.side[1], in + V_CODES_AT, (const u16*)(in + V_SCALES_AT), smem, p.out_dtype, p.back);
}
