// The line of items of `attend_line.cu`: how it is cut, and who finds what on it.

struct Piece {
    Place place;
    int first, last;  // items of the segment
    int begin, end;   // the whole segment on the line
    int exact;        // exact items of this sequence
};

__device__ __forceinline__ int items_of(const Params& p, int b) {
    return ceil_div(p.sinks, EXACT_TOKENS) + ceil_div(recent_of(p, b), EXACT_TOKENS) + pages_of(p, b);
}

__device__ __forceinline__ bool is_uniform(const Params& p) { return p.page_counts == 0 && p.recent_counts == 0; }

// Items in all. Where sequences differ, `ends[b + 1]` becomes the end of sequence b on the line.
__device__ __forceinline__ int line_items(const Params& p, const Shared& m, int tid) {
    const int heads = p.kv_heads * p.col_groups, lane = tid & 31;
    if (is_uniform(p)) return items_of(p, 0) * heads * p.batch;
    if (tid < 32) {
        int sum = 0;
        for (int base = 0; base < p.batch; base += 32) {
            int n = base + lane < p.batch ? items_of(p, base + lane) * heads : 0;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                int other = __shfl_up_sync(FULL, n, d);
                if (lane >= d) n += other;
            }
            if (base + lane < p.batch) m.ends[base + lane + 1] = sum + n;
            sum += __shfl_sync(FULL, n, 31);
        }
        if (lane == 0) m.ends[0] = 0;
    }
    __syncthreads();
    return m.ends[p.batch];
}

// The piece that begins at item `at` of the line and ends with its segment or at `stop`; `b` is a sequence not
// after it. `ends` is not read where all sequences have the same length.
__device__ __noinline__ Piece piece_at(const Params& p, const int* ends, int at, int stop, int b) {
    Piece s;
    const int heads = p.kv_heads * p.col_groups;
    int items, segment;
    if (is_uniform(p)) {
        items = items_of(p, 0);
        const int line = p.by_items.divide(at);
        b = p.by_heads.divide(line);
        segment = line - b * heads;
        s.begin = line * items;
    } else {
        while (at >= ends[b + 1]) ++b;
        items = (ends[b + 1] - ends[b]) / heads;
        segment = (at - ends[b]) / items;
        s.begin = ends[b] + segment * items;
    }
    s.place.recent = recent_of(p, b);
    s.place.b = b;
    s.place.kv_head = p.by_col_groups.divide(segment);
    s.place.col_group = segment - s.place.kv_head * p.col_groups;
    s.end = s.begin + items;
    s.first = at - s.begin;
    s.last = min(stop, s.end) - s.begin;
    s.exact = ceil_div(p.sinks, EXACT_TOKENS) + ceil_div(s.place.recent, EXACT_TOKENS);
    return s;
}

// Runs over the pages of one warp, in the order in which it computes on them, ahead of it.
struct Cursor {
    int at, stop, page, last_page, b;
    const u8* next;  // address of the page to fetch, 0 when there is none
    i64 head_offset;

    __device__ __forceinline__ void begin(const Params& p, const int* ends, int start, int end, int warp) {
        at = start;
        stop = end;
        b = 0;
        enter(p, ends, warp);
        load(p);
    }
    __device__ __forceinline__ void enter(const Params& p, const int* ends, int warp) {
        while (at < stop) {
            const Piece s = piece_at(p, ends, at, stop, b);
            b = s.place.b;
            at = s.begin + s.last;
            page = max(s.first - s.exact, 0) + warp;
            last_page = s.last - s.exact;
            head_offset = (i64)s.place.kv_head * PAGE_BYTES;
            if (page < last_page) return;
        }
        page = last_page = 0;
    }
    __device__ __forceinline__ void load(const Params& p) {
        next = page < last_page ? (const u8*)(p.addresses[(i64)b * p.address_stride + page] + head_offset) : 0;
    }
    __device__ __forceinline__ void advance(const Params& p, const int* ends, int warp) {
        page += WARPS;
        if (page >= last_page) enter(p, ends, warp);
        load(p);
    }
};

// How the line is cut: block k begins at floor(total * k / blocks), without a product that overflows.
struct Cuts {
    int total, blocks, each, rest;
    float inverse;
    __device__ __forceinline__ Cuts(int total, int blocks, const Divisor& by_grid) : total(total), blocks(blocks) {
        each = blocks == (int)gridDim.x ? by_grid.divide(total) : total / blocks;
        rest = total - each * blocks;
        inverse = rcp_fast((float)blocks);
    }
    __device__ __forceinline__ int start(int block) const {
        // the dividend is small: half a unit keeps the rounding of the product away from whole numbers
        return block * each + (int)(((float)(block * rest) + 0.5f) * inverse);
    }
    __device__ __noinline__ int block_of(int item) const {
        int block = min((int)((float)item * (float)blocks * rcp_fast((float)total)), blocks - 1);
        while (start(block + 1) <= item) ++block;
        while (start(block) > item) --block;
        return block;
    }
};
