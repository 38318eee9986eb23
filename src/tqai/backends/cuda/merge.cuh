// Partial results into one: of the warps of a block, then of the blocks that share a segment.
//
//     part   [COLS][pitch] outputs, rotated and not divided by the sum, then [COLS] (maximum, sum), base 2

#define CHUNKS ((DV + 127) / 128)  // each lane gathers so many times 4 outputs
#define LOTS (WARPS < 2 * COLS ? 1 : WARPS / COLS < 8 ? WARPS / COLS : 8)  // warps that share a column

// A warp's result, if it has seen nothing zeros, into its slot, a page buffer that it is done with.
__device__ __forceinline__ void put_slot(const Params& p, const Shared& m, Running& r, u8* buffer, int warp, int lane) {
    const int g = lane >> 2, c = lane & 3;
#pragma unroll
    for (int o = 4; o < 32; o *= 2) r.sum += __shfl_xor_sync(FULL, r.sum, o);
    float* slot = (float*)buffer + c * SLOT_ROW;
#pragma unroll
    for (int u = 0; u < V_UNITS; ++u) {
        slot[r.place(u, 0, g)] = r.out(u, 0);
        slot[r.place(u, 1, g)] = r.out(u, 1);
    }
    if (g == 0) *(float2*)(m.stats + (warp * COLS + c) * 2) = make_float2(r.top, r.sum);
    if (lane == 0) m.flag[4 + warp] = (int)(buffer - m.ring);
}

// Where in the ring a warp's slot lies: always in its first buffer, or where `put_slot` has noted it.
struct FirstBuffers {
    __device__ __forceinline__ int operator()(const Shared&, int warp) const { return warp * BUFFERS * BUFFER_BYTES; }
};
struct NotedBuffers {
    __device__ __forceinline__ int operator()(const Shared& m, int warp) const { return m.flag[4 + warp]; }
};

// All slots of the block into one part at `to`. Between barriers. Everything is read at once, without branches.
template <class Buffers, class To>
__device__ __forceinline__ void merge_slots(const Shared& m, const To& to, int tid) {
    const Buffers slot_of;
#pragma unroll 1
    for (int i = tid; i < COLS * DV / 2; i += THREADS) {
        const int j = i / (DV / 2), d = 2 * (i - j * (DV / 2));
        float2 st[WARPS], v[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            st[w] = *(const float2*)(m.stats + (w * COLS + j) * 2);
            v[w] = *(const float2*)((const float*)(m.ring + slot_of(m, w)) + j * SLOT_ROW + d);
        }
        float most = NOTHING, l = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) most = max_nan(most, st[w].x);
        float2 y = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float f = exp2_fast(st[w].x - most);
            y.x = fmaf(f, v[w].x, y.x);
            y.y = fmaf(f, v[w].y, y.y);
            l = fmaf(f, st[w].y, l);
        }
        to.put(j, d, y);
        if (d == 0) to.put_stat(j, make_float2(most, l));
    }
}

// ---- Where parts lie. `peek` asks for outputs 4 at .. 4 at + 3 of column j of part k and `stat` for (maximum,
// sum); both may be used when they are `is_there`; then `taken` is called.

// In the shared memory of the blocks of a cluster; `put` into this block's own.
struct ClusterParts {
    float* merged;
    __device__ __forceinline__ void put(int j, int d, float2 y) const { *(float2*)(merged + j * SLOT_ROW + d) = y; }
    __device__ __forceinline__ void put_stat(int j, float2 st) const { *(float2*)(merged + SLOT + 2 * j) = st; }
    __device__ __forceinline__ float4 peek(int k, int j, int at) const { return load4_from_block(address_in_block(merged + j * SLOT_ROW + 4 * at, k)); }
    __device__ __forceinline__ static bool is_there(const float4&, const float2&) { return true; }
    __device__ __forceinline__ void taken(int, int, int) const {}
    __device__ __forceinline__ float2 stat(int k, int j) const { return load2_from_block(address_in_block(merged + SLOT + 2 * j, k)); }
};

