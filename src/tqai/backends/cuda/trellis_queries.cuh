// The queries of a segment for trellis codes, rotated, in shared memory: for levels as bytes (`trellis_pairs.cuh`,
// `trellis_split.cuh`, `trellis_parts.cuh`) as two int8 parts, else (`trellis_floats.cuh`) as float32, of which each lane
// cuts what it needs into a high and a low part.
//
//     turned   [column][DK + 4], where the scalar codes' `qbytes` lie
//     qbytes   [2 * column + part][QBYTES_ROW], part 0 high; the bytes of a quarter as the keys' come

#define TURNED_PITCH (DK + 4)

#if SPLITK
__device__ __forceinline__ int key_place(int d);
#else
__device__ __forceinline__ int key_place(int d) { return d; }
#endif

#include "raw_query.cuh"

// One warp takes one column. Arrives at `ready[0]` when the query as given lies in `queries`, and at `ready[1]`
// when it lies rotated in `turned`, divided by its largest element.
__device__ __forceinline__ void take_query(const Params& p, const Shared& m, RawQuery& raw, int j, u8* scratch, int lane) {
    constexpr int N = (DK + 31) / 32;
    float(&x)[N] = raw.x;
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (DK % 32 == 0 || lane + 32 * i < DK) m.queries[j * DK + lane + 32 * i] = x[i];
    __syncwarp();
    if (lane == 0) arrive(m.ready);
    rotate<DK, ROTK, false>(x, (float*)scratch, m.plan_k(p), lane);
    float top = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) top = max_nan(top, fabsf(x[i]));
    top = max_of_warp(top);
    float scale = top > 0.0f ? 1.0f / top : 1.0f;
    if (!(scale < 1.0e30f)) scale = top > 0.0f ? 1.0e30f : scale;
    const float turned = p.scaling < 0.0f ? -scale : scale;
#if BYTESK
    constexpr float UNITS = 32512.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const int d = lane + 32 * i, quarter = d / (DK / 4);
        if (DK % 32 == 0 || d < DK) {
            const int n = __float2int_rn(x[i] * turned * UNITS), high = (n + 128) >> 8;
            u8* to = m.qbytes + 2 * j * QBYTES_ROW + quarter * (DK / 4) + key_place(d - quarter * (DK / 4));
            to[0] = (u8)high;
            to[QBYTES_ROW] = (u8)(n - high * 256);
        }
    }
#else
    constexpr float UNITS = 1.0f;
    float* row = (float*)m.qbytes + j * TURNED_PITCH;
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (DK % 32 == 0 || lane + 32 * i < DK) row[lane + 32 * i] = x[i] * turned;
#endif
    // NaN or inf among the queries shows in the scale, whatever the elements are.
    if (lane == 0) m.colf[j] = fmaxf(fabsf(p.scaling), 1.0e-30f) * p.levels_k.unit / (scale * UNITS) + top * 0.0f;
    __syncwarp();
    if (lane == 0) arrive(m.ready + 1);
}

// A number's high part, which is all that a tensor core reads of it as tf32, or, with `high` the mask of that, what is left
// over.
#define TF32_BITS 0xffffe000u
__device__ __forceinline__ u32 part_of(float x, u32 high) { return __float_as_uint(x - bits_float(__float_as_uint(x) & high)) & TF32_BITS; }

// B fragments of the queries, as one lane holds them: column g / 2, part g % 2 (0 high, 1 low), and the
// dimensions of the runs of lane c of each four.
struct Query {
    u32 b[BYTESK ? DK / 16 : DK / 4];
#if PARTSK
    int without_bias[2];  // of column c, what a key's product with both parts begins with (`trellis_parts.cuh`)
#endif
    float scale;  // of a logit: to base 2, or, with a soft cap, to the argument of its exponential

    __device__ __forceinline__ void load(const Params& p, const Shared& m, int g, int c) {
#if SPLITK || SPLITV
        if (shared_address(m.ring) != DYNAMIC_AT) __trap();
#endif
#if BYTESK
        const u32* row = (const u32*)(m.qbytes + g * QBYTES_ROW + c * (DK / 4));
#pragma unroll
        for (int i = 0; i < DK / 16; ++i) b[i] = row[i];
#if PARTSK
        int d[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < DK / 16; ++i) mma_s8s8_half(d, MINUS_BYTES(BIASK), MINUS_BYTES(BIASK), b[i]);
        without_bias[0] = d[0];
        without_bias[1] = d[1];
#endif
#else
        const float* row = (const float*)m.qbytes + (g >> 1) * TURNED_PITCH + c * (DK / 4);
        const u32 high = g & 1 ? TF32_BITS : 0;
#pragma unroll
        for (int i = 0; i < DK / 4; i += 4) {
            const float4 f = *(const float4*)(row + i);
            b[i] = part_of(f.x, high);
            b[i + 1] = part_of(f.y, high);
            b[i + 2] = part_of(f.z, high);
            b[i + 3] = part_of(f.w, high);
        }
#endif
#if SOFTCAP
        scale = m.colf[c] * (2.0f * LOG2E) / p.softcap;
#else
        scale = m.colf[c] * LOG2E;
#endif
    }
};
