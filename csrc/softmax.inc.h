/* softmax.inc.h: from integer dots to logits and from logits to integer weights; included by each ISA's file after its vec_*.h. */

#define LOG2_E 1.44269504f

#ifndef EXP2_BELOW /* an instruction set may have a way of its own */
/* 2^x for x <= 0 to 2e-7 relative; 0 below -126 and for -inf; NaN for NaN. */
static inline vf exp2_below(vf x) {
    const vf limit = v_set(-126.0f), clamped = v_max_or_nan(limit, x), whole = v_whole(clamped);
    const vf f = v_sub(clamped, v_from_whole(whole)); /* within 0.5 */
    vf p = v_fma(v_set(1.32669753e-3f), f, v_set(9.67546459e-3f));
    p = v_fma(p, f, v_set(5.55074252e-2f));
    p = v_fma(p, f, v_set(2.40221217e-1f));
    p = v_fma(p, f, v_set(6.93146944e-1f));
    p = v_fma(p, f, v_set(1.0f));
    return v_zero_below(v_times_power(p, whole), x, limit);
}

/* The same to 1e-4, for weights that become whole numbers. */
static inline vf exp2_of_weight(vf x) {
    const vf limit = v_set(-126.0f), clamped = v_max_or_nan(limit, x), whole = v_whole(clamped);
    const vf f = v_sub(clamped, v_from_whole(whole));
    vf p = v_fma(v_set(5.50089329e-2f), f, v_set(2.42210969e-1f));
    p = v_fma(p, f, v_set(6.93282902e-1f));
    return v_zero_below(v_times_power(v_fma(p, f, v_set(1.0f)), whole), x, limit);
}
#endif

/* e^x for x <= 0, likewise, to 2e-7 * (1 + |x|) relative. */
static inline vf exp_below(vf x) { return exp2_below(v_mul(x, v_set(LOG2_E))); }

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

/* No weight of this block counts: no step, and NaN where a NaN is in sight. */
static inline void no_weights(int16_t *w, int tokens, int is_nan, int value_dim, float *restrict acc) {
    memset(w, 0, sizeof *w * (size_t)tokens);
    if (is_nan)
        for (int d = 0; d < value_dim; d++) acc[d] = NAN;
}

/* Dots of some pages to logits over their factors; `largest` [rows][LARGEST_LANES] has the largest of each lane of vectors
 * that are numbers. */
static void to_logits(const int32_t *dots, const float *key_scale, int tokens, int rows, float *logit, float *most) {
    for (int r = 0; r < rows; r++) {
        vf largest = v_load(most + r * LARGEST_LANES);
        for (int t = 0; t < tokens; t += VL) {
            const vf x = v_mul(v_from_int(dots + r * BLOCK_TOKENS + t), v_load(key_scale + t));
            largest = v_max(largest, x);
            v_store(logit + r * BLOCK_TOKENS + t, x);
        }
        v_store(most + r * LARGEST_LANES, largest);
    }
}

/* A row on its way from logits to weights. logit holds logits divided by `by` where no softcap needs them, as the
 * exponential's argument is a fused multiply-add anyway. */
typedef struct {
    float *logit;       /* [tokens]: then weights, too */
    float by, largest;  /* largest of the logits that are numbers; -inf where there is none */
} row;

/* softcap, mask, and a factor that is no positive number; what is seen has the same bits as without a mask */
static void hide_and_cap(row *a, const block_mask *mask, int r, float softcap, int tokens) {
    if (softcap > 0.0f || !(a->by > 0.0f)) {
        for (int t = 0; t < tokens; t += VL) v_store(a->logit + t, v_mul(v_load(a->logit + t), v_set(a->by)));
        a->by = 1.0f;
        if (softcap > 0.0f) soft_cap(a->logit, tokens, softcap);
    }
    if (mask) hide(mask, r, tokens, a->logit);
    a->largest = largest_logit(a->logit, tokens) * a->by;
}

/* Scales of what is in sight: those of hidden tokens may be NaN. */
static const float *scales_in_sight(const float *logit, const float *scale, int tokens, float *to) {
    for (int t = 0; t < tokens; t++) to[t] = logit[t] == -INFINITY ? 0.0f : scale[t];
    return to;
}

/* exp(logit - maximum) times the value scale, in place; adds up the former in the state. `all`: sum of the absolute
 * weights, `most`: the largest. */
