// What the attention kernels are told, and how they divide shared memory.
//
// A query column is one (query head, new token). Four of them (one *segment*: a sequence, a KV head, a group
// of four columns), each in a high and a low int8 part, are the 8 columns of the tensor core's B operand;
// keys are A (16 tokens x 32 dimensions), then values are A (16 dimensions x 32 tokens) against the weights
// in two uint8 parts. Lane = 4 g + c holds, for column c, the logits of tokens 8 g .. 8 g + 7 of a page, then
// outputs of dimensions 16 u + g and 16 u + g + 8.
//
// More macros: WARPS, STAGES, SOFTCAP, MASKED (0 or 1), OUT (as DTYPE).

#define COLS 4
#define THREADS (WARPS * 32)
#define K_UNITS (DK / 16)
#define V_UNITS (DV / 16)
#define K_STEPS ((K_UNITS + 1) / 2)
#define K_TABLES (HAS_TWO_TABLES(BK) ? 2 : 1)
#define V_TABLES (HAS_TWO_TABLES(BV) ? 2 : 1)
#define K_FACTORS (HAS_TWO_WEIGHTS(BK) ? 2 : 1)  // sets of queries' parts that tables are multiplied by
#define V_FACTORS (HAS_TWO_WEIGHTS(BV) ? 2 : 1)
#define V_PAIRS ((DV + 63) / 64)
#define EXACT_TOKENS 16
#define NOTHING (-1.0e30f)
#define LOG2E 1.4426950408889634f
#define HEADROOM 40.0f

#define SLOT_ROW (DV + 8)
#define SLOT (COLS * SLOT_ROW)
#define PART (COLS * (DV + 2))  // floats of a partial result: outputs, then (maximum, sum) of each column
#define QBYTES_ROW (32 * K_STEPS + 16)
#define PASS_BYTES 544
#if TRELLIS
#include "trellis_params.cuh"
#include "trellis_table.cuh"
#else
#define LUTS (ONE_LUT ? 1 : (BK == 8) + (BV == 8))
#define LUT_WORDS (LUTS * 8192)
#define SCRATCH_BYTES (V_FACTORS * PASS_BYTES > 4 * (DK > DV ? DK : DV) ? V_FACTORS * PASS_BYTES : 4 * (DK > DV ? DK : DV))
#define BUFFER_BYTES PAGE_BYTES
#define BUFFERS STAGES
#define BARS (HALVES ? 2 : STAGES)
// Whether keys and values of a page are fetched apart (`stretch.cuh`): where a warp has one buffer alone. BULK is
// what stands in for sm_90.
#if STAGES == 1 && (__CUDA_ARCH__ >= 900 || BULK)
#define HALVES 1
#else
#define HALVES 0
#endif
#endif
#define STATS ((WARPS > 8 ? WARPS : 8) * COLS * 2)

static_assert(SLOT * 4 <= BUFFER_BYTES, "a slot must fit into a buffer");

// Division by a number that the host knows, for dividends below 2^31.
struct Divisor {
    u32 factor, shift;
    __device__ __forceinline__ int divide(int n) const { return (int)((__umulhi((u32)n, factor) + (u32)n) >> shift); }
};

// First what changes from call to call, then what depends on sizes and codecs alone; `params.py` has the same.
struct Params {
    const i64* addresses;
    i64 address_stride;
    const int* page_counts;
    const int* recent_counts;
    const void* query;
    i64 query_strides[3];
    const void *recent_keys, *recent_values, *sink_keys, *sink_values;
    i64 recent_key_strides[3], recent_value_strides[3], sink_key_strides[3], sink_value_strides[3];
    const u8* mask;
    i64 mask_strides[4];
    float* partial;
    int* counters;
    void* out;
    float* lse;
    int recent, first_token, early;  // `early`: see `attend_split.cu`
    float scaling;
    int pages, sinks, batch, kv_heads, group, new_tokens, col_groups;
    float softcap;
    Divisor by_items, by_heads, by_col_groups, by_group, by_grid;  // items: of each segment, where all are alike
    const float *plan_k, *plan_v;
    const u32 *lut_k, *lut_v;
    Levels levels_k, levels_v;
    int times256;  // for the compiler to multiply by: as a shift it would go to the busier unit
};

// One segment.
struct Place {
    int b, kv_head, col_group;
    int recent;  // recent tokens of this sequence
    __device__ __forceinline__ int columns(const Params& p) const { return min(COLS, p.group * p.new_tokens - col_group * COLS); }
    __device__ __forceinline__ void column(const Params& p, int j, int& head, int& token) const {
        const int col = min(col_group * COLS + j, p.group * p.new_tokens - 1);
        token = p.by_group.divide(col);
        head = kv_head * p.group + col - token * p.group;
    }
};

