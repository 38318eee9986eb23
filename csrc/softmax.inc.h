/* softmax.inc.h: from integer dots to integer weights; included by each ISA's file after its vec_*.h. */

/* e^x for x <= 0 to 2e-7 relative; 0 below -87 and for -inf; NaN for NaN. */
static inline vf exp_below(vf x) {
    const vf magic = v_set(12582912.0f), limit = v_set(-87.0f); /* 1.5 * 2^23: adding it rounds */
    const vf clamped = v_max_or_nan(limit, x);
    const vf shifted = v_fma(clamped, v_set(1.44269504f), magic), n = v_sub(shifted, magic);
    const vf f = v_fma(n, v_set(-1.42860677e-6f), v_fma(n, v_set(-0.693145752f), clamped));
    vf p = v_fma(v_set(1.98756915e-4f), f, v_set(1.39819994e-3f));
    p = v_fma(p, f, v_set(8.33345205e-3f));
    p = v_fma(p, f, v_set(4.16657962e-2f));
    p = v_fma(p, f, v_set(1.66666657e-1f));
    p = v_fma(p, f, v_set(0.5f));
    p = v_add(v_fma(p, v_mul(f, f), f), v_set(1.0f));
    return v_zero_below(v_mul(p, v_power(shifted)), x, limit);
}

static inline float exp_below_one(float x) {
    float lane[VL];
    v_store(lane, exp_below(v_set(x)));
    return lane[0];
}

/* cap * tanh(x / cap) */
static inline void soft_cap(float *logit, int tokens, float cap) {
    for (int t = 0; t < tokens; t += VL) {
        const vf x = v_load(logit + t), one = v_set(1.0f);
        const vf e = exp_below(v_mul(v_abs(x), v_set(-2.0f / cap)));
        v_store(logit + t, v_copysign(v_mul(v_set(cap), v_div(v_sub(one, e), v_add(one, e))), x));
    }
}

static void hide(const block_mask *mask, int r, int tokens, float *restrict logit) {
    for (int t = 0; t < mask->first; t++) logit[t] = -INFINITY;
    const uint8_t *restrict seen = mask->row[r];
    if (!seen) return;
    if (mask->stride == 1) {
        for (int t = mask->first; t < tokens; t++) logit[t] = seen[t] ? logit[t] : -INFINITY;
    } else {
        for (int t = mask->first; t < tokens; t++)
            if (!seen[t * mask->stride]) logit[t] = -INFINITY;
    }
}

/* Largest of the logits that are numbers; -inf where there is none. */
static inline float largest_logit(const float *logit, int tokens) {
    vf most = v_set(-INFINITY);
    for (int t = 0; t < tokens; t += VL) most = v_max(most, v_load(logit + t));
    return v_largest(most);
}

/* Moves state and sums of a row to the maximum of a block. 0: the row has still seen nothing. */
static inline int move_maximum(const float *logit, int tokens, float block, int value_dim, row_state *state,
                               float *restrict acc) {
    if (block > state->max) {
        const float shrink = exp_below_one(state->max - block);
        state->sum *= shrink;
        state->max = block;
        for (int d = 0; d < value_dim; d++) acc[d] *= shrink;
    }
    if (state->max > -INFINITY) return 1;
    for (int t = 0; t < tokens; t++) /* all hidden, but a NaN in sight must show */
        if (logit[t] != logit[t]) state->sum = NAN;
    return 0;
}

/* One row of softmax_block (isa.h): logit is scratch. */
static inline void softmax_row(const int32_t *dot, float by, const float *key_scale, const float *value_scale,
                               const tqai_codec *value, const block_mask *mask, int r, float softcap, int tokens,
                               row_state *state, float *restrict acc, int16_t *w, float *step, float *logit) {
    *step = 0.0f;
    vf most = v_set(-INFINITY), sum = v_set(0.0f), total = sum, largest = sum;
    for (int t = 0; t < tokens; t += VL) {
        const vf x = v_mul(v_from_int(dot + t), v_mul(v_set(by), v_load(key_scale + t)));
        most = v_max(most, x);
        v_store(logit + t, x);
    }
    float block = v_largest(most);
    if (mask || softcap > 0.0f) {
        if (softcap > 0.0f) soft_cap(logit, tokens, softcap);
        if (mask) hide(mask, r, tokens, logit);
        block = largest_logit(logit, tokens);
    }
    if (!move_maximum(logit, tokens, block, value->head_dim, state, acc)) {
        memset(w, 0, sizeof *w * (size_t)tokens);
        return;
    }
    for (int t = 0; t < tokens; t += VL) {
        const vf p = exp_below(v_sub(v_load(logit + t), v_set(state->max)));
        const vf x = v_zero_if_zero(v_mul(p, v_load(value_scale + t)), p); /* a hidden scale may be NaN */
        const vf magnitude = v_abs(x);
        sum = v_add(sum, p);
        total = v_add(total, magnitude);
        largest = v_max(largest, magnitude);
        v_store(logit + t, x);
    }
    state->sum += v_sum(sum);
    const float all = v_sum(total), one = v_largest(largest);
    if (!(all < INFINITY)) /* a NaN in sight: the row is NaN, and no integer can say so */
        for (int d = 0; d < value->head_dim; d++) acc[d] = NAN;
    if (!(all < INFINITY) || one < 0x1p-126f) { /* or below what a float holds exactly */
        memset(w, 0, sizeof *w * (size_t)tokens);
        return;
    }
    const float lift = one < 0x1p-60f ? 0x1p60f : 1.0f; /* lest 32767 / one overflow */
    const float a = 32767.0f / (one * lift), b = value->largest_sum / (all * lift), up = a < b ? a : b;
    *step = value->level_step / up / lift;
    for (int t = 0; t < tokens; t += 2 * VL)
        v_store_int16(w + t, v_mul(v_mul(v_load(logit + t), v_set(lift)), v_set(up)),
                      v_mul(v_mul(v_load(logit + t + VL), v_set(lift)), v_set(up)));
}

static void softmax_block(const int32_t *dots, const float *factor, const float *key_scale,
                          const float *value_scale, const tqai_codec *value, const block_mask *mask, float softcap,
                          int tokens, int rows, row_state *state, float *acc, int16_t *w, float *step) {
    _Alignas(64) float logit[BLOCK_TOKENS];
    for (int r = 0; r < rows; r++)
        softmax_row(dots + r * BLOCK_TOKENS, factor[r], key_scale, value_scale, value, mask, r, softcap, tokens,
                    state + r, acc + r * value->head_dim, w + r * BLOCK_TOKENS, step + r, logit);
}
