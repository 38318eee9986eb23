// A warp's pages of a stretch (`attend_split.cu`), straight into registers.
struct Stretch {
    Held held;
    const i64* addresses;  // of the stretch
    i64 offset;            // of the head in a page
    i64 here, next;        // this warp's first page, then the one that is taken; the one after it
    int count;             // pages of the stretch

    __device__ __forceinline__ Stretch(const Shared&, int, int) {}
    __device__ __forceinline__ void begin(const i64* first, int pages, i64 head_offset, int warp, int) {
        addresses = first;
        count = pages;
        offset = head_offset;
        here = warp < count ? addresses[warp] : 0;
        next = warp + WARPS < count ? addresses[warp + WARPS] : 0;
    }
    __device__ __forceinline__ void fetch_first(int lane) {
        if (here) held.load_keys((const u8*)(here + offset), lane);
    }
    __device__ __forceinline__ void fetch_rest(int) const {}
    // `first`: number of the stretch's first page.
    __device__ __forceinline__ void take(const Params& p, const Shared& m, const Query& q, Running& r, const u8* mask, int first, u8* scratch, int warp, int lane) {
#pragma unroll 1
        for (int n = warp; n < count; n += WARPS) {
            held.load_values((const u8*)(here + offset), lane);
#ifdef STAMPS
            if (n == 0) { STAMP(4) }
#endif
            take_page(p, m, q, r, held, mask, first + n, scratch, lane, [&](int done) {
                if (next) held.load_next_keys((const u8*)(next + offset), done, lane);
                if (done != Held::LAST_KEYS) return;
                here = next;
                const int after = n + 2 * WARPS;
                next = after < count ? addresses[after] : 0;
            });
        }
    }
};
