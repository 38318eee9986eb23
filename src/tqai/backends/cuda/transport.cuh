// Pages into shared memory, barriers, and what sm_90 adds: bulk copies, clusters, launches that overlap.

__device__ __forceinline__ void make_barrier(u64* bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(u64* bar) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(shared_address(bar)) : "memory");
}

// Loads past the first-level cache, by the policy `read_once`: what they bring is the first to leave the second-level cache,
// where queries, tables and results then stay.
__device__ __forceinline__ u64 read_once() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ uint4 stream_four(const u8* from, u64 policy) {
    uint4 a;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;" : "=r"(a.x), "=r"(a.y), "=r"(a.z), "=r"(a.w) : "l"(from), "l"(policy));
    return a;
}
__device__ __forceinline__ uint2 stream_two(const u8* from, u64 policy) {
    uint2 a;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;" : "=r"(a.x), "=r"(a.y) : "l"(from), "l"(policy));
    return a;
}
__device__ __forceinline__ u32 stream_one(const u8* from, u64 policy) {
    u32 a;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(a) : "l"(from), "l"(policy));
    return a;
}

#if __CUDA_ARCH__ >= 900
#define BULK 1
// By one lane.
__device__ __forceinline__ void fetch_by_one(u8* stage, const u8* page, u64* bar, u32 bytes = PAGE_BYTES) {
    u32 b = shared_address(bar);
    const u64 policy = read_once();
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
                     shared_address(stage)), "l"(page), "r"(bytes), "r"(b), "l"(policy) : "memory");
}
__device__ __forceinline__ void fetch_page(u8* stage, const u8* page, u64* bar, int lane) {
    if (lane == 0) fetch_by_one(stage, page, bar);
}
__device__ __forceinline__ void fetch_keys(u8* stage, const u8* page, u64* bar, int lane) {
    if (lane == 0) fetch_by_one(stage, page, bar, V_CODES_AT);
}
__device__ __forceinline__ void fetch_values(u8* stage, const u8* page, u64* bar, int lane) {
    if (lane == 0) fetch_by_one(stage + V_CODES_AT, page + V_CODES_AT, bar, PAGE_BYTES - V_CODES_AT);
}
__device__ __forceinline__ void no_fetch() {}
// Between ordinary accesses to a buffer and the next bulk copy into it.
__device__ __forceinline__ void release_buffer() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void await_barrier(u64* bar, u32 parity) {
    u32 b = shared_address(bar), done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(b), "r"(parity) : "memory");
    } while (!done);
}
__device__ __forceinline__ void await_page(u64* bar, u32 parity) { await_barrier(bar, parity); }

// Nothing that an earlier launch of this stream writes may be read, and nothing that it reads be written,
// before `await_earlier_launches`. `let_next_launch_begin` gives the next one the multiprocessors that fall
// idle; it waits in turn for the end of this one.
__device__ __forceinline__ void await_earlier_launches() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_launch_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ u32 address_in_block(const void* mine, int rank) {
    u32 theirs;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(shared_address(mine)), "r"(rank));
    return theirs;
}
__device__ __forceinline__ float4 load4_from_block(u32 at) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ float2 load2_from_block(u32 at) {
    float2 v;
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
    return v;
}
#else
#define BULK 0
__device__ __forceinline__ void fetch_page(u8* stage, const u8* page, u64* bar, int lane) {
    u32 s = shared_address(stage);
    for (int i = lane * 16; i < PAGE_BYTES; i += 512)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(s + i), "l"(page + i) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ __forceinline__ void no_fetch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void release_buffer() {}
__device__ __forceinline__ void await_barrier(u64* bar, u32 parity) {
    u32 b = shared_address(bar), done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(b), "r"(parity) : "memory");
    } while (!done);
}
// Every page loop commits one group per turn: the page of this turn is there when STAGES - 1 younger are not.
__device__ __forceinline__ void await_page(u64* bar, u32 parity) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    __syncwarp();
}
__device__ __forceinline__ void await_earlier_launches() {}
__device__ __forceinline__ void let_next_launch_begin() {}
// A block is a cluster of its own.
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() { __syncthreads(); }
__device__ __forceinline__ u32 address_in_block(const void* mine, int) { return shared_address(mine); }
__device__ __forceinline__ float4 load4_from_block(u32 at) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ float2 load2_from_block(u32 at) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
    return v;
}
#endif

// Where a block's time goes, for measuring alone: `-DSTAMPS`.
#ifdef STAMPS
__device__ i64 tqai_stamps[256 * 16];
#define STAMP(k)                                                                               \
    if (threadIdx.x == 0) {                                                                    \
        i64 now;                                                                               \
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");                      \
        tqai_stamps[((blockIdx.y * gridDim.x + blockIdx.x) & 255) * 16 + (k)] = now;           \
    }
#else
#define STAMP(k)
#endif