// This block's alone.
struct MergedPart {
    float* merged;
    __device__ __forceinline__ void put(int j, int d, float2 y) const { *(float2*)(merged + j * SLOT_ROW + d) = y; }
    __device__ __forceinline__ void put_stat(int j, float2 st) const { *(float2*)(merged + SLOT + 2 * j) = st; }
    __device__ __forceinline__ float4 peek(int, int j, int at) const { return *(const float4*)(merged + j * SLOT_ROW + 4 * at); }
    __device__ __forceinline__ static bool is_there(const float4&, const float2&) { return true; }
    __device__ __forceinline__ void taken(int, int, int) const {}
    __device__ __forceinline__ float2 stat(int, int j) const { return *(const float2*)(merged + SLOT + 2 * j); }
};

// In global memory, complete: every block has arrived. Not through the cache that is not coherent.
struct GlobalParts {
    const float *zeroth, *base;  // part k > 0 lies at base + k * step
    int step;
    __device__ __forceinline__ const float* part(int k) const { return k == 0 ? zeroth : base + (i64)k * step; }
    __device__ __forceinline__ float4 peek(int k, int j, int at) const { return __ldcg((const float4*)(part(k) + j * DV) + at); }
    __device__ __forceinline__ static bool is_there(const float4&, const float2&) { return true; }
    __device__ __forceinline__ void taken(int, int, int) const {}
    __device__ __forceinline__ float2 stat(int k, int j) const { return __ldcg((const float2*)(part(k) + COLS * DV) + j); }
};

// One of them, to be written.
struct GlobalPart {
    float* part;
    __device__ __forceinline__ void put(int j, int d, float2 y) const { *(float2*)(part + j * DV + d) = y; }
    __device__ __forceinline__ void put_stat(int j, float2 st) const { *(float2*)(part + COLS * DV + 2 * j) = st; }
};

// In global memory, on their way: a word is there as soon as it is not ABSENT, a NaN that nothing is. Whoever
// takes a word puts ABSENT back for the next launch. That saves what a counter costs: a fence, an atomic and a
// second trip. Column j is gathered by one of the last blocks of a segment, `rank_of`. They send before they
// wait, and blocks are started in order, so that at most the last segment of a launch waits for blocks that
// have no multiprocessor yet. Part `own` is this block's, in its shared memory.
#define ABSENT 0xffffffffu
struct AwaitedParts {
    float *base, *merged;
    int own, splits, columns;  // columns beyond those are neither sent nor gathered
    __device__ __forceinline__ int rank_of(int j) const {
        while (j >= splits) j -= splits;  // hardly ever: not worth a division
        return splits - 1 - j;
    }
    __device__ __forceinline__ static float sendable(float f) { return __float_as_uint(f) == ABSENT ? __uint_as_float(0x7fffffffu) : f; }
    __device__ __forceinline__ static bool is_there(float f) { return __float_as_uint(f) != ABSENT; }
    __device__ __forceinline__ static bool is_there(const float4& v, const float2& st) {
        return is_there(v.x) && is_there(v.y) && is_there(v.z) && is_there(v.w) && is_there(st.x) && is_there(st.y);
    }
    __device__ __forceinline__ static void send(float* to, float2 v) {
        asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(sendable(v.x)), "f"(sendable(v.y)) : "memory");
    }
    __device__ __forceinline__ float* part(int k) const { return base + (i64)k * PART; }
    __device__ __forceinline__ void put(int j, int d, float2 y) const {
        if (rank_of(j) == own) *(float2*)(merged + j * SLOT_ROW + d) = y;
        else if (j < columns) send(part(own) + j * DV + d, y);
    }
    __device__ __forceinline__ void put_stat(int j, float2 st) const {
        if (rank_of(j) == own) *(float2*)(merged + SLOT + 2 * j) = st;
        else if (j < columns) send(part(own) + COLS * DV + 2 * j, st);
    }
    __device__ __forceinline__ float4 peek(int k, int j, int at) const {
        if (k == own) return *(const float4*)(merged + j * SLOT_ROW + 4 * at);
        float4 v;
        asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(part(k) + j * DV + 4 * at) : "memory");
        return v;
    }
    __device__ __forceinline__ void taken(int k, int j, int at) const {
        const float none = __uint_as_float(ABSENT);
        if (k == own) return;
        *((float4*)(part(k) + j * DV) + at) = make_float4(none, none, none, none);
        if (at == 0) *(float2*)(part(k) + COLS * DV + 2 * j) = make_float2(none, none);
    }
    __device__ __forceinline__ float2 stat(int k, int j) const {
        if (k == own) return *(const float2*)(merged + SLOT + 2 * j);
        float2 v;
        asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(part(k) + COLS * DV + 2 * j) : "memory");
        return v;
    }
};
// Parts that warps have already gathered, in their slots.
struct SlotParts {
    const Shared& m;
    int step;  // part k lies in the slot of warp k * step
    __device__ __forceinline__ float4 peek(int k, int j, int at) const { return *((const float4*)((const float*)(m.ring + m.flag[4 + k * step]) + j * SLOT_ROW) + at); }
    __device__ __forceinline__ static bool is_there(const float4&, const float2&) { return true; }
    __device__ __forceinline__ void taken(int, int, int) const {}
    __device__ __forceinline__ float2 stat(int k, int j) const { return *(const float2*)(m.stats + (k * COLS + j) * 2); }
};

