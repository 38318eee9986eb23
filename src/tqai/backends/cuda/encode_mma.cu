// Pages from vectors, the form with tensor cores: one side of all pages and heads. `encode.cu` is the general.

#include "device.cuh"
#include "codes.cuh"
#include "quantize.cuh"
#include "encode_instructions.cuh"
#include "encode_mma.cuh"

#define ENCODE_BLOCKS 3  // per multiprocessor, for the compiler's choice of registers

struct EncodeParams {
    u8* pages;
    const void* in;
    const u32* table;     // factors, cells and levels, one after the other (`Sizes`)
    i64 strides[3];       // page, head, token, in elements
    float buckets, boundary, inner, outer;
    int heads, units, least_squares;
};

template <int D, int BITS, bool VALUES>
__device__ __forceinline__ void encode_units(const EncodeParams& p, int codes_at, int scales_at) {
    extern __shared__ __align__(128) u32 table[];
    for (int i = threadIdx.x * 4; i < Sizes<D>::TABLE; i += ENCODE_WARPS * 32 * 4) *(uint4*)(table + i) = *(const uint4*)(p.table + i);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32* mine = table + Sizes<D>::TABLE + warp * (2 * Sizes<D>::ROWS);
    u32* staged = table + Sizes<D>::TABLE + ENCODE_WARPS * 2 * Sizes<D>::ROWS + warp * Sizes<D>::STAGED;
    const u32 cells = shared_address(table + 2 * Sizes<D>::FACTOR), rows = shared_address(mine);
    const i64 pitch_bytes = 2 * p.strides[2];
    Quantizer<BITS> q{opaque(cells - 0x4b000000u * 8), opaque(cells + 4 * Sizes<D>::CELLS), p.buckets, p.boundary, p.inner, p.outer};
    auto vectors = [&](int unit) -> const u8* {
        const int page = unit / p.heads, head = unit - page * p.heads;
        return unit < p.units ? (const u8*)p.in + 2 * (page * p.strides[0] + head * p.strides[1]) : nullptr;
    };
    int unit = blockIdx.x * ENCODE_WARPS + warp;
    const u8* from = vectors(unit);
    if (from) Rows<D>::fetch(rows, from, pitch_bytes, VALUES ? 4 : 1, lane);
    __syncthreads();
#pragma unroll 1
    while (from) {
        const u8* after = vectors(unit + gridDim.x * ENCODE_WARPS);
        u8* out = p.pages + (i64)unit * PAGE_BYTES;
        encode_page<D, BITS, VALUES>(q, table, from, after, pitch_bytes, p.least_squares, out + codes_at, (u16*)(out + scales_at), rows, staged, lane);
        unit += gridDim.x * ENCODE_WARPS;
        from = after;
    }
}

extern "C" __global__ void __launch_bounds__(ENCODE_WARPS * 32, ENCODE_BLOCKS) tqai_encode_keys(const __grid_constant__ EncodeParams p) {
    encode_units<DK, BK, false>(p, 0, K_SCALES_AT);
}

extern "C" __global__ void __launch_bounds__(ENCODE_WARPS * 32, ENCODE_BLOCKS) tqai_encode_values(const __grid_constant__ EncodeParams p) {
    encode_units<DV, BV, true>(p, V_CODES_AT, V_SCALES_AT);
}
