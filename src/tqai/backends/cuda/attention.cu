// Decode attention on packed codes, one launch: history (codes), sinks and recent tokens (exact), merged.
//
// Work is a line of items: for every sequence, KV head and group of 4 query columns (a *segment*) first its
// exact tokens, 16 per item, then its pages, one per item. Blocks take equal stretches of the line. A
// stretch may cover parts of several segments (*pieces*). Within a piece the warps take items in turn, each
// with its own ring of page buffers, filled by bulk copies. The block merges its warps; a segment that ends
// in other blocks is merged by whichever block arrives last, which also rotates back and stores.
//
// A query column is one (query head, new token). Four of them, each in a high and a low int8 part, are the
// 8 columns of the tensor core's B operand; keys are A (16 tokens x 32 dimensions), then values are A
// (16 dimensions x 32 tokens) against the weights in two uint8 parts. Lane = 4 g + c holds, for column c,
// the logits of tokens 8 g .. 8 g + 7 of a page, then outputs of dimensions 16 u + g and 16 u + g + 8.
//
// More macros: WARPS, STAGES, SOFTCAP, MASKED (0 or 1), OUT (as DTYPE).

#include "device.cuh"
#include "unpack.cuh"

#define COLS 4
#define THREADS (WARPS * 32)
#define K_UNITS (DK / 16)
#define V_UNITS (DV / 16)
#define K_STEPS ((K_UNITS + 1) / 2)
#define K_TABLES (HAS_TWO_TABLES(BK) ? 2 : 1)
#define V_TABLES (HAS_TWO_TABLES(BV) ? 2 : 1)
#define V_PAIRS ((DV + 63) / 64)
#define EXACT_TOKENS 16
#define NOTHING (-1.0e30f)
#define LOG2E 1.4426950408889634f
#define HEADROOM 40.0f

#define SLOT_ROW (DV + 8)
#define SLOT (COLS * SLOT_ROW)
#define QBYTES_ROW (32 * K_STEPS + 16)
#define PASS_BYTES 544
#define MAX_STATS 160  // blocks that may share a segment, and more than warps
#define LOTS (WARPS / COLS < 1 ? 1 : WARPS / COLS)
#define AHEAD 6

static_assert(SLOT * 4 <= PAGE_BYTES && DK * 4 <= PAGE_BYTES, "a slot must fit into a page buffer");

// Division by a number that the host knows, for dividends below 2^31.
struct Divisor {
    u32 factor, shift;
    __device__ __forceinline__ int divide(int n) const { return (int)((__umulhi((u32)n, factor) + (u32)n) >> shift); }
};

// What is read first comes first: constants arrive line by line.
struct Params {
    const i64* addresses;
    i64 address_stride;
    const int* page_counts;
    const int* recent_counts;
    int pages, sinks, recent, first_token;
    int batch, kv_heads, group, new_tokens, col_groups;
    Divisor by_items, by_heads, by_col_groups, by_group, by_grid;  // items: of each segment, where all are alike
    float scaling, softcap;
    const void* query;
    i64 query_strides[3];
    const float *plan_k, *plan_v;
    const u32 *lut_k, *lut_v;
    Levels levels_k, levels_v;
    const void *recent_keys, *recent_values, *sink_keys, *sink_values;
    i64 recent_key_strides[3], recent_value_strides[3], sink_key_strides[3], sink_value_strides[3];
    const u8* mask;
    i64 mask_strides[4];
    float* partial;
    int* counters;
    void* out;
    float* lse;
};

struct Piece {
    int b, kv_head, col_group;
    int first, last;    // items of the segment
    int begin, end;     // the whole segment on the line
    int exact, recent;  // exact items and recent tokens of this sequence
};

// Shared memory, in this order; `plan.py` computes the same total.
#define RING_BYTES (WARPS * STAGES * PAGE_BYTES)
#define LUTS ((BK == 8) + (BV == 8))
#define STATS (MAX_STATS * COLS * 2)
#define SIGNS (ROTK * DK + ROTV * DV)
#define QUERY_LOADS ((COLS * DK + THREADS - 1) / THREADS)
#define SIGN_LOADS (SIGNS / THREADS + 1)
#define QBYTES_BYTES (2 * 8 * QBYTES_ROW)

__device__ __forceinline__ void arrive(u64* bar) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(shared_address(bar)) : "memory");
}

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void fetch_page(u8* stage, const u8* page, u64* bar, int lane) {
    if (lane == 0) {
        u32 b = shared_address(bar);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(PAGE_BYTES) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(stage)), "l"(page), "r"(PAGE_BYTES), "r"(b) : "memory");
    }
}
__device__ __forceinline__ void no_fetch() {}
// Between ordinary writes to a buffer and the next bulk copy into it.
__device__ __forceinline__ void release_buffer() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void await_barrier(u64* bar, u32 parity) {
    u32 b = shared_address(bar), done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(b), "r"(parity) : "memory");
    } while (!done);
}
__device__ __forceinline__ void await_page(u64* bar, u32 parity) { await_barrier(bar, parity); }
#else
__device__ __forceinline__ void fetch_page(u8* stage, const u8* page, u64* bar, int lane) {
    u32 s = shared_address(stage);
    for (int i = lane * 16; i < PAGE_BYTES; i += 512)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(s + i), "l"(page + i) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ __forceinline__ void no_fetch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void release_buffer() {}
__device__ __forceinline__ void await_barrier(u64* bar, u32 parity) {
    u32 b = shared_address(bar), done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(b), "r"(parity) : "memory");
    } while (!done);
}
__device__ __forceinline__ void await_page(u64* bar, u32 parity) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    __syncwarp();
}
#endif

