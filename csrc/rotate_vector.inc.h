/* rotate_vector.inc.h: the rotation of W rows (of `lanes` side by side) in vectors of type T; included twice
 * by rotate.inc.h, which says what the names mean. x is [head_dim][lanes]; T has the plain operators. */

/* Two steps of the transform at once, which halves the loads and stores; the sums are those of two steps. */
static inline void NAME(butterfly)(float *x, int half, int lanes) {
    T a, b, c, d;
    memcpy(&a, x, sizeof a);
    memcpy(&b, x + half * lanes, sizeof b);
    memcpy(&c, x + 2 * half * lanes, sizeof c);
    memcpy(&d, x + 3 * half * lanes, sizeof d);
    const T ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
    a = ab + cd;
    b = a_b + c_d;
    c = ab - cd;
    d = a_b - c_d;
    memcpy(x, &a, sizeof a);
    memcpy(x + half * lanes, &b, sizeof b);
    memcpy(x + 2 * half * lanes, &c, sizeof c);
    memcpy(x + 3 * half * lanes, &d, sizeof d);
}

/* The last step where their number is odd. */
static inline void NAME(last_step)(float *x, int half, int lanes) {
    T a, b;
    memcpy(&a, x, sizeof a);
    memcpy(&b, x + half * lanes, sizeof b);
    const T sum = a + b, difference = a - b;
    memcpy(x, &sum, sizeof sum);
    memcpy(x + half * lanes, &difference, sizeof difference);
}

/* Where all lanes are here, several dims that take the same step make a wide vector. */
static inline void NAME(hadamard)(float *x, int dim, int lanes) {
    int half = 1;
    for (; 4 * half <= dim; half *= 4) {
        const int several = lanes == W && half * W % VL == 0;
        for (int start = 0; start < dim; start += 4 * half) {
            float *at = x + start * lanes;
            if (several)
                for (int i = 0; i < half * W; i += VL) butterfly_wide(at + i, half, lanes);
            else
                for (int i = 0; i < half; i++) NAME(butterfly)(at + i * lanes, half, lanes);
        }
    }
    if (half == dim) return;
    if (lanes == W && half * W % VL == 0)
        for (int i = 0; i < half * W; i += VL) last_step_wide(x + i, half, lanes);
    else
        for (int i = 0; i < half; i++) NAME(last_step)(x + i * lanes, half, lanes);
}

/* x[i] *= by[i] * all: by is -1 or 1 and all is the same for every i, so the order does not matter. */
static inline void NAME(multiply)(float *x, int dim, const float *by, float all, int lanes) {
    for (int i = 0; i < dim; i++) {
        T a;
        memcpy(&a, x + i * lanes, sizeof a);
        a = a * ((by ? by[i] : 1.0f) * all);
        memcpy(x + i * lanes, &a, sizeof a);
    }
}

/* y = matrix x, sums in the order of the columns; two rows of the matrix share each load of x. */
static inline void NAME(matrix)(const float *matrix, const float *x, float *y, int dim, int lanes) {
    for (int i = 0; i < dim; i += 2) {
        const float *row = matrix + i * dim;
        T a = {0}, b = {0}, c;
        for (int j = 0; j < dim; j++) {
            memcpy(&c, x + j * lanes, sizeof c);
            a += row[j] * c;
            b += row[dim + j] * c;
        }
        memcpy(y + i * lanes, &a, sizeof a);
        memcpy(y + (i + 1) * lanes, &b, sizeof b);
    }
}

static inline void NAME(rotate)(const tqai_codec *codec, float *x, int lanes, int inverse) {
    const int dim = codec->head_dim;
    for (int part = 0; part < lanes; part += W, x += W) {
        if (codec->rounds == 0) {
            float y[16 * TQAI_MAX_HEAD_DIM];
            NAME(matrix)(inverse ? codec->transposed : codec->matrix, x, y, dim, lanes);
            for (int i = 0; i < dim; i++) memcpy(x + i * lanes, y + i * lanes, sizeof(T));
            continue;
        }
        for (int round = 0; round < codec->rounds; round++) {
            const float *signs = codec->signs + (inverse ? codec->rounds - 1 - round : round) * dim;
            const float all = round == codec->rounds - 1 ? codec->normaliser : 1.0f;
            if (!inverse) NAME(multiply)(x, dim, signs, 1.0f, lanes);
            NAME(hadamard)(x, dim, lanes);
            if (inverse) NAME(multiply)(x, dim, signs, all, lanes);
            else if (all != 1.0f) NAME(multiply)(x, dim, NULL, all, lanes);
        }
    }
}
