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

struct Params {
    const i64* addresses;
    const int* page_counts;
    const int* recent_counts;
    const void *query, *sink_keys, *sink_values, *recent_keys, *recent_values;
    const u8* mask;
    void* out;
    float* lse;
    float* partial;
    int* counters;
    const float *plan_k, *plan_v;
    const u32 *lut_k, *lut_v;
    i64 address_stride;
    i64 query_strides[3], sink_key_strides[3], sink_value_strides[3], recent_key_strides[3], recent_value_strides[3];
    i64 mask_strides[4];
    int batch, kv_heads, group, new_tokens, col_groups;
    int pages, sinks, recent, first_token;
    float scaling, softcap;
    Levels levels_k, levels_v;
};

struct Piece {
    int b, kv_head, col_group;
    int first, last;    // items of the segment
    int begin, end;     // the whole segment on the line
    int exact, recent;  // exact items and recent tokens of this sequence
};

// Shared memory, in this order; `launch.py` computes the same total.
#define RING_BYTES (WARPS * STAGES * PAGE_BYTES)
#define LUTS ((BK == 8) + (BV == 8))
#define SLOTS_BYTES ((WARPS + 1) * SLOT * 4)
#define STATS_BYTES ((WARPS + 1) * COLS * 2 * 4)
#define QX_BYTES (COLS * DK * 4 * 2)
#define QBYTES_BYTES (2 * 8 * QBYTES_ROW)

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
__device__ __forceinline__ void await_page(u64* bar, u32 parity) {
    u32 b = shared_address(bar), done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(b), "r"(parity) : "memory");
    } while (!done);
}
#else
__device__ __forceinline__ void fetch_page(u8* stage, const u8* page, u64* bar, int lane) {
    u32 s = shared_address(stage);
    for (int i = lane * 16; i < PAGE_BYTES; i += 512)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(s + i), "l"(page + i) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ __forceinline__ void no_fetch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
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

// The piece that begins at item `at` of the line and ends with its segment or at `stop`.
__device__ __forceinline__ Piece piece_at(const Params& p, const int* ends, int at, int stop, int b) {
    Piece s;
    int heads = p.kv_heads * p.col_groups;
    while (at >= ends[b + 1]) ++b;
    int items = (ends[b + 1] - ends[b]) / heads;
    int local = at - ends[b], segment = local / items;
    s.b = b;
    s.kv_head = segment / p.col_groups;
    s.col_group = segment - s.kv_head * p.col_groups;
    s.begin = ends[b] + segment * items;
    s.end = s.begin + items;
    s.first = at - s.begin;
    s.last = min(stop, s.end) - s.begin;
    s.recent = recent_of(p, b);
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

__device__ __forceinline__ i64 start_of(i64 total, int block, int blocks) { return total * block / blocks; }

// Weighs the slots of several warps or blocks by their maxima. Every thread does its elements.
__device__ __forceinline__ float slot_weight(const float* stats, int slot, int col, float top) {
    return exp2f(stats[(slot * COLS + col) * 2] - top);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) tqai_attend(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) u8 smem[];
    u8* ring = smem;
    u32* luts = (u32*)(ring + RING_BYTES);
    float* slots = (float*)(luts + LUTS * 8192);
    float* stats = slots + SLOTS_BYTES / 4;
    float* qx = stats + STATS_BYTES / 4;   // queries as given, [COLS][DK]
    float* qr = qx + COLS * DK;            // rotated
    u8* qbytes = (u8*)(qr + COLS * DK);    // [2 tables][column, part][QBYTES_ROW]
    u8* passes = qbytes + QBYTES_BYTES;    // per warp: weights on their way from column to row
    u64* bars = (u64*)(passes + WARPS * V_TABLES * PASS_BYTES);
    float* colf = (float*)(bars + WARPS * STAGES);  // [COLS] scale of a logit, base 2
    int* coli = (int*)(colf + COLS);                // [COLS] what to subtract for kappa
    int* flag = coli + COLS;                        // [4]
    int* ends = flag + 4;                           // [batch + 1]

    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int g = lane >> 2, c = lane & 3;
    const int heads = p.kv_heads * p.col_groups;

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
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        for (int s = 0; s < STAGES; ++s)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(bars + warp * STAGES + s)) : "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
#endif
    __syncthreads();
    const int total = ends[p.batch];
    const int blocks = min((int)gridDim.x, total), block = blockIdx.x;
    if (block >= blocks) return;
    const int stop = (int)start_of(total, block + 1, blocks);
    const int start = (int)start_of(total, block, blocks);

    u8* my_ring = ring + warp * STAGES * PAGE_BYTES;
    u64* my_bars = bars + warp * STAGES;
    u8* my_pass = passes + warp * V_TABLES * PASS_BYTES;
    Cursor cursor;
    cursor.at = start;
    cursor.stop = stop;
    cursor.b = 0;
    cursor.enter(p, ends, warp);
    cursor.load(p);
#pragma unroll 1
    for (int s = 0; s < STAGES; ++s) {
        if (cursor.next) {
            fetch_page(my_ring + s * PAGE_BYTES, cursor.next, my_bars + s, lane);
            cursor.advance(p, ends, warp);
        } else {
            no_fetch();
        }
    }
    int stage = 0;
    u32 parity = 0;

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
        const int history_tokens = (p.page_counts ? p.page_counts[s.b] : p.pages) * PAGE_TOKENS - p.first_token;

        // ---- queries of this piece
        const int cols = min(COLS, p.group * p.new_tokens - s.col_group * COLS);
        for (int i = tid; i < COLS * DK; i += THREADS) {
            int j = i / DK, d = i - j * DK;
            int col = s.col_group * COLS + j, t = col / p.group, h = s.kv_head * p.group + col - t * p.group;
            float f = j < cols ? load_one(p.query, s.b * p.query_strides[0] + h * p.query_strides[1] + t * p.query_strides[2] + d) : 0.0f;
            qx[i] = f;
            qr[i] = f;
        }
        __syncthreads();
        for (int j = warp; j < COLS; j += WARPS) {
            float* x = qr + j * DK;
            rotate_vector<DK, ROTK, false>(x, p.plan_k, lane);
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
        }
        __syncthreads();

        // ---- exact tokens
        const bool has_exact = s.first < s.exact;
        if (has_exact) {
            float acc[COLS][2 * V_PAIRS], top[COLS], sum[COLS];
#pragma unroll
            for (int j = 0; j < COLS; ++j) {
                top[j] = NOTHING;
                sum[j] = 0.0f;
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
#pragma unroll
                for (int d = 0; d < DK / 2; d += 8) {
                    float k[8];
                    load_eight(keys, row + d, k);
#pragma unroll
                    for (int j = 0; j < COLS; ++j) {
                        const float* q = qx + j * DK + half + d;
#pragma unroll
                        for (int i = 0; i < 8; ++i) dot[j] = fmaf(k[i], q[i], dot[j]);
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
                    int col = min(s.col_group * COLS + j, p.group * p.new_tokens - 1), nt = col / p.group;
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
                    most = max_nan(most, top[j]);
                    float fade = exp2_fast(top[j] - most);
                    top[j] = most;
                    weight[j] = seen ? exp2_fast(x - most) : 0.0f;
                    sum[j] = fmaf(sum[j], fade, (lane & 1) ? 0.0f : weight[j]);
#pragma unroll
                    for (int i = 0; i < 2 * V_PAIRS; ++i) acc[j][i] *= fade;
                }
                __syncwarp();
                if (!(lane & 1)) *(float4*)(weights + (lane >> 1) * COLS) = make_float4(weight[0], weight[1], weight[2], weight[3]);
                __syncwarp();
                i64 vrow = s.b * vs[0] + s.kv_head * vs[1];
#pragma unroll 8
                for (int i = 0; i < EXACT_TOKENS; ++i) {
                    int ti = min(t0 + i, count - 1);
                    float4 wt = *(const float4*)(weights + i * COLS);
                    float wj[COLS] = {wt.x, wt.y, wt.z, wt.w};
#pragma unroll
                    for (int m = 0; m < V_PAIRS; ++m) {
                        int d = 64 * m + 2 * lane;
                        if (DV % 64 == 0 || d < DV) {
                            float a, b;
                            load_two(values, vrow + ti * vs[2] + d, a, b);
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
            }
#pragma unroll
            for (int j = 0; j < COLS; ++j) {
#pragma unroll
                for (int o = 1; o < 32; o *= 2) sum[j] += __shfl_xor_sync(FULL, sum[j], o);
#pragma unroll
                for (int m = 0; m < V_PAIRS; ++m) {
                    int d = 64 * m + 2 * lane;
                    if (DV % 64 == 0 || d < DV) *(float2*)(slots + warp * SLOT + j * SLOT_ROW + d) = make_float2(acc[j][2 * m], acc[j][2 * m + 1]);
                }
                if (lane == 0) {
                    stats[(warp * COLS + j) * 2] = top[j];
                    stats[(warp * COLS + j) * 2 + 1] = sum[j];
                }
            }
            __syncthreads();
            // Merged into one more slot and rotated into the space of the values' codes.
            for (int i = tid; i < COLS * DV; i += THREADS) {
                int j = i / DV, d = i - j * DV;
                float most = NOTHING, o = 0.0f, l = 0.0f;
                for (int w = 0; w < WARPS; ++w) most = max_nan(most, stats[(w * COLS + j) * 2]);
                for (int w = 0; w < WARPS; ++w) {
                    float f = slot_weight(stats, w, j, most);
                    o = fmaf(f, slots[w * SLOT + j * SLOT_ROW + d], o);
                    l = fmaf(f, stats[(w * COLS + j) * 2 + 1], l);
                }
                slots[WARPS * SLOT + j * SLOT_ROW + d] = o;
                if (d == 0) {
                    stats[(WARPS * COLS + j) * 2] = most;
                    stats[(WARPS * COLS + j) * 2 + 1] = l;
                }
            }
            __syncthreads();
            for (int j = warp; j < COLS; j += WARPS) rotate_vector<DV, ROTV, false>(slots + WARPS * SLOT + j * SLOT_ROW, p.plan_v, lane);
        }

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
        float o[V_UNITS][2];
#pragma unroll
        for (int u = 0; u < V_UNITS; ++u) o[u][0] = o[u][1] = 0.0f;
        float top = NOTHING, sum = 0.0f, weight_sum = 0.0f;
#if MASKED
        const u8* mask_row;
        {
            int col = min(s.col_group * COLS + c, p.group * p.new_tokens - 1), nt = col / p.group;
            int h = s.kv_head * p.group + col - nt * p.group;
            mask_row = p.mask + s.b * p.mask_strides[0] + h * p.mask_strides[1] + nt * p.mask_strides[2] + (p.sinks - p.first_token) * p.mask_strides[3];
        }
#endif
#pragma unroll 1
        for (int page = max(s.first - s.exact, 0) + warp; page < s.last - s.exact; page += WARPS) {
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
            if (cursor.next) {
                fetch_page(my_ring + stage * PAGE_BYTES, cursor.next, my_bars + stage, lane);
                cursor.advance(p, ends, warp);
            } else {
                no_fetch();
            }
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
#pragma unroll
        for (int u = 0; u < V_UNITS; ++u) {
            slots[warp * SLOT + c * SLOT_ROW + 16 * u + g] = o[u][0] - less_out;
            slots[warp * SLOT + c * SLOT_ROW + 16 * u + g + 8] = o[u][1] - less_out;
        }
        if (g == 0) {
            stats[(warp * COLS + c) * 2] = top;
            stats[(warp * COLS + c) * 2 + 1] = sum;
        }
        __syncthreads();

        const int filled = has_exact ? WARPS + 1 : WARPS;
        const bool whole = s.first == 0 && s.begin + s.last == s.end;
        float* mine = p.partial + (i64)(block * 2 + (s.begin < start ? 0 : 1)) * (COLS * (DV + 2));
        for (int i = tid; i < COLS * DV; i += THREADS) {
            int j = i / DV, d = i - j * DV;
            float most = NOTHING, sum_o = 0.0f, l = 0.0f;
            for (int w = 0; w < filled; ++w) most = max_nan(most, stats[(w * COLS + j) * 2]);
            for (int w = 0; w < filled; ++w) {
                float f = slot_weight(stats, w, j, most);
                sum_o = fmaf(f, slots[w * SLOT + j * SLOT_ROW + d], sum_o);
                l = fmaf(f, stats[(w * COLS + j) * 2 + 1], l);
            }
            if (whole) {
                slots[(WARPS)*SLOT + j * SLOT_ROW + d] = l > 0.0f || l != l ? sum_o / l : 0.0f;
                if (d == 0) {
                    colf[j] = most;
                    ((float*)coli)[j] = l;
                }
            } else {
                mine[i] = sum_o;
                if (d == 0) {
                    mine[COLS * DV + 2 * j] = most;
                    mine[COLS * DV + 2 * j + 1] = l;
                }
            }
        }
        bool finish = whole;
        if (!whole) {
            __threadfence();
            __syncthreads();
            // blocks that share this segment
            int first = (int)((i64)s.begin * blocks / total);
            while (start_of(total, first + 1, blocks) <= s.begin) ++first;
            while (start_of(total, first, blocks) > s.begin) --first;
            int last = (int)((i64)(s.end - 1) * blocks / total);
            while (start_of(total, last + 1, blocks) <= s.end - 1) ++last;
            while (start_of(total, last, blocks) > s.end - 1) --last;
            if (tid == 0) {
                int* counter = p.counters + (s.b * p.kv_heads + s.kv_head) * p.col_groups + s.col_group;
                int arrived = atomicAdd(counter, 1);
                flag[0] = arrived == last - first;
                if (arrived == last - first) *counter = 0;  // ready for the next launch
                __threadfence();
            }
            __syncthreads();
            finish = flag[0];
            if (finish) {
                const int n = last - first + 1;
                const bool first_in = s.begin >= start_of(total, first, blocks);
                const i64 size = COLS * (DV + 2);
                const float* base = p.partial + (i64)first * 2 * size;
                for (int i = tid; i < COLS * DV; i += THREADS) {
                    int j = i / DV, d = i - j * DV;
                    float most = NOTHING, sum_o = 0.0f, l = 0.0f;
                    for (int k = 0; k < n; ++k) {
                        const float* part = base + (2 * k + (k == 0 && first_in ? 1 : 0)) * size;
                        most = max_nan(most, __ldcg(part + COLS * DV + 2 * j));
                    }
#pragma unroll 4
                    for (int k = 0; k < n; ++k) {
                        const float* part = base + (2 * k + (k == 0 && first_in ? 1 : 0)) * size;
                        float f = exp2f(__ldcg(part + COLS * DV + 2 * j) - most);
                        sum_o = fmaf(f, __ldcg(part + i), sum_o);
                        l = fmaf(f, __ldcg(part + COLS * DV + 2 * j + 1), l);
                    }
                    slots[WARPS * SLOT + j * SLOT_ROW + d] = l > 0.0f || l != l ? sum_o / l : 0.0f;
                    if (d == 0) {
                        colf[j] = most;
                        ((float*)coli)[j] = l;
                    }
                }
            }
        }
        __syncthreads();
        if (finish) {
            for (int j = warp; j < cols; j += WARPS) {
                float* y = slots + WARPS * SLOT + j * SLOT_ROW;
                rotate_vector<DV, ROTV, true>(y, p.plan_v, lane);
                int col = s.col_group * COLS + j, t = col / p.group, h = s.kv_head * p.group + col - t * p.group;
                i64 row = ((i64)s.b * p.kv_heads * p.group + h) * p.new_tokens + t;
                for (int d = lane; d < DV; d += 32) store_one(p.out, row * DV + d, y[d], OUT);
                if (lane == 0) {
                    float l = ((float*)coli)[j];
                    p.lse[row] = l > 0.0f || l != l ? (colf[j] + log2f(l)) * 0.6931471805599453f : -INF;
                }
            }
        }
        __syncthreads();
    }
}