__device__ __forceinline__ int recent_of(const Params& p, int b) {
    return p.recent_counts ? p.recent_counts[b] : p.recent;
}

__device__ __forceinline__ int items_of(const Params& p, int b) {
    int pages = p.page_counts ? p.page_counts[b] : p.pages;
    return ceil_div(p.sinks, EXACT_TOKENS) + ceil_div(recent_of(p, b), EXACT_TOKENS) + pages;
}

__device__ __forceinline__ bool is_uniform(const Params& p) { return p.page_counts == 0 && p.recent_counts == 0; }

// The piece that begins at item `at` of the line and ends with its segment or at `stop`. `ends`, in shared
// memory, has where each sequence ends on the line; it is not read where all have the same length.
__device__ __forceinline__ Piece piece_at(const Params& p, const int* ends, int at, int stop, int b) {
    Piece s;
    const int heads = p.kv_heads * p.col_groups;
    int items, segment;
    if (is_uniform(p)) {
        items = items_of(p, 0);
        const int line = p.by_items.divide(at);
        b = p.by_heads.divide(line);
        segment = line - b * heads;
        s.begin = line * items;
        s.recent = p.recent;
    } else {
        while (at >= ends[b + 1]) ++b;
        items = (ends[b + 1] - ends[b]) / heads;
        segment = (at - ends[b]) / items;
        s.begin = ends[b] + segment * items;
        s.recent = recent_of(p, b);
    }
    s.b = b;
    s.kv_head = p.by_col_groups.divide(segment);
    s.col_group = segment - s.kv_head * p.col_groups;
    s.end = s.begin + items;
    s.first = at - s.begin;
    s.last = min(stop, s.end) - s.begin;
    s.exact = ceil_div(p.sinks, EXACT_TOKENS) + ceil_div(s.recent, EXACT_TOKENS);
    return s;
}

// Runs over the pages of one warp, in the order in which it computes on them, ahead of it.
struct Cursor {
    int at, stop, page, last_page, b;
    const u8* next;  // address of the page to fetch, 0 when there is none
    i64 head_offset;

    __device__ __forceinline__ void enter(const Params& p, const int* ends, int warp) {
        while (at < stop) {
            Piece s = piece_at(p, ends, at, stop, b);
            b = s.b;
            at = s.begin + s.last;
            page = max(s.first - s.exact, 0) + warp;
            last_page = s.last - s.exact;
            head_offset = (i64)s.kv_head * PAGE_BYTES;
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
    __device__ __forceinline__ int block_of(int item) const {
        int block = min((int)((float)item * (float)blocks * rcp_fast((float)total)), blocks - 1);
        while (start(block + 1) <= item) ++block;
        while (start(block) > item) --block;
        return block;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) tqai_attend(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) u8 smem[];
    u8* ring = smem;
    u32* luts = (u32*)(ring + RING_BYTES);
    float* merged = (float*)(luts + LUTS * 8192);  // one more slot: the result
    float* stats = merged + SLOT;                  // [slot or block][column] (maximum, sum)
    float* qx = stats + STATS;                     // queries as given, [COLS][DK]
    float* signs = qx + COLS * DK;                 // of the Hadamard rotations
    u8* qbytes = (u8*)(signs + SIGNS);             // [2 tables][column, part][QBYTES_ROW]
    u8* passes = qbytes + 2 * 8 * QBYTES_ROW;      // per warp: weights on their way from column to row
    u64* bars = (u64*)(passes + WARPS * V_TABLES * PASS_BYTES);
    u64* query_bar = bars + WARPS * STAGES;         // queries are ready
    float* colf = (float*)(query_bar + 2);           // [COLS] scale of a logit, base 2
    int* coli = (int*)(colf + COLS);                // [COLS] what to subtract for kappa
    int* flag = coli + COLS;                        // [4], then where each warp's slot lies
    int* ends = flag + 4 + WARPS;                   // [batch + 1]

    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int g = lane >> 2, c = lane & 3;
    const int heads = p.kv_heads * p.col_groups;

    int total;
    if (is_uniform(p)) {
        total = items_of(p, 0) * heads * p.batch;
    } else {
        if (warp == 0) {
            int sum = 0;
            for (int base = 0; base < p.batch; base += 32) {
                int n = base + lane < p.batch ? items_of(p, base + lane) * heads : 0;
#pragma unroll
                for (int d = 1; d < 32; d *= 2) {
                    int other = __shfl_up_sync(FULL, n, d);
                    if (lane >= d) n += other;
                }
                if (base + lane < p.batch) ends[base + lane + 1] = sum + n;
                sum += __shfl_sync(FULL, n, 31);
            }
            if (lane == 0) ends[0] = 0;
        }
        __syncthreads();
        total = ends[p.batch];
    }
    const int blocks = min((int)gridDim.x, total), block = blockIdx.x;
    if (block >= blocks) return;
    const Cuts cuts(total, blocks, p.by_grid);
    const int start = cuts.start(block), stop = cuts.start(block + 1);

    u8* my_ring = ring + warp * STAGES * PAGE_BYTES;
    u64* my_bars = bars + warp * STAGES;
    u8* my_pass = passes + warp * V_TABLES * PASS_BYTES;
    Cursor cursor;
    cursor.next = 0;
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        for (int s = 0; s < STAGES; ++s)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(bars + warp * STAGES + s)) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
#endif
    if (tid == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(query_bar)), "n"(COLS) : "memory");
    int stage = 0, spare = STAGES - 1;
    u32 parity = 0, query_parity = 0;
    const float* plan_k = ROTK ? signs : p.plan_k;
    const float* plan_v = ROTV ? signs + ROTK * DK : p.plan_v;

