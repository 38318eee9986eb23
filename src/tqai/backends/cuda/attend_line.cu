// Decode attention on packed codes, one launch, as `attend_split.cu`, for work that does not divide into
// equal stretches: many sequences, or few multiprocessors.
//
// Work is a line of items: for every segment (see `params.cuh`) first its exact tokens, 16 per item, then its
// pages, one per item. Blocks take equal stretches of the line. A stretch may cover parts of several segments
// (*pieces*). Within a piece the warps take pages in turn, each with its own ring of buffers, which copies
// fill across pieces. The block merges its warps; a segment that ends in other blocks is merged by whichever
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

    u8* my_ring = m.ring + warp * STAGES * PAGE_BYTES;
    u64* my_bars = m.bars + warp * STAGES;
    u8* scratch = m.scratch + warp * SCRATCH_BYTES;
#if BULK
    if (lane < STAGES) make_barrier(my_bars + lane, 1);
#endif
    if (tid < 2) make_barrier(m.ready + tid, COLS);
    if (tid == 0) m.flag[1] = 0;  // parity of `ready`
    release_buffer();
    __syncwarp();
    Cursor cursor;
    cursor.begin(p, m.ends, start, stop, warp);
    // One buffer of each warp is always left free outside of the page loop; there its slot lies.
#pragma unroll 1
    for (int k = 0; k < STAGES - 1; ++k) {
        if (cursor.next) {
            fetch_page(my_ring + k * PAGE_BYTES, cursor.next, my_bars + k, lane);
            cursor.advance(p, m.ends, warp);
        } else {
            no_fetch();
        }
    }
    Constants constants;
    constants.load(p, tid);
    constants.keep(p, m, tid);
    __syncthreads();
    int stage = 0, spare = STAGES - 1, piece_b = 0;
    u32 parity = 0, ready_parity = 0;

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
#pragma unroll 1
        for (int page = max(s.first - s.exact, 0) + warp; page < s.last - s.exact; page += WARPS) {
            if (cursor.next) {
                fetch_page(my_ring + spare * PAGE_BYTES, cursor.next, my_bars + spare, lane);
                cursor.advance(p, m.ends, warp);
            } else {
                no_fetch();
            }
            await_page(my_bars + stage, parity);
            take_page(p, m, q, r, my_ring + stage * PAGE_BYTES, mask, page, scratch, lane);
            __syncwarp();
            spare = stage;
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }

        // ---- merge
        u8* buffer = my_ring + spare * PAGE_BYTES;
        put_slot(p, m, r, buffer, warp, lane);
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
