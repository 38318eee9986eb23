// Lets a C++ compiler build a kernel on the CPU: the lanes of a block take turns at every exchange between them, so
// all warps wait for each other wherever one would. What the kernel includes of PTX is replaced by `lanes.py`; __CUDA_ARCH__ is not defined.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define __ldg(p) (*(p))

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct Index { int x, y, z; };

static unsigned char* emulated_shared;
static Index threadIdx, blockIdx, gridDim;

inline float __uint_as_float(unsigned b) { float f; std::memcpy(&f, &b, 4); return f; }
inline float __int_as_float(int b) { return __uint_as_float((unsigned)b); }
inline unsigned __float_as_uint(float f) { unsigned b; std::memcpy(&b, &f, 4); return b; }
inline int __float_as_int(float f) { return (int)__float_as_uint(f); }
inline unsigned long long __cvta_generic_to_shared(const void*) { std::abort(); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __fadd_rz(float, float) { std::abort(); }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned __vminu2(unsigned a, unsigned b) { return min(a & 0xffff, b & 0xffff) | min(a >> 16, b >> 16) << 16; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned s) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> (s & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned k = selector >> (4 * i) & 7;
        out |= ((k < 4 ? a >> (8 * k) : b >> (8 * (k - 4))) & 0xff) << (8 * i);
    }
    return out;
}
// Products of halves are exact in float32, and sums all but exact: rounded once.
template <class Operation>
unsigned of_halves(unsigned a, unsigned b, Operation operation) {
    unsigned out = 0;
    for (int i = 0; i < 32; i += 16) {
        const float x = __builtin_bit_cast(_Float16, (uint16_t)(a >> i)), y = __builtin_bit_cast(_Float16, (uint16_t)(b >> i));
        out |= (unsigned)__builtin_bit_cast(uint16_t, (_Float16)operation(x, y)) << i;
    }
    return out;
}

// ---- The lanes. Each runs until it exchanges something; then the next one, until all have come so far.
constexpr int MOST_LANES = 256;
static ucontext_t host, lanes[MOST_LANES];
static unsigned exchanged[MOST_LANES];
static int running;
inline void wait_for_all() { swapcontext(&lanes[running], &host); }
inline void __syncwarp() { wait_for_all(); }
inline void __syncthreads() { wait_for_all(); }
inline float __shfl_xor_sync(unsigned, float x, int other) {
    exchanged[running] = __float_as_uint(x);
    wait_for_all();
    const unsigned got = exchanged[running ^ other];
    wait_for_all();
    return __uint_as_float(got);
}
inline unsigned __shfl_sync(unsigned, unsigned x, int from) {
    exchanged[running] = x;
    wait_for_all();
    const unsigned got = exchanged[(running & ~31) | from];
    wait_for_all();
    return got;
}
