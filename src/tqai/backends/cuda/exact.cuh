// Tokens in the model's dtype (sinks and recent ones), 16 at a time, in ordinary arithmetic. A warp takes one
// query column: what is done once for a launch is paid for by its length.

// Hadamard rotation forward of a vector of which lane l has elements 64 m + 2 l and 64 m + 2 l + 1.
template <int D, int ROUNDS, int PAIRS>
__device__ __forceinline__ void rotate_pairs(float (&v)[2 * PAIRS], const float* signs, int lane) {
#pragma unroll 1
    for (int k = 0; k < ROUNDS; ++k) {
#pragma unroll
        for (int m = 0; m < PAIRS; ++m) {
            const float2 sign = D % 64 == 0 || 64 * m + 2 * lane < D ? *(const float2*)(signs + k * D + 64 * m + 2 * lane) : make_float2(0.0f, 0.0f);
            const float a = v[2 * m] * sign.x, b = v[2 * m + 1] * sign.y;
            v[2 * m] = a + b;
            v[2 * m + 1] = a - b;
        }
#pragma unroll
        for (int half = 1; half < 32 && 2 * half < D; half *= 2) {
            const float mine = lane & half ? -1.0f : 1.0f;
#pragma unroll
            for (int i = 0; i < 2 * PAIRS; ++i) v[i] = fmaf(mine, v[i], __shfl_xor_sync(FULL, v[i], half));
        }
#pragma unroll
        for (int half = 2; half < 2 * PAIRS; half *= 2)
#pragma unroll
            for (int i = 0; i < 2 * PAIRS; ++i)
                if (!(i & half)) {
                    const float a = v[i], b = v[i + half];
                    v[i] = a + b;
                    v[i + half] = a - b;
                }
    }
}

// Column j over items `item`, `item + step`, ... below `stop`; the sinks' come first. Afterwards `r` goes on from
// them, in the space of the values' codes.
__device__ __forceinline__ void take_exact_column(const Params& p, const Shared& m, const Place& at, Running& r, int j, int item, int step, int stop, u8* scratch, int lane) {
    const int g = lane >> 2, c = lane & 3;
    float acc[2 * V_PAIRS], top = NOTHING, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * V_PAIRS; ++i) acc[i] = 0.0f;
    const int sink_items = ceil_div(p.sinks, EXACT_TOKENS);
    const int half = (lane & 1) * (DK / 2);
    float* weights = (float*)scratch;  // [EXACT_TOKENS]
    int head, token;
    at.column(p, j, head, token);
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
        // Everything is asked for at once, before any of it is used.
        const u16* row = (const u16*)keys + (at.b * ks[0] + at.kv_head * ks[1] + min(t, count - 1) * ks[2] + half);
        uint4 words[DK / 16];
#pragma unroll
        for (int d = 0; d < DK / 16; ++d) words[d] = *(const uint4*)(row + 8 * d);
        const u16* vrow = (const u16*)values + (at.b * vs[0] + at.kv_head * vs[1]);
        u32 pairs[EXACT_TOKENS][V_PAIRS];
#pragma unroll
        for (int i = 0; i < EXACT_TOKENS; ++i)
