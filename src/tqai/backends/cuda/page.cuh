// One page of one segment by one warp: logits, weights, sums of values. No barrier but the warp's own.

// What a warp has seen so far of a segment, in base 2.
struct Running {
    float o[V_UNITS][2], top, sum;

    __device__ __forceinline__ void clear() {
        top = NOTHING;
        sum = 0.0f;
#pragma unroll
        for (int u = 0; u < V_UNITS; ++u) o[u][0] = o[u][1] = 0.0f;
    }
    __device__ __forceinline__ void fade(float f) {
        sum *= f;
#pragma unroll
        for (int u = 0; u < V_UNITS; ++u) {
            o[u][0] *= f;
            o[u][1] *= f;
        }
    }
    // The h-th output of unit u, and its place among the outputs.
    __device__ __forceinline__ float out(int u, int h) const { return o[u][h]; }
    __device__ __forceinline__ void set(int u, int h, float y) { o[u][h] = y; }
    __device__ __forceinline__ static int place(int u, int h, int g) { return 16 * u + 8 * h + g; }
};

// `halfway` is called when all has been read of the keys, and before anything is of the values.
template <class Halfway>
__device__ __forceinline__ void take_page(const Params& p, const Shared& m, const Query& q, Running& r, const u8* data, [[maybe_unused]] const u8* mask, int page, u8* scratch, int lane, const Halfway& halfway) {
    const int g = lane >> 2, c = lane & 3;
    const Levels &lk = p.levels_k, &lv = p.levels_v;
    const u32 minus = (u32)(-p.times256 >> 8);
    const u32 own_k = BK == 8 ? own_entries(m.lut_k(), lane) : 0, own_v = BV == 8 ? own_entries(m.lut_v(), lane) : 0;
    const u32(&second)[K_STEPS][2] = K_FACTORS == 2 ? q.b : q.a;
    int dots[4][4];
#pragma unroll
    for (int j = 0; j < 4; ++j) dots[j][0] = dots[j][1] = dots[j][2] = dots[j][3] = 0;
#pragma unroll
    for (int v = 0; v < K_STEPS; ++v) {
        u32 w0[BK], a0[8], b0[8];
        load_unit<BK>(data + (2 * v) * (BK * 128), lane, w0);
        unpack_unit<BK>(w0, lk, own_k, minus, a0, b0);
        if (2 * v + 1 < K_UNITS) {
            u32 w1[BK], a1[8], b1[8];
            load_unit<BK>(data + (2 * v + 1) * (BK * 128), lane, w1);
            unpack_unit<BK>(w1, lk, own_k, minus, a1, b1);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                mma_s8s8(dots[j], a0[2 * j], a0[2 * j + 1], a1[2 * j], a1[2 * j + 1], q.a[v][0], q.a[v][1]);
                if (K_TABLES == 2) mma_s8s8(dots[j], b0[2 * j], b0[2 * j + 1], b1[2 * j], b1[2 * j + 1], second[v][0], second[v][1]);
            }
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                mma_s8s8_half(dots[j], a0[2 * j], a0[2 * j + 1], q.a[v][0]);
                if (K_TABLES == 2) mma_s8s8_half(dots[j], b0[2 * j], b0[2 * j + 1], second[v][0]);
            }
        }
    }

    const auto logit = [&](int i) { return (float)(dots[i >> 1][(i & 1) * 2] * p.times256 + dots[i >> 1][(i & 1) * 2 + 1]); };
    float x[8], w[8];
    const uint4 key_scales = *(const uint4*)(data + K_SCALES_AT + g * 16);
    halfway();
    const uint4 value_scales = *(const uint4*)(data + V_SCALES_AT + g * 16);
    scale_logits<false>(p, q, logit, x, w, 1.0f, key_scales, value_scales, mask, page, g);
    float most = take_exponentials(q, r, x, w);
#pragma unroll
    for (int o = 4; o < 32; o *= 2) most = max_nan(most, __shfl_xor_sync(FULL, most, o));
    const float share = 65280.0f * rcp_fast(most);
    const float back = most * (lv.unit * (1.0f / 65280.0f));

    // Weights as 16-bit integers, in the low half of floats near 2^23; then from "lane 4 g + c has
    // tokens 8 g .. of column c" to "lane 4 n + c has tokens 8 c .. of column and part n".
    u32 pa[2][2], pb_own[2][2];
    const u32(&pb)[2][2] = V_FACTORS == 2 ? pb_own : pa;
    __syncwarp();
#pragma unroll
    for (int t = 0; t < V_FACTORS; ++t) {
        const float f = t == 0 ? share : share * lv.coef_b;
        u32 n[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) n[i] = __float_as_uint(fmaf(w[i], f, 8388608.0f));
        u32 e0 = __byte_perm(n[0], n[1], 0x5410), e1 = __byte_perm(n[2], n[3], 0x5410);
        u32 e2 = __byte_perm(n[4], n[5], 0x5410), e3 = __byte_perm(n[6], n[7], 0x5410);
        u8* pass = scratch + t * PASS_BYTES + lane * 8;
        *(uint2*)pass = make_uint2(__byte_perm(e0, e1, 0x6420), __byte_perm(e2, e3, 0x6420));
        *(uint2*)(pass + 272) = make_uint2(__byte_perm(e0, e1, 0x7531), __byte_perm(e2, e3, 0x7531));
    }
    __syncwarp();
#pragma unroll
    for (int t = 0; t < V_FACTORS; ++t) {
        const u8* pass = scratch + t * PASS_BYTES + ((g & 1) ? 0 : 272) + (c * 4 + (g >> 1)) * 8;
        uint2 lo = *(const uint2*)pass, hi = *(const uint2*)(pass + 128);
        u32(&to)[2][2] = t == 0 ? pa : pb_own;
        to[0][0] = lo.x; to[0][1] = lo.y;
        to[1][0] = hi.x; to[1][1] = hi.y;
    }
#pragma unroll
    for (int u = 0; u < V_UNITS; ++u) {
        u32 w0[BV], a[8], b[8];
        load_unit<BV>(data + V_CODES_AT + u * (BV * 128), lane, w0);
        unpack_unit<BV>(w0, lv, own_v, minus, a, b);
        int s4[4] = {0, 0, 0, 0};
        mma_s8u8(s4, a[0], a[1], a[2], a[3], pa[0][0], pa[0][1]);
        mma_s8u8(s4, a[4], a[5], a[6], a[7], pa[1][0], pa[1][1]);
        if (V_TABLES == 2) {
            mma_s8u8(s4, b[0], b[1], b[2], b[3], pb[0][0], pb[0][1]);
            mma_s8u8(s4, b[4], b[5], b[6], b[7], pb[1][0], pb[1][1]);
        }
        r.o[u][0] = fmaf((float)(s4[0] * p.times256 + s4[1]), back, r.o[u][0]);
        r.o[u][1] = fmaf((float)(s4[2] * p.times256 + s4[3]), back, r.o[u][1]);
    }
}

__device__ __forceinline__ void take_page(const Params& p, const Shared& m, const Query& q, Running& r, const u8* data, const u8* mask, int page, u8* scratch, int lane) {
    take_page(p, m, q, r, data, mask, page, scratch, lane, [] {});
}