    const u32* lut_k = luts;
    const u32* lut_v = luts + (BK == 8 ? 8192 : 0);
    if (BK == 8)
        for (int i = tid; i < 8192; i += THREADS) luts[i] = p.lut_k[i >> 5];
    if (BV == 8)
        for (int i = tid; i < 8192; i += THREADS) luts[(BK == 8 ? 8192 : 0) + i] = p.lut_v[i >> 5];

    int piece_b = 0;
#pragma unroll 1
    for (int at = start; at < stop;) {
        const Piece s = piece_at(p, ends, at, stop, piece_b);
        piece_b = s.b;
        at = s.begin + s.last;
        [[maybe_unused]] const int history_tokens = (p.page_counts ? p.page_counts[s.b] : p.pages) * PAGE_TOKENS - p.first_token;

        // ---- queries of this piece
        const int cols = min(COLS, p.group * p.new_tokens - s.col_group * COLS);
        // The first page addresses are asked for first, then all that is small, then the pages.
        const bool begins = s.begin + s.first == start;
        if (begins) {
            cursor.at = start;
            cursor.stop = stop;
            cursor.b = 0;
            cursor.enter(p, ends, warp);
            cursor.load(p);
        }
        float early[QUERY_LOADS], early_signs[SIGN_LOADS];
#pragma unroll
        for (int k = 0; k < QUERY_LOADS; ++k) {
            int i = tid + k * THREADS, j = i / DK, d = i - j * DK;
            int col = s.col_group * COLS + j, t = p.by_group.divide(col), h = s.kv_head * p.group + col - t * p.group;
            early[k] = j < cols ? load_one(p.query, s.b * p.query_strides[0] + h * p.query_strides[1] + t * p.query_strides[2] + d) : 0.0f;
        }
        if (begins) {
#pragma unroll
            for (int k = 0; k < SIGN_LOADS; ++k) {
                int i = tid + k * THREADS;
                early_signs[k] = i >= SIGNS ? 0.0f : i < ROTK * DK ? p.plan_k[i] : p.plan_v[i - ROTK * DK];
            }
            // One buffer of each warp is always left free outside of the page loop; there its slot lies.
#pragma unroll 1
            for (int k = 0; k < STAGES - 1; ++k) {
                if (cursor.next) {
                    fetch_page(my_ring + k * PAGE_BYTES, cursor.next, my_bars + k, lane);
                    cursor.advance(p, ends, warp);
                } else {
                    no_fetch();
                }
            }
#pragma unroll
            for (int k = 0; k < SIGN_LOADS; ++k)
                if (tid + k * THREADS < SIGNS) signs[tid + k * THREADS] = early_signs[k];
        }
#pragma unroll
        for (int k = 0; k < QUERY_LOADS; ++k)
            if (tid + k * THREADS < COLS * DK) qx[tid + k * THREADS] = early[k];
        // Spare buffers are where slots lie: by warp, then within it.
        float* slot = (float*)(my_ring + spare * PAGE_BYTES);
        __syncthreads();
        for (int j = warp; j < COLS; j += WARPS) {
            float* x = slot;
            for (int d = lane; d < DK; d += 32) x[d] = qx[j * DK + d];
            __syncwarp();
            rotate_rows<DK, ROTK, false, 1>(x, 0, plan_k, lane);
            float top = 0.0f, sum = 0.0f;
            for (int d = lane; d < DK; d += 32) {
                top = max_nan(top, fabsf(x[d]));
                sum += x[d];
            }
#pragma unroll
            for (int o = 1; o < 32; o *= 2) {
                top = max_nan(top, __shfl_xor_sync(FULL, top, o));
                sum += __shfl_xor_sync(FULL, sum, o);
            }
            float scale = top > 0.0f ? 32512.0f / top : 1.0f;
            if (!(scale < 1.0e30f)) scale = top > 0.0f ? 1.0e30f : scale;
            float turned = p.scaling < 0.0f ? -scale : scale;
#pragma unroll 1
            for (int d = lane; d < 32 * K_STEPS; d += 32) {
                float y = d < DK ? x[d] * turned : 0.0f;
#pragma unroll
                for (int t = 0; t < K_TABLES; ++t) {
                    int n = __float2int_rn(y * (t == 0 ? p.levels_k.coef_a : p.levels_k.coef_b));
                    int high = (n + 128) >> 8;
                    qbytes[(t * 8 + 2 * j) * QBYTES_ROW + d] = (u8)high;
                    qbytes[(t * 8 + 2 * j + 1) * QBYTES_ROW + d] = (u8)(n - high * 256);
                }
            }
            if (lane == 0) {
                // NaN or inf among the queries shows in the scale, whatever the integers are.
                float bad = top * 0.0f;
                colf[j] = fmaxf(fabsf(p.scaling), 1.0e-30f) * p.levels_k.unit / scale + bad;
                coli[j] = -__float2int_rn(p.levels_k.kappa / p.levels_k.unit * turned * sum);
            }
            release_buffer();
            __syncwarp();
            if (lane == 0) arrive(query_bar);
        }

        // ---- exact tokens, by the last warps first, while the first ones rotate the queries
        const int exact_items = max(min(s.last, s.exact) - s.first, 0);
        const int page_items = max(s.last - max(s.first, s.exact), 0);
        float o[V_UNITS][2], top = NOTHING, sum = 0.0f, weight_sum = 0.0f;
#pragma unroll
        for (int u = 0; u < V_UNITS; ++u) o[u][0] = o[u][1] = 0.0f;
        if (WARPS - 1 - warp < exact_items) {
            float acc[COLS][2 * V_PAIRS], tops[COLS], sums[COLS];
#pragma unroll
            for (int j = 0; j < COLS; ++j) {
                tops[j] = NOTHING;
                sums[j] = 0.0f;
#pragma unroll
                for (int i = 0; i < 2 * V_PAIRS; ++i) acc[j][i] = 0.0f;
            }
            const int sink_items = ceil_div(p.sinks, EXACT_TOKENS);
            float* weights = (float*)my_pass;  // [16 tokens][COLS]
#pragma unroll 1
            for (int item = s.first + WARPS - 1 - warp; item < min(s.last, s.exact); item += WARPS) {
                const bool sink = item < sink_items;
                const int t0 = (sink ? item : item - sink_items) * EXACT_TOKENS;
                const int count = sink ? p.sinks : s.recent;
                const void* keys = sink ? p.sink_keys : p.recent_keys;
                const void* values = sink ? p.sink_values : p.recent_values;
                const i64* ks = sink ? p.sink_key_strides : p.recent_key_strides;
                const i64* vs = sink ? p.sink_value_strides : p.recent_value_strides;
                const int t = t0 + (lane >> 1);
                const int half = (lane & 1) * (DK / 2);
                const int tc = min(t, count - 1);
                float dot[COLS] = {0.0f, 0.0f, 0.0f, 0.0f};
                i64 row = s.b * ks[0] + s.kv_head * ks[1] + tc * ks[2] + half;
                // Everything is asked for at once, before any of it is used.
                uint4 words[DK / 16];
#pragma unroll
                for (int d = 0; d < DK / 16; ++d) words[d] = *(const uint4*)((const u16*)keys + row + 8 * d);
                u32 pairs[EXACT_TOKENS][V_PAIRS];
                const i64 vrow = s.b * vs[0] + s.kv_head * vs[1] + 2 * lane;
#pragma unroll
                for (int i = 0; i < EXACT_TOKENS; ++i)
#pragma unroll
                    for (int m = 0; m < V_PAIRS; ++m)
                        if (DV % 64 == 0 || 64 * m + 2 * lane < DV)
                            pairs[i][m] = *(const u32*)((const u16*)values + vrow + min(t0 + i, count - 1) * vs[2] + 64 * m);
#pragma unroll
                for (int d = 0; d < DK / 16; ++d) {
                    float k[8];
                    two_of_word(words[d].x, k[0], k[1]);
                    two_of_word(words[d].y, k[2], k[3]);
                    two_of_word(words[d].z, k[4], k[5]);
                    two_of_word(words[d].w, k[6], k[7]);
#pragma unroll
                    for (int j = 0; j < COLS; ++j) {
                        const float4 q0 = *(const float4*)(qx + j * DK + half + 8 * d);
                        const float4 q1 = *(const float4*)(qx + j * DK + half + 8 * d + 4);
                        dot[j] = fmaf(k[0], q0.x, fmaf(k[1], q0.y, fmaf(k[2], q0.z, fmaf(k[3], q0.w, dot[j]))));
                        dot[j] = fmaf(k[4], q1.x, fmaf(k[5], q1.y, fmaf(k[6], q1.z, fmaf(k[7], q1.w, dot[j]))));
                    }
                }
                float weight[COLS];
#pragma unroll
                for (int j = 0; j < COLS; ++j) {
                    float x = dot[j] + __shfl_xor_sync(FULL, dot[j], 1);
                    x *= p.scaling;
#if SOFTCAP
                    x = p.softcap - 2.0f * p.softcap * rcp_fast(exp2f(x * (2.0f * LOG2E) / p.softcap) + 1.0f);
#endif
                    x *= LOG2E;
                    int col = min(s.col_group * COLS + j, p.group * p.new_tokens - 1), nt = p.by_group.divide(col);
                    bool seen = t < count;
#if MASKED
                    if (seen) {
                        int h = s.kv_head * p.group + col - nt * p.group;
                        int at_token = sink ? t : p.sinks + history_tokens + t;
                        seen = p.mask[s.b * p.mask_strides[0] + h * p.mask_strides[1] + nt * p.mask_strides[2] + at_token * p.mask_strides[3]];
                    }
#else
                    seen = seen && (sink || t <= s.recent - p.new_tokens + nt);
#endif
                    x = seen ? x : -INF;
                    float most = x;
#pragma unroll
                    for (int o = 2; o < 32; o *= 2) most = max_nan(most, __shfl_xor_sync(FULL, most, o));
                    most = max_nan(most, tops[j]);
                    float fade = exp2_fast(tops[j] - most);
                    tops[j] = most;
                    weight[j] = seen ? exp2_fast(x - most) : 0.0f;
                    sums[j] = fmaf(sums[j], fade, (lane & 1) ? 0.0f : weight[j]);
#pragma unroll
                    for (int i = 0; i < 2 * V_PAIRS; ++i) acc[j][i] *= fade;
                }
                __syncwarp();
                if (!(lane & 1)) *(float4*)(weights + (lane >> 1) * COLS) = make_float4(weight[0], weight[1], weight[2], weight[3]);
                __syncwarp();
#pragma unroll
                for (int i = 0; i < EXACT_TOKENS; ++i) {
                    float4 wt = *(const float4*)(weights + i * COLS);
                    float wj[COLS] = {wt.x, wt.y, wt.z, wt.w};
#pragma unroll
                    for (int m = 0; m < V_PAIRS; ++m) {
                        float a, b;
                        two_of_word(pairs[i][m], a, b);
#pragma unroll
                        for (int j = 0; j < COLS; ++j) {
                            // a weight of 0 must not meet a NaN
                            if (wj[j] != 0.0f) {
                                acc[j][2 * m] = fmaf(wj[j], a, acc[j][2 * m]);
                                acc[j][2 * m + 1] = fmaf(wj[j], b, acc[j][2 * m + 1]);
                            }
                        }
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < COLS; ++j) {
#pragma unroll
                for (int o = 1; o < 32; o *= 2) sums[j] += __shfl_xor_sync(FULL, sums[j], o);
#pragma unroll
                for (int m = 0; m < V_PAIRS; ++m) {
                    int d = 64 * m + 2 * lane;
                    if (DV % 64 == 0 || d < DV) *(float2*)(slot + j * SLOT_ROW + d) = make_float2(acc[j][2 * m], acc[j][2 * m + 1]);
                }
            }
            // Rotated into the space of the values' codes, it is where this warp's pages go on from.
            rotate_rows<DV, ROTV, false, COLS>(slot, SLOT_ROW, plan_v, lane);
#pragma unroll
            for (int u = 0; u < V_UNITS; ++u) {
                o[u][0] = slot[c * SLOT_ROW + 16 * u + g];
                o[u][1] = slot[c * SLOT_ROW + 16 * u + g + 8];
            }
#pragma unroll
            for (int j = 0; j < COLS; ++j)
                if (c == j) {
                    top = tops[j];
                    sum = g == 0 ? sums[j] : 0.0f;
                }
            release_buffer();
            __syncwarp();
        }
        await_barrier(query_bar, query_parity);
        query_parity ^= 1;

        // ---- pages
        u32 qa[K_STEPS][2], qb[K_STEPS][2];
#pragma unroll
        for (int v = 0; v < K_STEPS; ++v) {
            const u32* a = (const u32*)(qbytes + g * QBYTES_ROW + 32 * v + 4 * c);
            qa[v][0] = a[0];
            qa[v][1] = a[4];
            if (K_TABLES == 2) {
                const u32* b = (const u32*)(qbytes + (8 + g) * QBYTES_ROW + 32 * v + 4 * c);
                qb[v][0] = b[0];
                qb[v][1] = b[4];
            }
        }
#if SOFTCAP
        const float logit_scale = colf[c] * (2.0f * LOG2E) / p.softcap;
#else
        const float logit_scale = colf[c] * LOG2E;
#endif
        const int less = coli[c];
        const Levels lk = p.levels_k, lv = p.levels_v;
#if MASKED
        const u8* mask_row;
        {
            int col = min(s.col_group * COLS + c, p.group * p.new_tokens - 1), nt = p.by_group.divide(col);
            int h = s.kv_head * p.group + col - nt * p.group;
            mask_row = p.mask + s.b * p.mask_strides[0] + h * p.mask_strides[1] + nt * p.mask_strides[2] + (p.sinks - p.first_token) * p.mask_strides[3];
        }
#endif
#pragma unroll 1
        for (int page = max(s.first - s.exact, 0) + warp; page < s.last - s.exact; page += WARPS) {
            if (cursor.next) {
                fetch_page(my_ring + spare * PAGE_BYTES, cursor.next, my_bars + spare, lane);
                cursor.advance(p, ends, warp);
            } else {
                no_fetch();
            }
            const u8* data = my_ring + stage * PAGE_BYTES;
            await_page(my_bars + stage, parity);

            int dots[4][4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                dots[j][0] = dots[j][2] = 0;
                dots[j][1] = dots[j][3] = less;
            }
#pragma unroll
            for (int v = 0; v < K_STEPS; ++v) {
                u32 w0[BK], a0[8], b0[8];
                load_unit<BK>(data + (2 * v) * (BK * 128), lane, w0);
                unpack_unit<BK>(w0, lk, lut_k, lane, a0, b0);
                if (2 * v + 1 < K_UNITS) {
                    u32 w1[BK], a1[8], b1[8];
                    load_unit<BK>(data + (2 * v + 1) * (BK * 128), lane, w1);
                    unpack_unit<BK>(w1, lk, lut_k, lane, a1, b1);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        mma_s8s8(dots[j], a0[2 * j], a0[2 * j + 1], a1[2 * j], a1[2 * j + 1], qa[v][0], qa[v][1]);
                        if (K_TABLES == 2) mma_s8s8(dots[j], b0[2 * j], b0[2 * j + 1], b1[2 * j], b1[2 * j + 1], qb[v][0], qb[v][1]);
                    }
                } else {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        mma_s8s8_half(dots[j], a0[2 * j], a0[2 * j + 1], qa[v][0]);
                        if (K_TABLES == 2) mma_s8s8_half(dots[j], b0[2 * j], b0[2 * j + 1], qb[v][0]);
                    }
                }
            }

            const uint4 sk4 = *(const uint4*)(data + K_SCALES_AT + g * 16);
            const uint4 sv4 = *(const uint4*)(data + V_SCALES_AT + g * 16);
            const u32 sk[4] = {sk4.x, sk4.y, sk4.z, sk4.w}, sv[4] = {sv4.x, sv4.y, sv4.z, sv4.w};
            float x[8], w[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float d = (float)(dots[i >> 1][(i & 1) * 2] * 256 + dots[i >> 1][(i & 1) * 2 + 1]);
                x[i] = d * bits_float(i & 1 ? sk[i >> 1] & 0xffff0000u : sk[i >> 1] << 16);
                w[i] = bits_float(i & 1 ? sv[i >> 1] & 0xffff0000u : sv[i >> 1] << 16);
#if SOFTCAP
                x[i] = (LOG2E * p.softcap) * (1.0f - 2.0f * rcp_fast(exp2f(x[i] * logit_scale) + 1.0f));
#endif
            }
#if MASKED
            {
                i64 t = (i64)page * PAGE_TOKENS + g * 8;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    bool seen = t + i >= p.first_token && mask_row[(t + i) * p.mask_strides[3]];
                    x[i] = seen ? x[i] : -INF;
                    w[i] = seen ? w[i] : 0.0f;
                }
            }
#else
            if (page == 0 && p.first_token > 0) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    bool seen = g * 8 + i >= p.first_token;
                    x[i] = seen ? x[i] : -INF;
                    w[i] = seen ? w[i] : 0.0f;
                }
            }