// Shared memory, in this order; `plan.py` computes the same total.
#define SIGNS (ROTK * DK + ROTV * DV)
#define RING_BYTES (WARPS * BUFFERS * BUFFER_BYTES)

struct Shared {
    u8* ring;        // [WARPS][BUFFERS] pages on their way; a warp's result lies in its own when it is done
    u32* luts;       // levels of 8 bits, one copy for each lane
    float* merged;   // [SLOT], then (maximum, sum) of each column: the block's result
    float* stats;    // [warp][column] (maximum, sum)
    float* queries;  // as given, [COLS][DK]
    float* signs;    // of the Hadamard rotations
    u8* qbytes;      // [2 factors][column, part][QBYTES_ROW]
    u8* scratch;     // of each warp, SCRATCH_BYTES
    u64* bars;       // [WARPS][BARS]: a page, or keys or values of one, is there
    u64* ready;      // two: queries are there; queries are rotated
    float* colf;     // [COLS] scale of a logit, base 2
    int* flag;       // [4], then where each warp's slot lies
    int* ends;       // [batch + 1], see `attend_line.cu`

    __device__ __forceinline__ explicit Shared(u8* memory) {
        ring = memory;
        luts = (u32*)(ring + RING_BYTES);
        merged = (float*)(luts + LUT_WORDS);
        stats = merged + SLOT + 2 * COLS;
        queries = stats + STATS;
        signs = queries + COLS * DK;
        qbytes = (u8*)(signs + SIGNS);
        scratch = qbytes + 2 * 8 * QBYTES_ROW;
        bars = (u64*)(scratch + WARPS * SCRATCH_BYTES);
        ready = bars + WARPS * BARS;
        colf = (float*)(ready + 2);
        flag = (int*)(colf + COLS);
        ends = flag + 4 + WARPS;
    }
    __device__ __forceinline__ const float* plan_k(const Params& p) const { return ROTK ? signs : p.plan_k; }
    __device__ __forceinline__ const float* plan_v(const Params& p) const { return ROTV ? signs + ROTK * DK : p.plan_v; }
    __device__ __forceinline__ const u32* lut_k() const { return luts; }
#if TRELLIS
    __device__ __forceinline__ const u32* lut_v() const { return luts + (SAME ? 0 : K_TABLE_WORDS); }
#else
    __device__ __forceinline__ const u32* lut_v() const { return luts + (BK == 8 && !ONE_LUT ? 8192 : 0); }
#endif
};

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ int recent_of(const Params& p, int b) {
    return p.recent_counts ? p.recent_counts[b] : p.recent;
}

__device__ __forceinline__ int pages_of(const Params& p, int b) { return p.page_counts ? p.page_counts[b] : p.pages; }

// What never changes from launch to launch: signs and tables of levels. Asked for early, kept late.
struct Constants {
    float mine[SIGNS / THREADS + 1];
#if TRELLIS
    OwnEntries<1 << WINDOW_K, COPIESK> table_k;
    OwnEntries<1 << WINDOW_V, SAME ? 0 : COPIESV> table_v;
#endif
    __device__ __forceinline__ void load(const Params& p, int tid) {
#pragma unroll
        for (int k = 0; k < SIGNS / THREADS + 1; ++k) {
            const int i = tid + k * THREADS;
            mine[k] = i >= SIGNS ? 0.0f : i < ROTK * DK ? p.plan_k[i] : p.plan_v[i - ROTK * DK];
        }
#if TRELLIS
        table_k.load(p.lut_k, tid);
        table_v.load(p.lut_v, tid);
#endif
    }
    __device__ __forceinline__ void keep(const Params& p, const Shared& m, int tid) const {
#pragma unroll
        for (int k = 0; k < SIGNS / THREADS + 1; ++k)
            if (tid + k * THREADS < SIGNS) m.signs[tid + k * THREADS] = mine[k];
#if TRELLIS
        table_k.keep(m.luts, tid);
        table_v.keep(m.luts + K_TABLE_WORDS, tid);
#else
        if (BK == 8)
            for (int i = tid; i < 8192; i += THREADS) m.luts[i] = p.lut_k[i >> 5];
        if (BV == 8 && !ONE_LUT)
            for (int i = tid; i < 8192; i += THREADS) m.luts[(BK == 8 ? 8192 : 0) + i] = p.lut_v[i >> 5];
#endif
    }
};
