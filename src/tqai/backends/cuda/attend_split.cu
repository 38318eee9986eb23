// Decode attention on packed codes, one launch: history (codes), sinks and recent tokens (exact), merged.
// Every segment (see `params.cuh`) is cut into gridDim.x equal stretches of pages, one for each block; exact
// tokens go to the blocks in turn, 16 at a time. `attend_line.cu` is for work that this does not divide well.
//
// Within a block the warps take pages in turn, each with its own ring of buffers, filled by bulk copies. The
// block merges its warps. Then either the blocks of a segment are a cluster and read each other's shared
// memory (macro CLUSTER 1; also for blocks that have a segment each), or all send their part to the last ones
// through global memory (0).
//
// A launch may begin while the one before it ends. `early` says that the addresses and pages were there
// before that one began, so that copies may be under way by the time it is over; everything else is read
// after its end.

#include "device.cuh"
#include "unpack.cuh"
#include "params.cuh"
#include "transport.cuh"
#include "page_softmax.cuh"
#if TRELLIS
#include "trellis_lookup.cuh"
#include "trellis_queries.cuh"
#include "trellis_page.cuh"
#else
#include "queries.cuh"
#include "page.cuh"
#endif
#include "exact.cuh"
#include "merge.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) tqai_attend(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) u8 smem[];
    const Shared m(smem);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int rank = blockIdx.x, splits = gridDim.x, segment = blockIdx.y;
    STAMP(0)
    Place place;
    place.b = p.by_heads.divide(segment);
    const int head_group = segment - place.b * p.kv_heads * p.col_groups;
    place.kv_head = p.by_col_groups.divide(head_group);
    place.col_group = head_group - place.kv_head * p.col_groups;

    u8* my_ring = m.ring + warp * STAGES * PAGE_BYTES;
    u64* my_bars = m.bars + warp * BARS;
    u8* scratch = m.scratch + warp * SCRATCH_BYTES;
#if BULK
    if (lane < BARS) make_barrier(my_bars + lane, 1);
#endif
    if (tid < 2) make_barrier(m.ready + tid, COLS);
    if (tid == 0) m.flag[1] = 0;  // parity of `ready`
    release_buffer();
    __syncwarp();

    // ---- All that is small is asked for before the pages, which fill the memory's queues; and of these only
    // the first of each warp, until the queries are there.
    Constants constants;
    constants.load(p, tid);
    RawQuery raw;
    if (!p.early) {
        await_earlier_launches();
        if (warp < COLS) raw.load(p, place, warp, lane);
    }
    const int pages = pages_of(p, place.b);
    const int first = p.by_grid.divide(pages * rank), count = p.by_grid.divide(pages * (rank + 1)) - first;
    const i64* addresses = p.addresses + place.b * p.address_stride + first;
    const i64 offset = (i64)place.kv_head * PAGE_BYTES;
    const i64 mine = lane < STAGES && warp + lane * WARPS < count ? addresses[warp + lane * WARPS] : 0;
    i64 next = warp + STAGES * WARPS < count ? addresses[warp + STAGES * WARPS] : 0;
    auto fetch = [&](int k) {
        const i64 page = __shfl_sync(FULL, mine, k);
#if HALVES
        if (page) fetch_keys(my_ring, (const u8*)(page + offset), my_bars, lane);
        if (page) fetch_values(my_ring, (const u8*)(page + offset), my_bars + 1, lane);
#else
        if (page) fetch_page(my_ring + k * PAGE_BYTES, (const u8*)(page + offset), my_bars + k, lane);
        else no_fetch();
#endif
    };
    fetch(0);
    constants.keep(p, m, tid);
    __syncthreads();
    STAMP(1)
    if (p.early) {
        await_earlier_launches();
        if (warp < COLS) raw.load(p, place, warp, lane);
    }
    let_next_launch_begin();
    STAMP(2)

    // ---- queries by the first warps, meanwhile exact tokens by the last
#pragma unroll 1
    for (int j = warp; j < COLS; j += WARPS) {
        if (WARPS < COLS && j != warp) raw.load(p, place, j, lane);
        take_query(p, m, raw, j, scratch, lane);
    }
    place.recent = recent_of(p, place.b);
    const int exact_items = ceil_div(p.sinks, EXACT_TOKENS) + ceil_div(place.recent, EXACT_TOKENS);
    const bool exact = has_exact(rank, splits, exact_items, warp);
    if (!exact) await_barrier(m.ready, 0);
#pragma unroll
    for (int k = 1; k < STAGES; ++k) fetch(k);
    Running r;
    r.clear();
    if (exact) take_exact(p, m, place, r, rank, splits, exact_items, warp, scratch, lane);
    await_barrier(m.ready + 1, 0);
    STAMP(3)

    // ---- pages
    Query q;
    q.load(p, m, lane >> 2, lane & 3);
    const u8* mask = 0;
#if MASKED
    mask = mask_row(p, place, lane & 3);
#endif
    int stage = 0;
    u32 parity = 0;
#pragma unroll 1
    for (int n = warp; n < count; n += WARPS) {
        u8* buffer = my_ring + stage * PAGE_BYTES;
        await_page(my_bars + stage, parity);
#ifdef STAMPS
        if (n == 0) { STAMP(4) }
#endif
#if HALVES
        // The next page's keys come where this one's were while its values are taken, and the other way round.
        take_page(p, m, q, r, buffer, mask, first + n, scratch, lane, [&] {
            __syncwarp();
            if (next) fetch_keys(buffer, (const u8*)(next + offset), my_bars, lane);
            await_page(my_bars + 1, parity);
        });
#else
        take_page(p, m, q, r, buffer, mask, first + n, scratch, lane);
#endif
        __syncwarp();
        if (next) {
#if HALVES
            fetch_values(buffer, (const u8*)(next + offset), my_bars + 1, lane);
#else
            fetch_page(buffer, (const u8*)(next + offset), my_bars + stage, lane);
#endif
            const int after = n + (STAGES + 1) * WARPS;
            next = after < count ? addresses[after] : 0;
        } else {
            no_fetch();
        }
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
    STAMP(5)

    // ---- merge
    put_slot(p, m, r, my_ring, warp, lane);
    __syncthreads();
#ifdef STAMPS
    if (*(volatile int*)(m.flag + 4) != -1) { STAMP(6) }  // not before the barrier
#endif
#if CLUSTER
    const ClusterParts parts{m.merged};
    merge_slots<FirstBuffers>(m, parts, tid);
    cluster_arrive();
    cluster_wait();
    STAMP(7)
    const int columns = place.columns(p);
    int j = rank + splits * warp;
    if (j >= columns) cluster_arrive();
#pragma unroll 1
    for (; j < columns; j += splits * WARPS) {
        Gathered gathered = {};
        gathered.take<8 / CHUNKS>(parts, 0, 1, splits, j, lane);
        if (j + splits * WARPS >= columns) cluster_arrive();  // this warp has read the other blocks' memory
        store_column(p, m, place, gathered, j, (float*)my_ring, lane);
    }
    STAMP(8)
    cluster_wait();  // while others read this block's memory, it must not end
#else
    const int columns = place.columns(p);
    const AwaitedParts parts{p.partial + (i64)segment * splits * PART, m.merged, rank, splits, columns};
    merge_slots<FirstBuffers>(m, parts, tid);
    STAMP(7)
    __syncthreads();
#pragma unroll 1
    for (int j = splits - 1 - rank; j < columns; j += splits) {
        finish_awaited(p, m, place, parts, splits, j, my_ring, warp, lane);
        __syncthreads();
    }
#endif
    STAMP(9)
}