#endif
            // The reference of the exponentials moves only when a logit rises far above it: float32 has
            // room for 2^40, and the weights are normalized once more below.
            float most = max_nan(max_nan(max_nan(x[0], x[1]), max_nan(x[2], x[3])), max_nan(max_nan(x[4], x[5]), max_nan(x[6], x[7])));
#if SOFTCAP
            const float unit = 1.0f;
#else
            const float unit = logit_scale;
            most *= unit;
#endif
            if (__any_sync(FULL, !(most <= top + HEADROOM))) {
#pragma unroll
                for (int m = 4; m < 32; m *= 2) most = max_nan(most, __shfl_xor_sync(FULL, most, m));
                most = max_nan(most, top);
                float fade = exp2_fast(top - most);
                top = most;
                sum *= fade;
                weight_sum *= fade;
#pragma unroll
                for (int u = 0; u < V_UNITS; ++u) {
                    o[u][0] *= fade;
                    o[u][1] *= fade;
                }
            }
            most = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float e = exp2_fast(fmaf(x[i], unit, -top));
                sum += e;
                w[i] *= e;
                weight_sum += w[i];
                most = max_nan(most, w[i]);
            }
#pragma unroll
            for (int m = 4; m < 32; m *= 2) most = max_nan(most, __shfl_xor_sync(FULL, most, m));
            const float share = 65280.0f * rcp_fast(most);
            const float back = most * (lv.unit / 65280.0f);

            // Weights as 16-bit integers, in the low half of floats near 2^23; then from "lane 4 g + c has
            // tokens 8 g .. of column c" to "lane 4 n + c has tokens 8 c .. of column and part n".
            u32 pa[2][2], pb[2][2];
            __syncwarp();
