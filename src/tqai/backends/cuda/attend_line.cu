// Decode attention on packed codes, one launch, as `attend_split.cu`, for work that does not divide into
// equal stretches: many sequences, or few multiprocessors.
//
// Work is a line of items: for every segment (see `params.cuh`) first its exact tokens, 16 per item, then its
// pages, one per item. Blocks take equal stretches of the line. A stretch may cover parts of several segments
// (*pieces*). Within a piece the warps take pages in turn (`line_pages.cuh`, `trellis_line_pages.cuh`); what is asked for
// ahead may be of the next piece. The block merges its warps; a segment that ends in other blocks is merged by whichever
// block arrives last.

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
#include "line.cuh"
#if TRELLIS
#include "trellis_line_pages.cuh"
#else
#include "line_pages.cuh"
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) tqai_attend(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) u8 smem[];
    const Shared m(smem);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    await_earlier_launches();
    let_next_launch_begin();
    const int total = line_items(p, m, tid);
    const int blocks = min((int)gridDim.x, total), block = blockIdx.x;
    if (block >= blocks) return;
    const Cuts cuts(total, blocks, p.by_grid);
    const int start = cuts.start(block), stop = cuts.start(block + 1);

    u8* scratch = m.scratch + warp * SCRATCH_BYTES;
    LinePages line(m, warp, lane);
    if (tid < 2) make_barrier(m.ready + tid, COLS);
    if (tid == 0) m.flag[1] = 0;  // parity of `ready`
    release_buffer();
    __syncwarp();
    line.begin(p, m.ends, start, stop, warp, lane);
    Constants constants;
    constants.load(p, tid);
    constants.keep(p, m, tid);
    __syncthreads();
    int piece_b = 0;
    u32 ready_parity = 0;

#pragma unroll 1
    for (int at = start; at < stop;) {
        const Piece s = piece_at(p, m.ends, at, stop, piece_b);
        const Place place = s.place;
        piece_b = place.b;
        at = s.begin + s.last;
        const int columns = place.columns(p);

        // ---- queries by the first warps, meanwhile exact tokens by the last
#pragma unroll 1
        for (int j = warp; j < COLS; j += WARPS) {
            RawQuery raw;
            raw.load(p, place, j, lane);
            take_query(p, m, raw, j, scratch, lane);
        }
        Running r;
        r.clear();
        take_exact(p, m, place, r, s.first, 1, min(s.last, s.exact), warp, scratch, lane);
        await_barrier(m.ready + 1, ready_parity);
        ready_parity ^= 1;

        // ---- pages
        Query q;
        q.load(p, m, lane >> 2, lane & 3);
        const u8* mask = 0;
#if MASKED
        mask = mask_row(p, place, lane & 3);
#endif
        line.take(p, m, q, r, mask, s, scratch, warp, lane);
        // ---- merge
        u8* buffer = line.free_buffer();
        put_slot(p, m, r, buffer, warp, lane);
        line.enter(p, m.ends, at, stop, piece_b, warp, lane);
        __syncthreads();
        if (tid == 0) m.flag[1] = ready_parity;
        if (s.first == 0 && s.begin + s.last == s.end) {
            merge_slots<NotedBuffers>(m, MergedPart{m.merged}, tid);
            __syncthreads();
#pragma unroll 1
            for (int j = warp; j < columns; j += WARPS)
                finish_column<1>(p, m, place, MergedPart{m.merged}, 1, j, (float*)buffer, lane);
        } else {
            float* part = p.partial + (block * 2 + (s.begin < start ? 0 : 1)) * (i64)PART;
            merge_slots<NotedBuffers>(m, GlobalPart{part}, tid);
            const int first_block = cuts.block_of(s.begin), count = cuts.block_of(s.end - 1) - first_block + 1;
            if (is_last(p, m, place, count, tid)) {
                // The first of them may have the segment as its last, that is in its second place.
                const float* base = p.partial + first_block * 2 * (i64)PART;
                const float* zeroth = base + (s.begin >= cuts.start(first_block) ? PART : 0);
                finish_global(p, m, place, GlobalParts{zeroth, base, 2 * PART}, count, buffer, warp, lane);
            }
        }
        release_buffer();
        __syncthreads();
    }
}
