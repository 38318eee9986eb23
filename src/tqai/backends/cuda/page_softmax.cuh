// The softmax of a page, for scalar and for trellis codes: lane 4 g + c has, of column c, the logits of tokens
// 8 g .. 8 g + 7 without scales, and makes their weights, not normalized, times the scales of values.

#if MASKED
// Where the mask of column c begins, such that token t of the history lies t strides further.
__device__ __forceinline__ const u8* mask_row(const Params& p, const Place& at, int c) {
    int head, token;
    at.column(p, c, head, token);
    return p.mask + at.b * p.mask_strides[0] + head * p.mask_strides[1] + token * p.mask_strides[2] + (p.sinks - p.first_token) * p.mask_strides[3];
}
#endif

// x: logits, the i-th being `logit(i)` without scales, to be multiplied by `q.scale` unless there is a soft cap;
// w: scales of values, times `value_unit` if WITH_UNIT. `key_scales`, `value_scales`: of the page, as bfloat16.
template <bool WITH_UNIT, class Query, class Logit>
__device__ __forceinline__ void scale_logits(const Params& p, const Query& q, const Logit& logit, float (&x)[8], float (&w)[8], float value_unit, const uint4& key_scales, const uint4& value_scales, [[maybe_unused]] const u8* mask, int page, int g) {
    const u32 sk[4] = {key_scales.x, key_scales.y, key_scales.z, key_scales.w}, sv[4] = {value_scales.x, value_scales.y, value_scales.z, value_scales.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        x[i] = logit(i) * bits_float(i & 1 ? sk[i >> 1] & 0xffff0000u : sk[i >> 1] << 16);
        w[i] = bits_float(i & 1 ? sv[i >> 1] & 0xffff0000u : sv[i >> 1] << 16);
        if (WITH_UNIT) w[i] *= value_unit;
#if SOFTCAP
        x[i] = (LOG2E * p.softcap) * (1.0f - 2.0f * rcp_fast(exp2f(x[i] * q.scale) + 1.0f));
#endif
    }
#if MASKED
    {
        i64 t = (i64)page * PAGE_TOKENS + g * 8;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            bool seen = t + i >= p.first_token && mask[(t + i) * p.mask_strides[3]];
            x[i] = seen ? x[i] : -INF;
            w[i] = seen ? w[i] : 0.0f;
        }
    }
#else
    // A loop of one turn, as the compiler would make selections, for which every page pays, of a branch.
    int hides = page == 0 && p.first_token > 0;
#pragma unroll 1
    while (hides) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            bool seen = g * 8 + i >= p.first_token;
            x[i] = seen ? x[i] : -INF;
            w[i] = seen ? w[i] : 0.0f;
        }
        asm volatile("mov.s32 %0, 0;" : "=r"(hides));
    }
#endif
}

// Exponentials of the logits, into the sum of `r` and into the weights, of which the lane's greatest is returned.
template <class Query, class Running>
__device__ __forceinline__ float take_exponentials(const Query& q, Running& r, const float (&x)[8], float (&w)[8]) {
    // The reference of the exponentials moves only when a logit rises far above it: float32 has
    // room for 2^40, and the weights are normalized once more below.
    float most = max_nan(max_nan(max_nan(x[0], x[1]), max_nan(x[2], x[3])), max_nan(max_nan(x[4], x[5]), max_nan(x[6], x[7])));
#if SOFTCAP
    const float unit = 1.0f;
#else
    const float unit = q.scale;
    most *= unit;
#endif
    if (__any_sync(FULL, !(most <= r.top + HEADROOM))) {
#pragma unroll
        for (int o = 4; o < 32; o *= 2) most = max_nan(most, __shfl_xor_sync(FULL, most, o));
        most = max_nan(most, r.top);
        const float fade = exp2_fast(r.top - most);
        r.top = most;
        r.fade(fade);
    }
    most = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float e = exp2_fast(fmaf(x[i], unit, -r.top));
        r.sum += e;
        w[i] *= e;
        most = max_nan(most, w[i]);
    }
    return most;
}