#pragma unroll
            for (int t = 0; t < V_TABLES; ++t) {
                const float f = share * (t == 0 ? lv.coef_a : lv.coef_b);
                u32 n[8];
#pragma unroll
                for (int i = 0; i < 8; ++i) n[i] = __float_as_uint(fmaf(w[i], f, 8388608.0f));
                u32 e0 = __byte_perm(n[0], n[1], 0x5410), e1 = __byte_perm(n[2], n[3], 0x5410);
                u32 e2 = __byte_perm(n[4], n[5], 0x5410), e3 = __byte_perm(n[6], n[7], 0x5410);
                u8* pass = my_pass + t * PASS_BYTES + lane * 8;
                *(uint2*)pass = make_uint2(__byte_perm(e0, e1, 0x6420), __byte_perm(e2, e3, 0x6420));
                *(uint2*)(pass + 272) = make_uint2(__byte_perm(e0, e1, 0x7531), __byte_perm(e2, e3, 0x7531));
            }
            __syncwarp();
#pragma unroll
            for (int t = 0; t < V_TABLES; ++t) {
                const u8* pass = my_pass + t * PASS_BYTES + ((g & 1) ? 0 : 272) + (c * 4 + (g >> 1)) * 8;
                uint2 lo = *(const uint2*)pass, hi = *(const uint2*)(pass + 128);
                u32(&q)[2][2] = t == 0 ? pa : pb;
                q[0][0] = lo.x; q[0][1] = lo.y;
                q[1][0] = hi.x; q[1][1] = hi.y;
            }
