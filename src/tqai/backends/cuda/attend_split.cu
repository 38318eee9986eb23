// Decode attention on packed codes, one launch: history (codes), sinks and recent tokens (exact), merged.
// Every segment (see `params.cuh`) is cut into gridDim.x equal stretches of pages, one for each block; exact
// tokens go to the blocks in turn, 16 at a time. `attend_line.cu` is for work that this does not divide well.
//
// Within a block the warps take pages in turn, scalar codes each by way of its own ring of buffers (`stretch.cuh`),
// trellis codes straight into registers (`trellis_stretch.cuh`). The block merges its warps. Then either the blocks of
// a segment are a cluster and read each other's shared memory (macro CLUSTER 1; also for blocks that have a segment
// each), or all send their part to the last ones through global memory (0).
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
#include "trellis_stretch.cuh"
#else
#include "queries.cuh"
#include "page.cuh"
#include "stretch.cuh"
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

    u8* scratch = m.scratch + warp * SCRATCH_BYTES;
    Stretch stretch(m, warp, lane);
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
    stretch.begin(p.addresses + place.b * p.address_stride + first, count, (i64)place.kv_head * PAGE_BYTES, warp, lane);
    stretch.fetch_first(lane);
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
    stretch.fetch_rest(lane);
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
    stretch.take(p, m, q, r, mask, first, scratch, warp, lane);
    STAMP(5)

    // ---- merge
    u8* buffer = m.ring + warp * BUFFERS * BUFFER_BYTES;
    put_slot(p, m, r, buffer, warp, lane);
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
        store_column(p, m, place, gathered, j, (float*)buffer, lane);
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
        finish_awaited(p, m, place, parts, splits, j, buffer, warp, lane);
        __syncthreads();
    }
#endif
    STAMP(9)
}
