// A warp's pages of a stretch (`attend_split.cu`), by way of its own ring of buffers, which bulk copies fill.
struct Stretch {
    u8* ring;
    u64* bars;
    const i64* addresses;  // of the stretch
    i64 offset;            // of the head in a page
    i64 mine, next;        // lane k: the k-th of this warp's pages; the one after those of all buffers
    int count;             // pages of the stretch

    // Before any of it is used by bulk copies.
    __device__ __forceinline__ Stretch(const Shared& m, int warp, int lane) : ring(m.ring + warp * STAGES * PAGE_BYTES), bars(m.bars + warp * BARS) {
#if BULK
        if (lane < BARS) make_barrier(bars + lane, 1);
#endif
    }
    __device__ __forceinline__ void begin(const i64* first, int pages, i64 head_offset, int warp, int lane) {
        addresses = first;
        count = pages;
        offset = head_offset;
        mine = lane < STAGES && warp + lane * WARPS < count ? addresses[warp + lane * WARPS] : 0;
        next = warp + STAGES * WARPS < count ? addresses[warp + STAGES * WARPS] : 0;
    }
    __device__ __forceinline__ void fetch(int k, int lane) const {
        const i64 page = __shfl_sync(FULL, mine, k);
#if HALVES
        if (page) fetch_keys(ring, (const u8*)(page + offset), bars, lane);
        if (page) fetch_values(ring, (const u8*)(page + offset), bars + 1, lane);
#else
        if (page) fetch_page(ring + k * PAGE_BYTES, (const u8*)(page + offset), bars + k, lane);
        else no_fetch();
#endif
    }
    __device__ __forceinline__ void fetch_first(int lane) const { fetch(0, lane); }
    __device__ __forceinline__ void fetch_rest(int lane) const {
#pragma unroll
        for (int k = 1; k < STAGES; ++k) fetch(k, lane);
    }
    // `first`: number of the stretch's first page.
    __device__ __forceinline__ void take(const Params& p, const Shared& m, const Query& q, Running& r, const u8* mask, int first, u8* scratch, int warp, int lane) {
        int stage = 0;
        u32 parity = 0;
#pragma unroll 1
        for (int n = warp; n < count; n += WARPS) {
            u8* buffer = ring + stage * PAGE_BYTES;
            await_page(bars + stage, parity);
#ifdef STAMPS
            if (n == 0) { STAMP(4) }
#endif
#if HALVES
            // The next page's keys come where this one's were while its values are taken, and the other way round.
            take_page(p, m, q, r, buffer, mask, first + n, scratch, lane, [&] {
                __syncwarp();
                if (next) fetch_keys(buffer, (const u8*)(next + offset), bars, lane);
                await_page(bars + 1, parity);
            });
#else
            take_page(p, m, q, r, buffer, mask, first + n, scratch, lane);
#endif
            __syncwarp();
            if (next) {
#if HALVES
                fetch_values(buffer, (const u8*)(next + offset), bars + 1, lane);
#else
                fetch_page(buffer, (const u8*)(next + offset), bars + stage, lane);
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
    }
};