#pragma unroll
            for (int n = 0; n < V_PAIRS; ++n)
                pairs[i][n] = *(const u32*)(vrow + min(t0 + i, count - 1) * vs[2] + (DV % 64 == 0 || 64 * n + 2 * lane < DV ? 64 * n + 2 * lane : 0));
        await_barrier(m.ready, m.flag[1]);
        float dot[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        const float* query = m.queries + j * DK + half;
#pragma unroll
        for (int d = 0; d < DK / 16; ++d) {
            float k[8];
            two_of_word(words[d].x, k[0], k[1]);
            two_of_word(words[d].y, k[2], k[3]);
            two_of_word(words[d].z, k[4], k[5]);
            two_of_word(words[d].w, k[6], k[7]);
            const float4 q0 = *(const float4*)(query + 8 * d), q1 = *(const float4*)(query + 8 * d + 4);
            dot[0] = fmaf(k[0], q0.x, fmaf(k[4], q1.x, dot[0]));
            dot[1] = fmaf(k[1], q0.y, fmaf(k[5], q1.y, dot[1]));
            dot[2] = fmaf(k[2], q0.z, fmaf(k[6], q1.z, dot[2]));
            dot[3] = fmaf(k[3], q0.w, fmaf(k[7], q1.w, dot[3]));
        }
        float x = (dot[0] + dot[1]) + (dot[2] + dot[3]);
        x = (x + __shfl_xor_sync(FULL, x, 1)) * p.scaling;
#if SOFTCAP
        x = p.softcap - 2.0f * p.softcap * rcp_fast(exp2f(x * (2.0f * LOG2E) / p.softcap) + 1.0f);
#endif
        x *= LOG2E;
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
        most = max_nan(most, top);
        const float fade = exp2_fast(top - most), weight = seen ? exp2_fast(x - most) : 0.0f;
        top = most;
        sum = fmaf(sum, fade, weight);
        __syncwarp();
        if (!(lane & 1)) weights[lane >> 1] = weight;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2 * V_PAIRS; ++i) acc[i] *= fade;
#pragma unroll
        for (int i = 0; i < EXACT_TOKENS; ++i) {
            const float w = weights[i];
#pragma unroll
            for (int n = 0; n < V_PAIRS; ++n) {
                float a, b;
                two_of_word(pairs[i][n], a, b);
                // a weight of 0 must not meet a NaN
                acc[2 * n] = w != 0.0f ? fmaf(w, a, acc[2 * n]) : acc[2 * n];
                acc[2 * n + 1] = w != 0.0f ? fmaf(w, b, acc[2 * n + 1]) : acc[2 * n + 1];
            }
        }
    }
#pragma unroll
    for (int o = 2; o < 32; o *= 2) sum += __shfl_xor_sync(FULL, sum, o);
#pragma unroll
    for (int n = 0; n < V_PAIRS; ++n)
        if (DV % 64 != 0 && 64 * n + 2 * lane >= DV) acc[2 * n] = acc[2 * n + 1] = 0.0f;
    if constexpr (ROTV > 0) rotate_pairs<DV, ROTV, V_PAIRS>(acc, m.plan_v(p), lane);
    float* row = (float*)scratch;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < V_PAIRS; ++n)
        if (DV % 64 == 0 || 64 * n + 2 * lane < DV) *(float2*)(row + 64 * n + 2 * lane) = make_float2(acc[2 * n], acc[2 * n + 1]);
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
    // into the lanes that go on with the column
    if (c == j) {
        r.top = top;
        r.sum = g == 0 ? sum : 0.0f;
#pragma unroll
        for (int u = 0; u < V_UNITS; ++u) {
            r.set(u, 0, row[r.place(u, 0, g)]);
            r.set(u, 1, row[r.place(u, 1, g)]);
        }
    }
    __syncwarp();
}

// Whether this warp has a column of items `item`, `item + step`, ... below `stop`: the last four warps take the
// first item's, and so on.
__device__ __forceinline__ bool has_exact(int item, int step, int stop, int warp) { return item + (WARPS - 1 - warp) / COLS * step < stop; }

__device__ __forceinline__ void take_exact(const Params& p, const Shared& m, const Place& at, Running& r, int item, int step, int stop, int warp, u8* scratch, int lane) {
    // after so many turns a warp is at its first column again
    constexpr int TURNS = WARPS % 4 == 0 ? 1 : WARPS % 2 == 0 ? 2 : 4;
#pragma unroll 1
    for (int turn = 0; turn < TURNS; ++turn) {
        const int task = WARPS - 1 - warp + turn * WARPS, first = item + task / COLS * step;
        if (first < stop) take_exact_column(p, m, at, r, task % COLS, first, TURNS * WARPS / COLS * step, stop, scratch, lane);
    }
}