struct Gathered {
    float4 y[CHUNKS];  // outputs 4 lane .., 128 + 4 lane ..
    float top, sum;

    // Column j of the parts first, first + step, ..., `count` of them, N at a time, by one warp.
    template <int N, class Parts>
    __device__ __forceinline__ void take(const Parts& parts, int first, int step, int count, int j, int lane) {
        top = NOTHING;
        sum = 0.0f;
#pragma unroll
        for (int n = 0; n < CHUNKS; ++n) y[n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (int base = 0; base < count; base += N) {
            const int some = min(N, count - base);
            float4 ahead[N][CHUNKS];
            float2 stats[N];
            bool complete;
            do {
                complete = true;
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    stats[i] = make_float2(NOTHING, 0.0f);
                    if (i < some) stats[i] = parts.stat(first + (base + i) * step, j);
#pragma unroll
                    for (int n = 0; n < CHUNKS; ++n)
                        if (i < some && inside(n, lane)) ahead[i][n] = parts.peek(first + (base + i) * step, j, 32 * n + lane);
                }
#pragma unroll
                for (int i = 0; i < N; ++i)
#pragma unroll
                    for (int n = 0; n < CHUNKS; ++n)
                        if (i < some && inside(n, lane)) complete = complete && parts.is_there(ahead[i][n], stats[i]);
            } while (__any_sync(FULL, !complete));
            float most = top;
#pragma unroll
            for (int i = 0; i < N; ++i) most = max_nan(most, stats[i].x);
            const float fade = exp2_fast(top - most);
            top = most;
            sum *= fade;
#pragma unroll
            for (int n = 0; n < CHUNKS; ++n) y[n] = make_float4(y[n].x * fade, y[n].y * fade, y[n].z * fade, y[n].w * fade);
#pragma unroll
            for (int i = 0; i < N; ++i) {
                if (i < some) {
                    const float share = exp2_fast(stats[i].x - most);
                    sum = fmaf(share, stats[i].y, sum);
#pragma unroll
                    for (int n = 0; n < CHUNKS; ++n) {
                        if (!inside(n, lane)) continue;
                        parts.taken(first + (base + i) * step, j, 32 * n + lane);
                        add(n, share, ahead[i][n]);
                    }
                }
            }
        }
    }
    __device__ __forceinline__ void add(int n, float share, const float4& v) {
        y[n] = make_float4(fmaf(share, v.x, y[n].x), fmaf(share, v.y, y[n].y), fmaf(share, v.z, y[n].z), fmaf(share, v.w, y[n].w));
    }
    __device__ __forceinline__ static bool inside(int n, int lane) { return DV % 128 == 0 || 32 * n + lane < DV / 4; }
    __device__ __forceinline__ void put(float* row, float share, int lane) const {
#pragma unroll
        for (int n = 0; n < CHUNKS; ++n)
            if (inside(n, lane)) *(float4*)(row + 128 * n + 4 * lane) = make_float4(y[n].x * share, y[n].y * share, y[n].z * share, y[n].w * share);
    }
};

