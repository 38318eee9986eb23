// Pages from vectors by the tensor cores of sm_80 and newer: one side of all pages and heads. `encode.cu` is the
// general form.

#define ENCODE_WARPS 4
#define ENCODE_BLOCKS 3  // per multiprocessor, for the compiler's choice of registers

#include "device.cuh"
#include "codes.cuh"
#include "quantize.cuh"
#include "encode_params.cuh"
#include "encode_instructions.cuh"
#include "encode_norms.cuh"
#include "encode_levels.cuh"
#include "encode_store.cuh"
#include "encode_mma.cuh"

template <int D, int BITS, bool VALUES>
__device__ __forceinline__ void encode_units(const EncodeParams& p, int codes_at, int scales_at) {
    extern __shared__ __align__(128) u32 table[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    // The address of the boundaries by way of memory, or the compiler takes the sum apart that it is the start of.
    for (int i = threadIdx.x; i < Sizes<D>::TABLE; i += ENCODE_WARPS * 32)
        table[i] = i < Sizes<D>::TABLE - 1 ? p.table[Sizes<D>::FACTOR + i] : boundaries_from(shared_address(table + Sizes<D>::SIGNS));
    u32 factor[2][D / 8];
#pragma unroll
    for (int k = 0; k < D / 4; ++k) factor[k / (D / 8)][k % (D / 8)] = p.table[k * 32 + lane];
    u32* mine = table + Sizes<D>::TABLE + warp * Sizes<D>::WARP;
    u32* codes = mine + 2 * Sizes<D>::ROWS + lane;
    const u32 rows = shared_address(mine);
    const int pitch_bytes = (int)(2 * p.strides[2]);
    Quantizer<D, BITS, VALUES> q;
    int unit = blockIdx.x * ENCODE_WARPS + warp;
    const u8* from = unit < p.units ? p.vectors(unit) : nullptr;
    if (from) Rows<D>::fetch(rows, from, pitch_bytes, lane);
    __syncthreads();
    q.prepare(p.boundary, p.inner, p.outer, table[Sizes<D>::TABLE - 1]);
#pragma unroll 1
    while (from) {
        const int further = unit + gridDim.x * ENCODE_WARPS;
        const u8* after = further < p.units ? p.vectors(further) : nullptr;
        u8* out = p.pages + (i64)unit * PAGE_BYTES;
        encode_page<D, BITS, VALUES>(q, factor, table, p.per_unit, from, after, pitch_bytes, p.least_squares, out + codes_at, (u16*)(out + scales_at), rows, (const u8*)mine, codes, lane);
        unit = further;
        from = after;
    }
}

extern "C" __global__ void __launch_bounds__(ENCODE_WARPS * 32, ENCODE_BLOCKS) tqai_encode_keys(const __grid_constant__ EncodeParams p) {
    encode_units<DK, BK, false>(p, 0, K_SCALES_AT);
}

extern "C" __global__ void __launch_bounds__(ENCODE_WARPS * 32, ENCODE_BLOCKS) tqai_encode_values(const __grid_constant__ EncodeParams p) {
    encode_units<DV, BV, true>(p, V_CODES_AT, V_SCALES_AT);
}
