// Small pieces shared by the kernels: PTX wrappers, conversions, the rotation. No headers are included,
// because NVRTC alone does not find any.
//
// Macros set by the launcher:
//   DK, DV        head_dim of keys and of values, multiples of 16
//   BK, BV        bits of keys and of values: 1, 2, 3, 4 or 8
//   DTYPE         0 float16, 1 bfloat16, 2 float32: queries, exact tokens and vectors to encode
//   ROTK, ROTV    0 matrix, else the number of Hadamard rounds

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define PAGE_TOKENS 64
#define ALIGN16(n) (((n) + 15) / 16 * 16)
#define K_CODES (PAGE_TOKENS * DK * BK / 8)
#define V_CODES (PAGE_TOKENS * DV * BV / 8)
#define K_SCALES_AT K_CODES
#define V_CODES_AT (K_CODES + 2 * PAGE_TOKENS)
#define V_SCALES_AT (V_CODES_AT + V_CODES)
#define PAGE_BYTES (V_SCALES_AT + 2 * PAGE_TOKENS)
#define FULL 0xffffffffu
#define INF __int_as_float(0x7f800000)

__device__ __forceinline__ float bits_float(u32 b) { return __uint_as_float(b); }

__device__ __forceinline__ float half_float(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ u16 float_half(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

__device__ __forceinline__ u16 float_bfloat(float f) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float rcp_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The greater of two numbers, NaN if either is: what must not be hidden shows itself.
__device__ __forceinline__ float max_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// Of the whole warp, by one instruction. Absolute values as bits are in order, NaN above all.
__device__ __forceinline__ float max_of_warp(float absolute) {
    u32 most;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(most) : "r"(__float_as_uint(absolute)));
    return __uint_as_float(most);
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// One element or eight (16 bytes) of the model's dtype as float32.
__device__ __forceinline__ float load_one(const void* base, i64 at) {
#if DTYPE == 0
    return half_float(((const u16*)base)[at]);
#elif DTYPE == 1
    return bits_float((u32)((const u16*)base)[at] << 16);
#else
    return ((const float*)base)[at];
#endif
}

__device__ __forceinline__ void store_one(void* base, i64 at, float f, int dtype) {
    if (dtype == 0) ((u16*)base)[at] = float_half(f);
    else if (dtype == 1) ((u16*)base)[at] = float_bfloat(f);
    else ((float*)base)[at] = f;
}

__device__ __forceinline__ void two_of_word(u32 w, float& a, float& b) {
#if DTYPE == 0
    a = half_float((u16)w);
    b = half_float((u16)(w >> 16));
#else
    a = bits_float(w << 16);
    b = bits_float(w & 0xffff0000u);
#endif
}

__device__ __forceinline__ void load_eight(const void* base, i64 at, float* out) {
#if DTYPE == 2
    float4 a = *(const float4*)((const float*)base + at), b = *(const float4*)((const float*)base + at + 4);
    out[0] = a.x; out[1] = a.y; out[2] = a.z; out[3] = a.w;
    out[4] = b.x; out[5] = b.y; out[6] = b.z; out[7] = b.w;
#else
    uint4 w = *(const uint4*)((const u16*)base + at);
    two_of_word(w.x, out[0], out[1]);
    two_of_word(w.y, out[2], out[3]);
    two_of_word(w.z, out[4], out[5]);
    two_of_word(w.w, out[6], out[7]);
#endif
}

__device__ __forceinline__ void load_two(const void* base, i64 at, float& a, float& b) {
#if DTYPE == 2
    float2 w = *(const float2*)((const float*)base + at);
    a = w.x;
    b = w.y;
#else
    two_of_word(*(const u32*)((const u16*)base + at), a, b);
#endif
}

// Sylvester's transform of one vector held by one warp: lane l has elements l, l + 32, l + 64, ...
template <int N>
__device__ __forceinline__ void hadamard(float (&x)[N], int lane) {
#pragma unroll
    for (int half = 1; half < 32; half *= 2) {
        const float mine = lane & half ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = fmaf(mine, x[i], __shfl_xor_sync(FULL, x[i], half));
    }
#pragma unroll
    for (int half = 1; half < N; half *= 2) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (!(i & half)) {
                float a = x[i], b = x[i + half];
                x[i] = a + b;
                x[i + half] = a - b;
            }
        }
    }
}

// Rotates (or rotates back) one vector of D floats held by one warp: lane l has elements l, l + 32, ...; what
// is beyond D must be 0. `plan` is, for Hadamard, ROUNDS rows of D signs, the normaliser folded into the
// first; for a matrix, two matrices [D][D] of which element [e][d] of the first takes coordinate e to d (R
// transposed), and the second back. `row` is room for D floats in shared memory, used for a matrix alone.
template <int D, int ROUNDS, bool BACK, int N = (D + 31) / 32>
__device__ __forceinline__ void rotate(float (&v)[N], [[maybe_unused]] float* row, const float* __restrict__ plan, int lane) {
    if constexpr (ROUNDS > 0) {
#pragma unroll 1
        for (int k = 0; k < ROUNDS; ++k) {
            const float* sign = plan + (BACK ? ROUNDS - 1 - k : k) * D;
            if (!BACK) {
#pragma unroll
                for (int i = 0; i < N; ++i) v[i] *= sign[lane + 32 * i];
            }
            hadamard<N>(v, lane);
            if (BACK) {
#pragma unroll
                for (int i = 0; i < N; ++i) v[i] *= sign[lane + 32 * i];
            }
        }
    } else {
        const float* m = plan + (BACK ? D * D : 0);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (D % 32 == 0 || lane + 32 * i < D) row[lane + 32 * i] = v[i];
            v[i] = 0.0f;
        }
        __syncwarp();
#pragma unroll 4
        for (int e = 0; e < D; ++e) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                float f = D % 32 == 0 || lane + 32 * i < D ? m[e * D + lane + 32 * i] : 0.0f;
                v[i] = fmaf(f, row[e], v[i]);
            }
        }
        __syncwarp();
    }
}
