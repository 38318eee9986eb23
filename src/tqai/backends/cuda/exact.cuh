// Tokens in the model's dtype (sinks and recent ones), 16 at a time by one warp, in ordinary arithmetic.

// Hadamard rotation forward of a vector of which lane l has elements 64 m + 2 l and 64 m + 2 l + 1.
template <int D, int ROUNDS, int PAIRS>
__device__ __forceinline__ void rotate_pairs(float (&v)[COLS][2 * PAIRS], const float* signs, int lane) {
#pragma unroll 1
    for (int k = 0; k < ROUNDS; ++k) {
#pragma unroll
        for (int m = 0; m < PAIRS; ++m) {
            float2 sign = D % 64 == 0 || 64 * m + 2 * lane < D ? *(const float2*)(signs + k * D + 64 * m + 2 * lane) : make_float2(0.0f, 0.0f);
#pragma unroll
            for (int j = 0; j < COLS; ++j) {
                float a = v[j][2 * m] * sign.x, b = v[j][2 * m + 1] * sign.y;
                v[j][2 * m] = a + b;
                v[j][2 * m + 1] = a - b;
            }
        }
#pragma unroll 1
        for (int half = 1; half < 32 && 2 * half < D; half *= 2) {
            const float mine = lane & half ? -1.0f : 1.0f;
#pragma unroll
            for (int j = 0; j < COLS; ++j)
#pragma unroll
                for (int i = 0; i < 2 * PAIRS; ++i) v[j][i] = fmaf(mine, v[j][i], __shfl_xor_sync(FULL, v[j][i], half));
        }
#pragma unroll
        for (int half = 2; half < 2 * PAIRS; half *= 2)
#pragma unroll
            for (int j = 0; j < COLS; ++j)
#pragma unroll
                for (int i = 0; i < 2 * PAIRS; ++i)
                    if (!(i & half)) {
                        float a = v[j][i], b = v[j][i + half];
                        v[j][i] = a + b;
                        v[j][i + half] = a - b;
                    }
    }
}

// Items `item`, `item + step`, ... below `stop`; the sinks' come first. Afterwards `r` goes on from them, in
// the space of the values' codes.
__device__ __forceinline__ void take_exact(const Params& p, const Shared& m, const Place& at, Running& r, int item, int step, int stop, u8* scratch, int lane) {
    const int g = lane >> 2, c = lane & 3;
    float acc[COLS][2 * V_PAIRS], tops[COLS], sums[COLS];
#pragma unroll
    for (int j = 0; j < COLS; ++j) {
        tops[j] = NOTHING;
        sums[j] = 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * V_PAIRS; ++i) acc[j][i] = 0.0f;
    }
    const int sink_items = ceil_div(p.sinks, EXACT_TOKENS);
    float* weights = (float*)scratch;  // [16 tokens][COLS]
    await_barrier(m.ready, m.flag[1]);