// Column j, gathered, divided by its sum, rotated back and stored, by one warp. `row`: DV floats.
__device__ __forceinline__ void store_column(const Params& p, const Shared& m, const Place& place, const Gathered& r, int j, float* row, int lane) {
    r.put(row, r.sum > 0.0f || r.sum != r.sum ? rcp_fast(r.sum) : 0.0f, lane);
    __syncwarp();
    float v[(DV + 31) / 32];
#pragma unroll
    for (int i = 0; i < (DV + 31) / 32; ++i) v[i] = DV % 32 == 0 || lane + 32 * i < DV ? row[lane + 32 * i] : 0.0f;
    rotate<DV, ROTV, true>(v, row, m.plan_v(p), lane);
    int head, token;
    place.column(p, j, head, token);
    const i64 to = ((i64)place.b * p.kv_heads * p.group + head) * p.new_tokens + token;
#pragma unroll
    for (int i = 0; i < (DV + 31) / 32; ++i)
        if (DV % 32 == 0 || lane + 32 * i < DV) store_one(p.out, to * DV + lane + 32 * i, v[i], OUT);
    if (lane == 0) p.lse[to] = r.sum > 0.0f || r.sum != r.sum ? (r.top + log2f(r.sum)) * 0.6931471805599453f : -INF;
    __syncwarp();
}

// As `store_column`, of all parts, N at a time.
template <int N, class Parts>
__device__ __forceinline__ void finish_column(const Params& p, const Shared& m, const Place& place, const Parts& parts, int count, int j, float* row, int lane) {
    Gathered r = {};
    r.take<N>(parts, 0, 1, count, j, lane);
    store_column(p, m, place, r, j, row, lane);
}

// Whether this block is the last of `count` to arrive, with its part written. By the whole block.
__device__ __forceinline__ bool is_last(const Params& p, const Shared& m, const Place& place, int count, int tid) {
    __syncthreads();
    if (tid == 0) {
        int* counter = p.counters + (place.b * p.kv_heads + place.kv_head) * p.col_groups + place.col_group;
        // Releases the whole block's part, ordered before by the barrier, and acquires the others'.
        int arrived;
        asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(arrived) : "l"(counter) : "memory");
        if (arrived == count - 1) *counter = 0;  // ready for the next launch
        m.flag[0] = arrived == count - 1;
    }
    __syncthreads();
    return m.flag[0] != 0;
}

// The parts of all blocks of a segment, by one block. `buffer`: this warp's, free.
template <class Parts>
__device__ __forceinline__ void finish_global(const Params& p, const Shared& m, const Place& place, const Parts& parts, int count, u8* buffer, int warp, int lane) {
    constexpr int STEP = WARPS < COLS ? WARPS : COLS;
    const int lot = warp / STEP;
    if (lane == 0) m.flag[4 + warp] = (int)(buffer - m.ring);
    __syncthreads();
    if (lot < LOTS) {
#pragma unroll 1
        for (int j = warp % STEP; j < COLS; j += STEP) {
            Gathered r = {};
            r.take<6 / CHUNKS>(parts, lot, LOTS, (count - lot + LOTS - 1) / LOTS, j, lane);
            // all columns of a lot lie in the slot of its first warp
            r.put((float*)(m.ring + m.flag[4 + lot * STEP]) + j * SLOT_ROW, 1.0f, lane);
            if (lane == 0) *(float2*)(m.stats + (lot * COLS + j) * 2) = make_float2(r.top, r.sum);
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int j = warp; j < place.columns(p); j += WARPS) finish_column<LOTS>(p, m, place, SlotParts{m, STEP}, LOTS, j, m.merged + j * SLOT_ROW, lane);
}

// One column of the awaited parts, by the whole block: every warp some of them.
__device__ __forceinline__ void finish_awaited(const Params& p, const Shared& m, const Place& place, const AwaitedParts& parts, int count, int j, u8* buffer, int warp, int lane) {
    Gathered r = {};
    r.take<2>(parts, warp, WARPS, (count - warp + WARPS - 1) / WARPS, j, lane);
    if (lane == 0) {
        m.flag[4 + warp] = (int)(buffer - m.ring);
        *(float2*)(m.stats + (warp * COLS + j) * 2) = make_float2(r.top, r.sum);
    }
    __syncwarp();
    r.put((float*)buffer + j * SLOT_ROW, 1.0f, lane);
    __syncthreads();
    if (warp == 0) finish_column<WARPS % 4 ? 5 : 4>(p, m, place, SlotParts{m, 1}, WARPS, j, m.merged + j * SLOT_ROW, lane);
}
