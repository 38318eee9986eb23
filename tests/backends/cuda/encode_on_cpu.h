// Enough of a GPU for encode_mma.cu and encode_wgmma.cu, as its manuals have it: one block, its lanes in turn, each until the next operation of its warp.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ucontext.h>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define __device__
#define __forceinline__ inline
#define __global__
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define FULL 0xffffffffu
#define INF INFINITY
#define PAGE_TOKENS 64
#define K_CODES (PAGE_TOKENS * DK * BK / 8)
#define V_CODES (PAGE_TOKENS * DV * BV / 8)
#define K_SCALES_AT K_CODES
#define V_CODES_AT (K_CODES + 2 * PAGE_TOKENS)
#define V_SCALES_AT (V_CODES_AT + V_CODES)
#define PAGE_BYTES (V_SCALES_AT + 2 * PAGE_TOKENS)

struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct float2 { float x, y; };
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
struct Index { int x, y; };
static Index threadIdx, blockIdx, gridDim;

static inline float bits_float(u32 b) { float f; memcpy(&f, &b, 4); return f; }
static inline u32 __float_as_uint(float f) { u32 b; memcpy(&b, &f, 4); return b; }
static inline int __float_as_int(float f) { return (int)__float_as_uint(f); }
static inline float __fadd_rz(float a, float b) { return std::trunc((double)a + (double)b); }
static inline float __fmaf_rz(float a, float b, float c) { return std::floor((double)a * b + c); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
static inline float max_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }
static inline float fabsf_(float a) { return std::fabs(a); }
static inline float half_float(u16 h) { _Float16 f; memcpy(&f, &h, 2); return (float)f; }
static inline u16 float_half(float f) { _Float16 h = (_Float16)f; u16 b; memcpy(&b, &h, 2); return b; }
static inline u16 float_bfloat(float f) {
    u32 b = __float_as_uint(f);
    if ((b & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (u16)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
static inline void two_of_word(u32 w, float& a, float& b) {
#if DTYPE == 0
    a = half_float((u16)w);
    b = half_float((u16)(w >> 16));
#else
    a = bits_float(w << 16);
    b = bits_float(w & 0xffff0000u);
#endif
}
static inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 both = (u64)b << 32 | a;
    u32 out = 0;
    for (int i = 0; i < 4; ++i) out |= (u32)(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);  // the top bit is ignored
    return out;
}
static inline u32 __funnelshift_r(u32 low, u32 high, u32 s) { return (u32)(((u64)high << 32 | low) >> (s & 31)); }
static inline u32 __funnelshift_l(u32 low, u32 high, u32 s) { return (u32)(((u64)high << 32 | low) << (s & 31) >> 32); }
static inline float saturated(float a, float b, float c) {
    const float d = (float)((double)a * b + c);
    return d > 0.0f ? d < 1.0f ? d : 1.0f : 0.0f;  // NaN is 0, too
}

// Lanes.
static ucontext_t lanes[THREADS], scheduler;
static int current;
static bool ended[THREADS];
struct Given { u32 word[12]; };
static Given given[2][THREADS];
static int turn[THREADS];

static Given* meet(const Given& mine) {
    const int me = current, side = turn[me]++ & 1;
    given[side][me] = mine;
    swapcontext(&lanes[me], &scheduler);
    return given[side] + (me & ~31);
}
static inline int own_lane() { return current & 31; }
static inline void __syncwarp() { meet({}); }
static inline void __syncthreads() { meet({}); }
static inline float __shfl_sync(u32, float x, int from) { return bits_float(meet({{__float_as_uint(x)}})[from & 31].word[0]); }
static inline float __shfl_xor_sync(u32, float x, int with) { const int l = own_lane(); return bits_float(meet({{__float_as_uint(x)}})[l ^ with].word[0]); }
static inline u32 __shfl_xor_sync(u32, u32 x, int with) { const int l = own_lane(); return meet({{x}})[l ^ with].word[0]; }
static inline bool __all_sync(u32, bool x) {
    const Given* all = meet({{(u32)x}});
    for (int i = 0; i < 32; ++i) if (!all[i].word[0]) return false;
    return true;
}

alignas(128) static u8 shared_memory[1 << 18];
static inline u32 shared_address(const void* p) { return (u32)((const u8*)p - shared_memory); }
static inline float shared_float(u32 at) { float f; memcpy(&f, shared_memory + at, 4); return f; }
static inline void copy_sixteen(u32 to, const u8* from) { memcpy(shared_memory + to, from, 16); }
static inline void end_copies() {}
template <int LEFT> static inline void await_copies() {}

// d = a b + d of m16n8k16: who holds what is in the PTX manual.
static void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const int l = own_lane(), g = l / 4, c = l % 4;
    const Given* all = meet({{a0, a1, a2, a3, b0, b1}});
    for (int k = 0; k < 4; ++k) {
        const int row = k / 2, column = 2 * c + k % 2;
        double sum = d[k];
        for (int q = 0; q < 4; ++q)
            for (int part = 0; part < 2; ++part) {
                float x0, x1, y0, y1;
                two_of_word(all[4 * g + q].word[row + 2 * part], x0, x1);
                two_of_word(all[4 * column + q].word[4 + part], y0, y1);
                sum += (double)x0 * y0 + (double)x1 * y1;
            }
        d[k] = (float)sum;
    }
}
static void mma_alone(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    d[0] = d[1] = d[2] = d[3] = 0;
    mma(d, a0, a1, a2, a3, b0, b1);
}

// As the PTX manual has it of wgmma without swizzling, for one warp's 16 rows: in shared memory 8 columns by 16
// bytes lie together, from the descriptor's address on; the next along k and along the columns by its offsets.
template <int COLUMNS, bool ADD>
static void times_matrix(float (&d)[COLUMNS / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
    const int l = own_lane(), g = l / 4, c = l % 4;
    const u32 start = (b & 0x3fff) << 4, along_k = (b >> 16 & 0x3fff) << 4, along_columns = (b >> 32 & 0x3fff) << 4;
    const Given* all = meet({{a0, a1, a2, a3}});
    for (int i = 0; i < COLUMNS / 2; ++i) {
        const int row = i % 4 / 2, column = i / 4 * 8 + 2 * c + i % 2;
        double sum = ADD ? d[i] : 0.0f;
        for (int k = 0; k < 16; k += 2) {
            u32 w;
            memcpy(&w, shared_memory + start + k / 8 * along_k + column / 8 * along_columns + column % 8 * 16 + k % 8 * 2, 4);
            float x0, x1, y0, y1;
            two_of_word(all[4 * g + k % 8 / 2].word[row + 2 * (k / 8)], x0, x1);
            two_of_word(w, y0, y1);
            sum += (double)x0 * y0 + (double)x1 * y1;
        }
        d[i] = (float)sum;
    }
}
static void show_products() {}
static void begin_products() {}
static void end_products() {}
template <int LEFT, int N> static void await_products(float (&)[N]) {}

static void run_block(void (*body)()) {
    std::vector<std::vector<char>> stacks(THREADS, std::vector<char>(1 << 17));
    memset(shared_memory, 0xff, sizeof shared_memory);
    for (int i = 0; i < THREADS; ++i) {
        ended[i] = false;
        turn[i] = 0;
        getcontext(&lanes[i]);
        lanes[i].uc_stack.ss_sp = stacks[i].data();
        lanes[i].uc_stack.ss_size = stacks[i].size();
        lanes[i].uc_link = &scheduler;
        makecontext(&lanes[i], (void (*)())body, 0);
    }
    for (int left = THREADS; left;)
        for (int i = 0; i < THREADS; ++i)
            if (!ended[i]) {
                current = i;
                threadIdx = {i, 0};
                swapcontext(&scheduler, &lanes[i]);
                if (ended[i]) --left;
            }
}
