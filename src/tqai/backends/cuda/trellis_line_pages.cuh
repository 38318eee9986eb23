// A warp's pages on the line (`attend_line.cu`): those of a piece are a stretch.
#include "trellis_stretch.cuh"

struct LinePages {
    Stretch stretch;
    u8* buffer;

    __device__ __forceinline__ LinePages(const Shared& m, int warp, int lane) : stretch(m, warp, lane), buffer(m.ring + warp * BUFFER_BYTES) {}
    __device__ __forceinline__ void begin(const Params& p, const int* ends, int start, int stop, int warp, int lane) { enter(p, ends, start, stop, 0, warp, lane); }
    // When no pages are held any more: asks for the first of the piece at item `at`, if there is one. `b`: as for `piece_at`.
    __device__ __forceinline__ void enter(const Params& p, const int* ends, int at, int stop, int b, int warp, int lane) {
        if (at >= stop) return;
        const Piece s = piece_at(p, ends, at, stop, b);
        const int first = max(s.first - s.exact, 0);
        stretch.begin(p.addresses + s.place.b * p.address_stride + first, s.last - s.exact - first, (i64)s.place.kv_head * PAGE_BYTES, warp, lane);
        stretch.fetch_first(lane);
    }
    // All of piece s, which was entered.
    __device__ __forceinline__ void take(const Params& p, const Shared& m, const Query& q, Running& r, const u8* mask, const Piece& s, u8* scratch, int warp, int lane) {
        stretch.take(p, m, q, r, mask, max(s.first - s.exact, 0), scratch, warp, lane);
    }
    __device__ __forceinline__ u8* free_buffer() const { return buffer; }
};
