// Kernels that do less than attention must: the least time of a launch, of reading the packed bytes, and of
// reading them and bringing partial results together. No results of use; the sums keep the reads alive.
//
// Macros: MODE 0 nothing, 1 bulk copies into a ring of each warp, 2 loads of 16 bytes; MERGE 1: the blocks of
// a segment then send 4 columns of 130 floats each, and the last of them adds the columns up. UNIT bytes of a
// bulk copy, WARPS, STAGES. Segment y lies at base + y * UNIT, its next unit `stride` bytes further.

typedef unsigned int u32;
typedef unsigned long long u64;
#define PART 520

struct Params {
    const unsigned char* base;
    long long stride;
    float* parts;
    int* counters;
    float* out;
    int units, waits;
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void fetch(unsigned char* stage, const unsigned char* from, u64* bar) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(UNIT) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(stage)), "l"(from), "r"(UNIT), "r"(shared_address(bar)) : "memory");
}

__device__ __forceinline__ void await(u64* bar, u32 parity) {
    u32 done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(shared_address(bar)), "r"(parity) : "memory");
    } while (!done);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) tqai_floor(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) unsigned char ring[];
    __shared__ u64 bars[WARPS * STAGES];
    __shared__ int last;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int rank = blockIdx.x, splits = gridDim.x, segment = blockIdx.y;
    // What is read here never changes, so only writing must wait; `waits` has the reading wait, too.
    if (p.waits) asm volatile("griddepcontrol.wait;" ::: "memory");
    const int first = (int)((long long)p.units * rank / splits), count = (int)((long long)p.units * (rank + 1) / splits) - first;
    const unsigned char* from = p.base + (long long)first * p.stride + (long long)segment * UNIT;
    float sum = 0.0f;
#if MODE == 1
    unsigned char* mine = ring + warp * STAGES * UNIT;
    if (lane == 0) {
        for (int k = 0; k < STAGES; ++k) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(bars + warp * STAGES + k)) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        for (int k = 0; k < STAGES; ++k)
            if (warp + k * WARPS < count) fetch(mine + k * UNIT, from + (warp + k * WARPS) * p.stride, bars + warp * STAGES + k);
    }
    __syncwarp();
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    u32 parity = 0;
    int stage = 0;
    for (int n = warp; n < count; n += WARPS) {
        await(bars + warp * STAGES + stage, parity);
        sum += *(const float*)(mine + stage * UNIT + lane * 16);
        __syncwarp();
        if (lane == 0 && n + STAGES * WARPS < count) fetch(mine + stage * UNIT, from + (n + STAGES * WARPS) * p.stride, bars + warp * STAGES + stage);
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
#elif MODE == 2
    for (int n = warp; n < count; n += WARPS) {
        const uint4* at = (const uint4*)(from + n * p.stride);
#pragma unroll 8
        for (int i = lane; i < UNIT / 16; i += 32) {
            uint4 v = __ldcs(at + i);
            sum += __uint_as_float((v.x ^ v.y ^ v.z ^ v.w) & 0x3fffffffu);
        }
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#else
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#if MERGE
    float* parts = p.parts + (long long)segment * splits * PART;
    for (int i = tid; i < PART; i += WARPS * 32) parts[rank * PART + i] = sum;
    __syncthreads();
    if (tid == 0) {
        int arrived;
        asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(arrived) : "l"(p.counters + segment) : "memory");
        last = arrived == splits - 1;
        if (last) p.counters[segment] = 0;
    }
    __syncthreads();
    if (last)
        for (int i = tid; i < PART; i += WARPS * 32) {
            float total = 0.0f;
#pragma unroll 16
            for (int k = 0; k < splits; ++k) total += __ldcg(parts + k * PART + i);
            p.out[segment * PART + i] = total;
        }
#elif MODE > 0
    if (sum == 12345.678f) p.out[segment * PART] = sum;
#endif
}
