/* softmax.inc.h: from integer dots to integer weights, and attention over exact tokens; included by each
 * ISA's file. Loops run over 16 lanes of tokens (or of dims), which compilers turn into vectors.
 */

/* e^x for x <= 0 to 2e-7 relative; 0 below -87 and for -inf; NaN for NaN. */
static inline float exp_below(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    const float clamped = x < -87.0f ? -87.0f : x;
    const float shifted = clamped * 1.44269504f + magic, n = shifted - magic;
    const float f = (clamped - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 1.98756915e-4f;
    p = p * f + 1.39819994e-3f;
    p = p * f + 8.33345205e-3f;
    p = p * f + 4.16657962e-2f;
    p = p * f + 1.66666657e-1f;
    p = p * f + 0.5f;
    p = p * f * f + f + 1.0f;
    const float power = bits_to_float((float_to_bits(shifted) + 127u) << 23);
    return x < -87.0f ? 0.0f : p * power;
}

static inline float soft_capped(float x, float cap) {
    const float z = x / cap, e = exp_below(z > 0.0f ? -2.0f * z : 2.0f * z), t = (1.0f - e) / (1.0f + e);
    return cap * (z > 0.0f ? t : z <= 0.0f ? -t : z);
}

static inline float largest16(const float *lane) {
    float out = lane[0];
    for (int l = 1; l < 16; l++) out = lane[l] > out ? lane[l] : out;
    return out;
}

static inline float sum16(const float *lane) {
    float out = 0.0f;
    for (int l = 0; l < 16; l++) out += lane[l];
    return out;
}

static void hide(const block_mask *mask, int r, int tokens, float *logit) {
    for (int t = 0; t < mask->first; t++) logit[t] = -INFINITY;
    const uint8_t *seen = mask->row[r];
    if (!seen) return;
    if (mask->stride == 1) {
        for (int t = mask->first; t < tokens; t++) logit[t] = seen[t] ? logit[t] : -INFINITY;
    } else {
        for (int t = mask->first; t < tokens; t++)
            if (!seen[t * mask->stride]) logit[t] = -INFINITY;
    }
}

/* Logits to exp(logit - max) in place, state and acc moved to the new maximum. 0: nothing was seen. */
static int exponentiate(float *restrict logit, int tokens, int value_dim, row_state *state, float *restrict acc) {
    float lane[16], sum[16] = {0};
    for (int l = 0; l < 16; l++) lane[l] = -INFINITY;
    int nan = 0;
    for (int t = 0; t < tokens; t += 16)
        for (int l = 0; l < 16; l++) {
            const float x = logit[t + l];
            lane[l] = x > lane[l] ? x : lane[l];
            nan |= x != x;
        }
    const float block = largest16(lane), largest = block > state->max ? block : state->max;
    if (largest == -INFINITY) { /* a NaN among hidden tokens is still a NaN */
        if (nan) state->sum += NAN;
        return 0;
    }
    for (int t = 0; t < tokens; t += 16)
        for (int l = 0; l < 16; l++) {
            const float p = exp_below(logit[t + l] - largest);
            logit[t + l] = p;
            sum[l] += p;
        }
    if (largest > state->max) {
        const float shrink = exp_below(state->max - largest);
        state->sum *= shrink;
        state->max = largest;
        for (int d = 0; d < value_dim; d++) acc[d] *= shrink;
    }
    state->sum += sum16(sum);
    return 1;
}

static void softmax_block(const int32_t *dots, const float *factor, const float *restrict key_scale,
                          const float *restrict value_scale, const tqai_codec *value, const block_mask *mask, float softcap,
                          int tokens, int rows, row_state *state, float *acc, int16_t *w, float *step) {
    const int value_dim = value->head_dim;
    float logit[BLOCK_TOKENS];
    for (int r = 0; r < rows; r++) {
        const int32_t *restrict dot = dots + r * BLOCK_TOKENS;
        int16_t *restrict weight = w + r * BLOCK_TOKENS;
        float *row = acc + (size_t)r * (size_t)value_dim;
        const float by = factor[r];
        for (int t = 0; t < tokens; t++) logit[t] = (float)dot[t] * (by * key_scale[t]);
        if (softcap > 0.0f)
            for (int t = 0; t < tokens; t++) logit[t] = soft_capped(logit[t], softcap);
        if (mask) hide(mask, r, tokens, logit);
        float largest[16] = {0}, sum[16] = {0};
        step[r] = 0.0f;
        if (!exponentiate(logit, tokens, value_dim, state + r, row)) {
            memset(weight, 0, sizeof *weight * (size_t)tokens);
            continue;
        }
        for (int t = 0; t < tokens; t += 16)
            for (int l = 0; l < 16; l++) {
                const float p = logit[t + l], product = p * value_scale[t + l];
                const float x = p == 0.0f ? 0.0f : product; /* not by multiplication: the scale may be NaN */
                const float magnitude = x < 0.0f ? -x : x;
                logit[t + l] = x;
                largest[l] = magnitude > largest[l] ? magnitude : largest[l];
                sum[l] += magnitude;
            }
        const float most = largest16(largest), total = sum16(sum);
        if (!(total < INFINITY)) { /* a NaN in sight: the row is NaN, and no integer can say so */
            for (int d = 0; d < value_dim; d++) row[d] = NAN;
            memset(weight, 0, sizeof *weight * (size_t)tokens);
            continue;
        }
        if (most < 0x1p-126f) { /* below what a float holds exactly */
            memset(weight, 0, sizeof *weight * (size_t)tokens);
            continue;
        }
        const float lift = most < 0x1p-60f ? 0x1p60f : 1.0f; /* lest 32767 / most overflow */
        const float a = 32767.0f / (most * lift), b = value->largest_sum / (total * lift), up = a < b ? a : b;
        step[r] = value->level_step / up / lift;
        for (int t = 0; t < tokens; t++) {
            const float rounded = logit[t] * lift * up + 12582912.0f; /* the low 16 bits are the whole number */
            weight[t] = (int16_t)(uint16_t)float_to_bits(rounded);
        }
    }
}

static inline float dot_row(const float *restrict a, const float *restrict b, int n) {
    float lane[16] = {0};
    for (int d = 0; d < n; d += 16)
        for (int l = 0; l < 16; l++) lane[l] += a[d + l] * b[d + l];
    return sum16(lane);
}

static void exact_block(const float *q, int rows, int key_dim, int value_dim, const void *keys,
                        int64_t key_stride, int key_dtype, const void *values, int64_t value_stride,
                        int value_dtype, const block_mask *mask, float softcap, int tokens, row_state *state,
                        float *acc) {
    float logit[MAX_ROWS][TQAI_PAGE_TOKENS], x[TQAI_MAX_HEAD_DIM];
    int any = 0, live[MAX_ROWS];
    const int padded = (tokens + 15) / 16 * 16;
    for (int t = 0; t < tokens; t++) {
        to_float(at(keys, key_dtype, t * key_stride), key_dtype, key_dim, x);
        for (int r = 0; r < rows; r++) logit[r][t] = dot_row(q + (size_t)r * (size_t)key_dim, x, key_dim);
    }
    for (int r = 0; r < rows; r++) {
        for (int t = tokens; t < padded; t++) logit[r][t] = -INFINITY;
        if (softcap > 0.0f)
            for (int t = 0; t < tokens; t++) logit[r][t] = soft_capped(logit[r][t], softcap);
        if (mask) hide(mask, r, tokens, logit[r]);
        live[r] = exponentiate(logit[r], padded, value_dim, state + r, acc + (size_t)r * (size_t)value_dim);
        any |= live[r];
    }
    if (!any) return;
    for (int t = 0; t < tokens; t++) {
        to_float(at(values, value_dtype, t * value_stride), value_dtype, value_dim, x);
        for (int r = 0; r < rows; r++) {
            if (!live[r] || logit[r][t] == 0.0f) continue;
            const float p = logit[r][t] * VALUE_DOWN;
            float *restrict out = acc + (size_t)r * (size_t)value_dim;
            for (int d = 0; d < value_dim; d++) out[d] += p * x[d];
        }
    }
}