static inline void weigh(const row *a, const float *value_scale, int tokens, row_state *state, float *all, float *most) {
    float *logit = a->logit, by = a->by, from = state->max;
    vf sum = v_set(0.0f), total = sum, largest = sum;
    if (!(fabsf(from) < 1000.0f)) { /* there the rounding of a product would show: subtract first */
        for (int t = 0; t < tokens; t += VL) v_store(logit + t, v_sub(v_mul(v_load(logit + t), v_set(by)), v_set(from)));
        by = 1.0f;
        from = 0.0f;
    }
    const vf slope = v_set(by * LOG2_E), shift = v_set(-from * LOG2_E);
    for (int t = 0; t < tokens; t += VL) {
        const vf p = exp2_of_weight(v_fma(v_load(logit + t), slope, shift));
        const vf x = v_mul(p, v_load(value_scale + t)), magnitude = v_abs(x);
        sum = v_add(sum, p);
        total = v_add(total, magnitude);
        largest = v_max(largest, magnitude);
        v_store(logit + t, x);
    }
    state->sum += v_sum(sum);
    *all = v_sum(total);
    *most = v_largest(largest);
}

/* The same where nothing is hidden and value scales are plain: two operations a weight less. `all` is a bound then. */
static inline void weigh_plain(const row *a, const float *value_scale, int tokens, row_state *state, float *all, float *most) {
    float *logit = a->logit;
    vf sum = v_set(0.0f), largest = sum;
    const vf slope = v_set(a->by * LOG2_E), shift = v_set(-state->max * LOG2_E);
    for (int t = 0; t < tokens; t += VL) {
        const vf p = exp2_of_weight(v_fma(v_load(logit + t), slope, shift)), x = v_mul(p, v_load(value_scale + t));
        sum = v_add(sum, p);
        largest = v_max(largest, x);
        v_store(logit + t, x);
    }
    const float total = v_sum(sum);
    state->sum += total;
    *most = v_largest(largest);
    *all = total < INFINITY ? (float)tokens * *most : NAN;
}

/* Whether all value scales are numbers of at least 0, and even `tokens` of the largest weights have room in a sum. */
static inline int plain_scales(const float *scale, const tqai_codec *value, int tokens) {
    uint32_t most = 0;
    for (int t = 0; t < tokens; t++) {
        const uint32_t bits = float_to_bits(scale[t]);
        most = bits > most ? bits : most;
    }
    return most < 0x7F800000u && value->largest_sum >= 32767.0f * (float)tokens;
}

/* Weights to whole numbers; returns their step. */
static inline float whole_weights(const float *weight, float all, float most, const tqai_codec *value, int tokens, int16_t *w) {
    const float lift = most < 0x1p-60f ? 0x1p60f : 1.0f; /* lest 32767 / most overflow */
    const int bytes = of_bytes(value);
    const float a = (bytes ? WEIGHT_OF_BYTES : 32767.0f) / (most * lift), b = value->largest_sum / (all * lift);
    const float up = bytes || a < b ? a : b;
    if (lift != 1.0f) {
        for (int t = 0; t < tokens; t += 2 * VL)
            v_store_int16(w + t, v_mul(v_load(weight + t), v_set(lift)), v_mul(v_load(weight + t + VL), v_set(lift)), up);
    } else {
        for (int t = 0; t < tokens; t += 2 * VL) v_store_int16(w + t, v_load(weight + t), v_load(weight + t + VL), up);
    }
    return value->level_step * (bytes ? (float)FACTOR_PARTS : 1.0f) / up / lift;
}

/* Step by step for all rows, so that a row's sums across lanes pass while the next row is at work. */
static void softmax_block(float *logit, const float *largest, const float *factor, const float *value_scale,
                          const tqai_codec *value, const block_mask *mask, float softcap, int tokens, int rows,
                          row_state *state, float *acc, int16_t *w, float *step) {
    row row_of[MAX_ROWS];
    float all[MAX_ROWS] = {0}, most[MAX_ROWS] = {0};
    const int plain = !mask && plain_scales(value_scale, value, tokens);
    for (int r = 0; r < rows; r++) {
        row *a = row_of + r;
        *a = (row){logit + r * BLOCK_TOKENS, factor[r], v_largest(v_load(largest + r * LARGEST_LANES)) * factor[r]};
        if (mask || softcap > 0.0f || !(a->by > 0.0f)) hide_and_cap(a, mask, r, softcap, tokens);
        if (!move_maximum(a->logit, tokens, a->largest, value->head_dim, state + r, acc + r * value->head_dim)) continue;
        if (plain && fabsf(state[r].max) < 1000.0f) {
            weigh_plain(a, value_scale, tokens, state + r, all + r, most + r);
            continue;
        }
        float in_sight[BLOCK_TOKENS];
        weigh(a, mask ? scales_in_sight(a->logit, value_scale, tokens, in_sight) : value_scale, tokens, state + r, all + r, most + r);
    }
    for (int r = 0; r < rows; r++) {
        step[r] = 0.0f;
        /* NaN, which no integer can say, or not a normal float */
        if (!(all[r] < INFINITY) || most[r] < 0x1p-126f)
            no_weights(w + r * BLOCK_TOKENS, tokens, !(all[r] < INFINITY), value->head_dim, acc + r * value->head_dim);
        else step[r] = whole_weights(row_of[r].logit, all[r], most[r], value, tokens, w + r * BLOCK_TOKENS);
    }
}
