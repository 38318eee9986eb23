// The queries of a segment: read, rotated into the space of the keys' codes, cut into two int8 parts.
//
//     qbytes   [factor][2 * column + part][dimension], part 0 high, part 1 low

#include "raw_query.cuh"

// One warp takes one column. Arrives at `ready[0]` when the query as given lies in `queries`, and at
// `ready[1]` when its parts lie in `qbytes`.
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
    // 32512 / top, without leaving the range of the reciprocal
    float scale = top > 0.0f ? 0.9921875f * rcp_fast(top * 0x1p-15f) : 1.0f;
    if (!(scale < 1.0e30f)) scale = top > 0.0f ? 1.0e30f : scale;
    const float turned = p.scaling < 0.0f ? -scale : scale;
    constexpr int ROW = 32 * K_STEPS;
#pragma unroll
    for (int i = 0; i < ROW / 32; ++i) {
        const float y = i < N ? x[i < N ? i : 0] * turned : 0.0f;
#pragma unroll
        for (int t = 0; t < K_FACTORS; ++t) {
            int n = __float2int_rn(t == 0 ? y : y * p.levels_k.coef_b);
            int high = (n + 128) >> 8;
            m.qbytes[(t * 8 + 2 * j) * QBYTES_ROW + lane + 32 * i] = (u8)high;
            m.qbytes[(t * 8 + 2 * j + 1) * QBYTES_ROW + lane + 32 * i] = (u8)(n - high * 256);
        }
    }
    if (lane == 0) {
        // NaN or inf among the queries shows in the scale, whatever the integers are.
        float bad = top * 0.0f;
        m.colf[j] = fmaxf(fabsf(p.scaling), 1.0e-30f) * p.levels_k.unit * rcp_fast(scale) + bad;
    }
    __syncwarp();
    if (lane == 0) arrive(m.ready + 1);
}

// B fragments of the queries, as one lane holds them.
struct Query {
    u32 a[K_STEPS][2], b[K_STEPS][2];
    float scale;  // of a logit: to base 2, or, with a soft cap, to the argument of its exponential

    __device__ __forceinline__ void load(const Params& p, const Shared& m, int g, int c) {
#pragma unroll
        for (int v = 0; v < K_STEPS; ++v) {
            const u32* from = (const u32*)(m.qbytes + g * QBYTES_ROW + 32 * v + 4 * c);
            a[v][0] = from[0];
            a[v][1] = from[4];
            if (K_FACTORS == 2) {
                const u32* second = (const u32*)(m.qbytes + (8 + g) * QBYTES_ROW + 32 * v + 4 * c);
                b[v][0] = second[0];
                b[v][1] = second[4];
            }
        }
#if SOFTCAP
        scale = m.colf[c] * (2.0f * LOG2E) / p.softcap;
#else
        scale = m.colf[c] * LOG2E;
#endif
    }
};
