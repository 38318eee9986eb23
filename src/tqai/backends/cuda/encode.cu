// Pages from vectors: rotate, scale, quantize, pack.

#include "device.cuh"
#include "codes.cuh"
#include "quantize.cuh"
#include "encode_hadamard.cuh"
#include "encode_matrix.cuh"
#include "pack.cuh"

#define ENCODE_BLOCKS 3  // per multiprocessor, for the compiler's choice of registers

template <int D, int BITS, int ROUNDS, bool VALUES>
__device__ __forceinline__ void encode_side(const Side& s, u8* codes_out, u16* scales_out, int page, int head, u8* smem) {
    constexpr int BYTES = VALUES ? D * BYTE_PITCH : 64 * (D + 4);
    float* work = (float*)smem;
    constexpr int WORK = ROUNDS > 0 ? CODE_WARPS * (512 / D) * (D + 8) : CODE_WARPS * 4 * D;
    u8* bytes = smem + WORK * 4;
    float2* cells = (float2*)(bytes + ALIGN16(BYTES));
    float* magnitudes = (float*)(cells + s.buckets);
    const int tid = threadIdx.x;
    for (int i = tid; i < s.buckets; i += CODE_THREADS) cells[i] = s.cells[i];
    for (int i = tid; i < (1 << (BITS - 1)); i += CODE_THREADS) magnitudes[i] = s.levels[(1 << (BITS - 1)) + i];
    __syncthreads();
    const i64 base = page * s.strides[0] + head * s.strides[1];
    if constexpr (ROUNDS > 0) encode_by_hadamard<D, BITS, ROUNDS, VALUES>(s, cells, magnitudes, work, bytes, scales_out, base);
    else encode_by_matrix<D, BITS, ROUNDS, VALUES>(s, cells, magnitudes, work, bytes, scales_out, base);
    __syncthreads();
    pack_units<D, BITS, VALUES>(bytes, codes_out);
}

extern "C" __global__ void __launch_bounds__(CODE_THREADS, ENCODE_BLOCKS) tqai_encode(const __grid_constant__ CodeParams p) {
    extern __shared__ __align__(128) u8 smem[];
    const int side = blockIdx.y, page = blockIdx.x / p.heads, head = blockIdx.x - page * p.heads;
    u8* out = p.pages + (i64)blockIdx.x * PAGE_BYTES;
    if (side == 0) encode_side<DK, BK, ROTK, false>(p.side[0], out, (u16*)(out + K_SCALES_AT), page, head, smem);
    else encode_side<DV, BV, ROTV, true>(p.side[1], out + V_CODES_AT, (u16*)(out + V_SCALES_AT), page, head, smem);
}
