/* exact.inc.h: attention over exact tokens; included by each ISA's file after softmax.inc.h. */

static inline float dot_row(const float *a, const float *b, int n) {
    vf sum = v_set(0.0f);
    for (int d = 0; d < n; d += VL) sum = v_fma(v_load(a + d), v_load(b + d), sum);
    return v_sum(sum);
}

/* The row itself where it is float32, else converted into x. */
static inline const float *as_float(const void *row, int dtype, int n, float *x) {
    if (dtype == TQAI_FLOAT32) return row;
    to_float(row, dtype, n, x);
    return x;
}

/* acc += p[i] * value[i], i below count, at most 4; a token of weight 0 is not looked at: it may be NaN. */
static inline void add_values(const float *p, const float *const *value, int count, int dim, float *acc) {
    if (count == 4 && p[0] != 0.0f && p[1] != 0.0f && p[2] != 0.0f && p[3] != 0.0f) {
        const vf a = v_set(p[0] * VALUE_DOWN), b = v_set(p[1] * VALUE_DOWN);
        const vf c = v_set(p[2] * VALUE_DOWN), e = v_set(p[3] * VALUE_DOWN);
        for (int d = 0; d < dim; d += VL) {
            const vf two = v_fma(a, v_load(value[0] + d), v_mul(b, v_load(value[1] + d)));
            const vf four = v_fma(c, v_load(value[2] + d), v_fma(e, v_load(value[3] + d), two));
            v_store(acc + d, v_add(v_load(acc + d), four));
        }
        return;
    }
    for (int i = 0; i < count; i++) {
        if (p[i] == 0.0f) continue;
        const vf a = v_set(p[i] * VALUE_DOWN);
        for (int d = 0; d < dim; d += VL) v_store(acc + d, v_fma(a, v_load(value[i] + d), v_load(acc + d)));
    }
}

static void exact_block(const float *q, int rows, int key_dim, int value_dim, const void *keys,
                        int64_t key_stride, int key_dtype, const void *values, int64_t value_stride,
                        int value_dtype, const block_mask *mask, float softcap, int tokens, row_state *state,
                        float *acc) {
    float logit[MAX_ROWS][TQAI_PAGE_TOKENS], x[4 * TQAI_MAX_HEAD_DIM];
    int any = 0;
    const int padded = (tokens + 15) / 16 * 16;
    for (int t = 0; t < tokens; t++) {
        const float *key = as_float(at(keys, key_dtype, t * key_stride), key_dtype, key_dim, x);
        for (int r = 0; r < rows; r++) logit[r][t] = dot_row(q + r * key_dim, key, key_dim);
    }
    for (int r = 0; r < rows; r++) {
        if (softcap > 0.0f) soft_cap(logit[r], tokens, softcap);
        if (mask) hide(mask, r, tokens, logit[r]);
        for (int t = tokens; t < padded; t++) logit[r][t] = -INFINITY;
        const float block = largest_logit(logit[r], padded);
        const int seen = move_maximum(logit[r], tokens, block, value_dim, state + r, acc + r * value_dim);
        vf sum = v_set(0.0f);
        for (int t = 0; t < padded; t += VL) {
            vf p = v_set(0.0f);
            if (seen) p = exp_below(v_sub(v_load(logit[r] + t), v_set(state[r].max)));
            sum = v_add(sum, p);
            v_store(logit[r] + t, p);
        }
        state[r].sum += v_sum(sum);
        any |= seen;
    }
    if (!any) return;
    for (int t = 0; t < tokens; t += 4) { /* four values at once save loads and stores of the sums */
        const int count = tokens - t < 4 ? tokens - t : 4;
        const float *value[4];
        for (int i = 0; i < count; i++)
            value[i] = as_float(at(values, value_dtype, (t + i) * value_stride), value_dtype, value_dim,
                                x + i * TQAI_MAX_HEAD_DIM);
        for (int r = 0; r < rows; r++) add_values(logit[r] + t, value, count, value_dim, acc + r * value_dim);
    }
}
