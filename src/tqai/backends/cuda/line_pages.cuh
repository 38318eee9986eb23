// A warp's pages on the line (`attend_line.cu`), by way of its own ring of buffers, which copies fill across pieces.
struct LinePages {
    u8* ring;
    u64* bars;
    Cursor cursor;
    int stage = 0, spare = STAGES - 1;
    u32 parity = 0;

    // Before any of it is used by bulk copies.
    __device__ __forceinline__ LinePages(const Shared& m, int warp, int lane) : ring(m.ring + warp * STAGES * PAGE_BYTES), bars(m.bars + warp * STAGES) {
#if BULK
        if (lane < STAGES) make_barrier(bars + lane, 1);
#endif
    }
    __device__ __forceinline__ void begin(const Params& p, const int* ends, int start, int stop, int warp, int lane) {
        cursor.begin(p, ends, start, stop, warp);
#pragma unroll 1
        for (int k = 0; k < STAGES - 1; ++k) fetch(p, ends, k, warp, lane);
    }
    __device__ __forceinline__ void fetch(const Params& p, const int* ends, int k, int warp, int lane) {
        if (cursor.next) {
            fetch_page(ring + k * PAGE_BYTES, cursor.next, bars + k, lane);
            cursor.advance(p, ends, warp);
        } else {
            no_fetch();
        }
    }
    __device__ __forceinline__ void enter(const Params&, const int*, int, int, int, int, int) const {}
    // All of piece s.
    __device__ __forceinline__ void take(const Params& p, const Shared& m, const Query& q, Running& r, const u8* mask, const Piece& s, u8* scratch, int warp, int lane) {
#pragma unroll 1
        for (int page = max(s.first - s.exact, 0) + warp; page < s.last - s.exact; page += WARPS) {
            fetch(p, m.ends, spare, warp, lane);
            await_page(bars + stage, parity);
            take_page(p, m, q, r, ring + stage * PAGE_BYTES, mask, page, scratch, lane);
            __syncwarp();
            spare = stage;
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
    }
    // One is always free outside of the page loop.
    __device__ __forceinline__ u8* free_buffer() const { return ring + spare * PAGE_BYTES; }
};
