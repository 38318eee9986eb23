// Products by four warps at once, of sm_90 alone: a's rows in registers, b in shared memory, asynchronous.

// What was written to shared memory, for products that read it.
__device__ __forceinline__ void show_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define EIGHT(d, n) "+f"(d[n]), "+f"(d[n + 1]), "+f"(d[n + 2]), "+f"(d[n + 3]), "+f"(d[n + 4]), "+f"(d[n + 5]), "+f"(d[n + 6]), "+f"(d[n + 7])

// All but the latest LEFT groups are done; d is of those.
template <int LEFT, int N>
__device__ __forceinline__ void await_products(float (&d)[N]) {
    if constexpr (N == 32) asm volatile("wgmma.wait_group.sync.aligned %32;" : EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24) : "n"(LEFT) : "memory");
    else asm volatile("wgmma.wait_group.sync.aligned %16;" : EIGHT(d, 0), EIGHT(d, 8) : "n"(LEFT) : "memory");
}

// d = (ADD ? d : 0) + a b: 16 rows of every warp times a matrix [16, COLUMNS] that the descriptor b is of.
template <int COLUMNS, bool ADD>
__device__ __forceinline__ void times_matrix(float (&d)[COLUMNS / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    if constexpr (COLUMNS == 64)
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32" FACTORS
            " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
            " {%32,%33,%34,%35}, %36, p, 1, 1, 0; }"
            : EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"((int)ADD));
    else
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32" FACTORS
            " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, 0; }"
            : EIGHT(d, 0), EIGHT(d, 8) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"((int)ADD));
}