#pragma unroll 1
    for (; item < stop; item += step) {
        const bool sink = item < sink_items;
        const int t0 = (sink ? item : item - sink_items) * EXACT_TOKENS;
        const int count = sink ? p.sinks : at.recent;
        const void* keys = sink ? p.sink_keys : p.recent_keys;
        const void* values = sink ? p.sink_values : p.recent_values;
        const i64* ks = sink ? p.sink_key_strides : p.recent_key_strides;
        const i64* vs = sink ? p.sink_value_strides : p.recent_value_strides;
        const int t = t0 + (lane >> 1);
        const int half = (lane & 1) * (DK / 2);
        float dot[COLS] = {0.0f, 0.0f, 0.0f, 0.0f};
        const i64 row = at.b * ks[0] + at.kv_head * ks[1] + min(t, count - 1) * ks[2] + half;
        // Everything is asked for at once, before any of it is used.
        uint4 words[DK / 16];
#pragma unroll
        for (int d = 0; d < DK / 16; ++d) words[d] = *(const uint4*)((const u16*)keys + row + 8 * d);
        u32 pairs[EXACT_TOKENS][V_PAIRS];
        const i64 vrow = at.b * vs[0] + at.kv_head * vs[1] + 2 * lane;
#pragma unroll
        for (int i = 0; i < EXACT_TOKENS; ++i)
#pragma unroll
            for (int n = 0; n < V_PAIRS; ++n)
                pairs[i][n] = DV % 64 == 0 || 64 * n + 2 * lane < DV ? *(const u32*)((const u16*)values + vrow + min(t0 + i, count - 1) * vs[2] + 64 * n) : 0;
#pragma unroll
        for (int d = 0; d < DK / 16; ++d) {
            float k[8];
            two_of_word(words[d].x, k[0], k[1]);
            two_of_word(words[d].y, k[2], k[3]);
            two_of_word(words[d].z, k[4], k[5]);
            two_of_word(words[d].w, k[6], k[7]);
#pragma unroll
            for (int j = 0; j < COLS; ++j) {
                const float4 q0 = *(const float4*)(m.queries + j * DK + half + 8 * d);
                const float4 q1 = *(const float4*)(m.queries + j * DK + half + 8 * d + 4);
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
            int head, token;
            at.column(p, j, head, token);
            bool seen = t < count;
#if MASKED
            if (seen) {
                const int place = sink ? t : p.sinks + p.pages * PAGE_TOKENS - p.first_token + t;
                seen = p.mask[at.b * p.mask_strides[0] + head * p.mask_strides[1] + token * p.mask_strides[2] + place * p.mask_strides[3]];
            }
#else
            seen = seen && (sink || t <= at.recent - p.new_tokens + token);
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
            if (t0 + i < count) {
                float4 wt = *(const float4*)(weights + i * COLS);
                float wj[COLS] = {wt.x, wt.y, wt.z, wt.w};
#pragma unroll
                for (int n = 0; n < V_PAIRS; ++n) {
                    float a, b;
                    two_of_word(pairs[i][n], a, b);
#pragma unroll
                    for (int j = 0; j < COLS; ++j) {
                        // a weight of 0 must not meet a NaN
                        if (wj[j] != 0.0f) {
                            acc[j][2 * n] = fmaf(wj[j], a, acc[j][2 * n]);
                            acc[j][2 * n + 1] = fmaf(wj[j], b, acc[j][2 * n + 1]);
                        }
                    }
                }
            }
        }
    }
#pragma unroll
    for (int j = 0; j < COLS; ++j)
#pragma unroll
        for (int o = 1; o < 32; o *= 2) sums[j] += __shfl_xor_sync(FULL, sums[j], o);
    if constexpr (ROTV > 0) rotate_pairs<DV, ROTV, V_PAIRS>(acc, m.plan_v(p), lane);
    // column by column into the lanes that go on with it
    float* row = (float*)scratch;
#pragma unroll
    for (int j = 0; j < COLS; ++j) {
        __syncwarp();
#pragma unroll
        for (int n = 0; n < V_PAIRS; ++n)
            if (DV % 64 == 0 || 64 * n + 2 * lane < DV) *(float2*)(row + 64 * n + 2 * lane) = make_float2(acc[j][2 * n], acc[j][2 * n + 1]);
        __syncwarp();
        if constexpr (ROTV == 0) {
            float v[(DV + 31) / 32];
#pragma unroll
            for (int i = 0; i < (DV + 31) / 32; ++i) v[i] = DV % 32 == 0 || lane + 32 * i < DV ? row[lane + 32 * i] : 0.0f;
            rotate<DV, 0, false>(v, row, p.plan_v, lane);
#pragma unroll
            for (int i = 0; i < (DV + 31) / 32; ++i)
                if (DV % 32 == 0 || lane + 32 * i < DV) row[lane + 32 * i] = v[i];
            __syncwarp();
        }
        if (c == j) {
            r.top = tops[j];
            r.sum = g == 0 ? sums[j] : 0.0f;
#pragma unroll
            for (int u = 0; u < V_UNITS; ++u) {
                r.set(u, 0, row[r.place(u, 0, g)]);
                r.set(u, 1, row[r.place(u, 1, g)]);
            }
        }
    }
    __syncwarp();
}
