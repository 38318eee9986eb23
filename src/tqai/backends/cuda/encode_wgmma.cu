// Pages from vectors by the tensor cores of sm_90: one side of all pages and heads. `encode.cu` is the general form.

#define ENCODE_WARPS 8
#define ENCODE_BLOCKS 2  // per multiprocessor, for the compiler's choice of registers

#include "device.cuh"
#include "codes.cuh"
#include "quantize.cuh"
#include "encode_params.cuh"
#include "encode_instructions.cuh"
#include "encode_wgmma_instructions.cuh"
#include "encode_norms.cuh"
#include "encode_levels.cuh"
#include "encode_store.cuh"
#include "encode_wgmma.cuh"

template <int D, int BITS, bool VALUES>
__device__ __forceinline__ void encode_units(const EncodeParams& p, int codes_at, int scales_at) {
    extern __shared__ __align__(128) u32 table[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    // The address of the boundaries by way of memory, or the compiler takes the sum apart that it is the start of.
    for (int i = threadIdx.x; i < Sizes<D>::TABLE; i += ENCODE_WARPS * 32)
        table[i] = i < Sizes<D>::TABLE - 1 ? p.table[i] : boundaries_from(shared_address(table + Sizes<D>::FACTOR));
    u32* mine = table + Sizes<D>::TABLE + warp * Sizes<D>::WARP;
    u32* codes = mine + Sizes<D>::ROWS + lane;
    const uint4* rows_here = (const uint4*)mine + lane;
    const u32 rows = shared_address(rows_here);
    // blocks lie 128 bytes apart along k and 256 along the columns
    const u64 factor = (u64)(shared_address(table) >> 4) | (u64)(128 >> 4) << 16 | (u64)(256 >> 4) << 32;
    const int pitch_bytes = (int)(2 * p.strides[2]);
    const i64 offset = (i64)(8 * (lane >> 2)) * pitch_bytes + 16 * (lane & 3);
    Quantizer<D, BITS, VALUES> q;
    int unit = blockIdx.x * ENCODE_WARPS + warp;
    const u8* from = p.vectors(unit) + offset;
    Rows<D>::fetch(rows, from, pitch_bytes);
    show_products();
    __syncthreads();
    q.prepare(p.boundary, p.inner, p.outer, table[Sizes<D>::TABLE - 1]);
    // As the four multiply together, those that would be beyond the last do the last again.
#pragma unroll 1
    for (; unit - warp < p.units; unit += gridDim.x * ENCODE_WARPS) {
        const u8* after = p.vectors(unit + gridDim.x * ENCODE_WARPS) + offset;
        u8* out = p.pages + (i64)(unit < p.units ? unit : p.units - 1) * PAGE_BYTES;
        encode_page<D, BITS, VALUES>(q, factor, p.per_unit, from, after, pitch_bytes, p.least_squares, out + codes_at, (u16*)(out + scales_at), rows, rows_here, codes, lane);
        from = after;
    }
    await_copies<0>();
}

extern "C" __global__ void __launch_bounds__(ENCODE_WARPS * 32, ENCODE_BLOCKS) tqai_encode_keys(const __grid_constant__ EncodeParams p) {
    encode_units<DK, BK, false>(p, 0, K_SCALES_AT);
}

extern "C" __global__ void __launch_bounds__(ENCODE_WARPS * 32, ENCODE_BLOCKS) tqai_encode_values(const __grid_constant__ EncodeParams p) {
    encode_units<DV, BV, true>(p, V_CODES_AT, V_SCALES_AT);
}