#pragma unroll
            for (int u = 0; u < V_UNITS; ++u) {
                u32 w0[BV], a[8], b[8];
                load_unit<BV>(data + V_CODES_AT + u * (BV * 128), lane, w0);
                unpack_unit<BV>(w0, lv, lut_v, lane, a, b);
                int s4[4] = {0, 0, 0, 0};
                mma_s8u8(s4, a[0], a[1], a[2], a[3], pa[0][0], pa[0][1]);
                mma_s8u8(s4, a[4], a[5], a[6], a[7], pa[1][0], pa[1][1]);
                if (V_TABLES == 2) {
                    mma_s8u8(s4, b[0], b[1], b[2], b[3], pb[0][0], pb[0][1]);
                    mma_s8u8(s4, b[4], b[5], b[6], b[7], pb[1][0], pb[1][1]);
                }
                o[u][0] = fmaf((float)(s4[0] * 256 + s4[1]), back, o[u][0]);
                o[u][1] = fmaf((float)(s4[2] * 256 + s4[3]), back, o[u][1]);
            }

            __syncwarp();
            spare = stage;
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
        // ---- merge the warps
#pragma unroll
        for (int m = 4; m < 32; m *= 2) {
            sum += __shfl_xor_sync(FULL, sum, m);
            weight_sum += __shfl_xor_sync(FULL, weight_sum, m);
        }
        const float less_out = weight_sum * lv.kappa;
        slot = (float*)(my_ring + spare * PAGE_BYTES);
        const bool whole = s.first == 0 && s.begin + s.last == s.end;
        if (warp < page_items || WARPS - 1 - warp < exact_items) {
#pragma unroll
            for (int u = 0; u < V_UNITS; ++u) {
                slot[c * SLOT_ROW + 16 * u + g] = o[u][0] - less_out;
                slot[c * SLOT_ROW + 16 * u + g + 8] = o[u][1] - less_out;
            }
        }
        if (g == 0) *(float2*)(stats + (warp * COLS + c) * 2) = make_float2(top, sum);
        if (lane == 0) flag[4 + warp] = (warp * STAGES + spare) * PAGE_BYTES;
        if (!whole && tid == THREADS / 64 * 32) {
            flag[1] = cuts.block_of(s.begin);
            flag[2] = cuts.block_of(s.end - 1) - flag[1] + 1;
        }
        __syncthreads();
        const i64 part_size = COLS * (DV + 2);
        float* part = p.partial + (block * 2 + (s.begin < start ? 0 : 1)) * part_size;
        for (int i = tid; i < COLS * DV / 2; i += THREADS) {
            const int j = i / (DV / 2), d = 2 * (i - j * (DV / 2));
            float most = NOTHING, l = 0.0f;
            float2 y = make_float2(0.0f, 0.0f);
#pragma unroll 4
            for (int w = 0; w < WARPS; ++w) most = max_nan(most, stats[(w * COLS + j) * 2]);
#pragma unroll 6
            for (int w = 0; w < WARPS; ++w) {
                if (w < page_items || WARPS - 1 - w < exact_items) {
                    float2 st = *(const float2*)(stats + (w * COLS + j) * 2);
                    float f = exp2_fast(st.x - most);
                    float2 v = *(const float2*)((float*)(ring + flag[4 + w]) + j * SLOT_ROW + d);
                    y.x = fmaf(f, v.x, y.x);
                    y.y = fmaf(f, v.y, y.y);
                    l = fmaf(f, st.y, l);
                }
            }
            if (whole) {
                float r = l > 0.0f || l != l ? rcp_fast(l) : 0.0f;
                *(float2*)(merged + j * SLOT_ROW + d) = make_float2(y.x * r, y.y * r);
            } else {
                *(float2*)(part + j * DV + d) = y;
            }
            if (d == 0) {
                float* to = whole ? (float*)colf + 2 * j : part + COLS * DV + 2 * j;
                to[0] = most;
                to[1] = l;
            }
        }
        bool finish = whole;
        __syncthreads();
        if (!whole) {
            int count = 0;
            if (tid == 0) {
                count = flag[2];
                int* counter = p.counters + (s.b * p.kv_heads + s.kv_head) * p.col_groups + s.col_group;
                // Releases the whole block's part, ordered before by the barrier, and acquires the others'.
                int arrived;
                asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(arrived) : "l"(counter) : "memory");
                if (arrived == count - 1) *counter = 0;  // ready for the next launch
                flag[0] = arrived == count - 1;
            }
            __syncthreads();
            finish = flag[0];
            if (finish) {
                const int first_block = flag[1];
                count = flag[2];
                // The first of them may have the segment as its last, that is in its second place.
                const int late = s.begin >= cuts.start(first_block) ? (int)part_size : 0;
                const float* base = p.partial + first_block * 2 * part_size;
                // A warp takes one column and every LOTS-th part of it.
                auto place = [&](int k) { return base + (k == 0 ? late : 2 * k * (int)part_size); };
                const int lot = warp / COLS;
#pragma unroll 1
                for (int j = warp % COLS; j < COLS && lot < LOTS; j += WARPS < COLS ? WARPS : COLS) {
                    float4 ahead[AHEAD];
#pragma unroll
                    for (int i = 0; i < AHEAD; ++i)
                        if (lot + i * LOTS < count && lane < DV / 4) ahead[i] = __ldcg((const float4*)(place(lot + i * LOTS) + j * DV) + lane);
                    float most = NOTHING, l = 0.0f;
#pragma unroll 1
                    for (int k = lane; k < count; k += 32) {
                        float2 st = __ldcg((const float2*)(place(k) + COLS * DV) + j);
                        *(float2*)(stats + (k * COLS + j) * 2) = st;  // every lot writes the same
                        most = max_nan(most, st.x);
                    }
#pragma unroll
                    for (int m = 1; m < 32; m *= 2) most = max_nan(most, __shfl_xor_sync(FULL, most, m));
                    __syncwarp();
#pragma unroll 1
                    for (int k = lane; k < count; k += 32) {
                        float2 st = *(const float2*)(stats + (k * COLS + j) * 2);
                        l = fmaf(exp2_fast(st.x - most), st.y, l);
                    }
#pragma unroll
                    for (int m = 1; m < 32; m *= 2) l += __shfl_xor_sync(FULL, l, m);
                    const float share = l > 0.0f || l != l ? rcp_fast(l) : 0.0f;
#pragma unroll 1
                    for (int at = lane; at < DV / 4; at += 32) {
                        float4 y = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                        auto add = [&](int k, float4 v) {
                            float f = exp2_fast(stats[(k * COLS + j) * 2] - most);
                            y.x = fmaf(f, v.x, y.x);
                            y.y = fmaf(f, v.y, y.y);
                            y.z = fmaf(f, v.z, y.z);
                            y.w = fmaf(f, v.w, y.w);
                        };
#pragma unroll
                        for (int i = 0; i < AHEAD; ++i)
                            if (lot + i * LOTS < count) add(lot + i * LOTS, at == lane ? ahead[i] : __ldcg((const float4*)(place(lot + i * LOTS) + j * DV) + at));
#pragma unroll 2
                        for (int k = lot + AHEAD * LOTS; k < count; k += LOTS) add(k, __ldcg((const float4*)(place(k) + j * DV) + at));
                        *(float4*)((float*)(ring + flag[4 + lot]) + j * SLOT_ROW + 4 * at) = make_float4(y.x * share, y.y * share, y.z * share, y.w * share);
                    }
                    if (lane == 0 && lot == 0) {
                        colf[2 * j] = most;
                        colf[2 * j + 1] = l;
                    }
                }
            }
            __syncthreads();
        }
        if (finish) {
            for (int j = warp; j < cols; j += WARPS) {
                float* y = merged + j * SLOT_ROW;
                if (!whole)
                    for (int d = lane; d < DV; d += 32) {
                        float sum_y = 0.0f;
#pragma unroll
                        for (int k = 0; k < LOTS; ++k) sum_y += ((const float*)(ring + flag[4 + k]))[j * SLOT_ROW + d];
                        y[d] = sum_y;
                    }
                rotate_rows<DV, ROTV, true, 1>(y, 0, plan_v, lane);
                int col = s.col_group * COLS + j, t = p.by_group.divide(col), h = s.kv_head * p.group + col - t * p.group;
                i64 row = ((i64)s.b * p.kv_heads * p.group + h) * p.new_tokens + t;
                for (int d = lane; d < DV; d += 32) store_one(p.out, row * DV + d, y[d], OUT);
                if (lane == 0) {
                    float l = colf[2 * j + 1];
                    p.lse[row] = l > 0.0f || l != l ? (colf[2 * j] + log2f(l)) * 0.6931471805599453f : -INF;
                }
            }
        }
        release_buffer();
        __syncthreads();
    }
}
