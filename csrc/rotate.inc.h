/* rotate.inc.h: the rotation of 16 rows at once; included by each ISA's file.
 *
 * x is [head_dim][16]: the 16 lanes are rows, so every step is a plain vector operation. No fused
 * multiply-add and a fixed order of sums: every instruction set gives the same bits.
 */

static void hadamard16(float *restrict x, int dim) {
    for (int half = 1; half < dim; half *= 2)
        for (int start = 0; start < dim; start += 2 * half)
            for (int i = start; i < start + half; i++) {
                float *restrict low = x + 16 * i, *restrict high = x + 16 * (i + half);
                for (int l = 0; l < 16; l++) {
                    float a = low[l], b = high[l];
                    low[l] = a + b;
                    high[l] = a - b;
                }
            }
}

static void scale_rows16(float *restrict x, int dim, const float *restrict by) {
    for (int i = 0; i < dim; i++)
        for (int l = 0; l < 16; l++) x[16 * i + l] *= by[i];
}

static void rotate16(const tqai_codec *codec, float *restrict x, int inverse) {
    const int dim = codec->head_dim;
    if (codec->rounds > 0) {
        for (int round = 0; round < codec->rounds; round++) {
            int which = inverse ? codec->rounds - 1 - round : round;
            if (!inverse) scale_rows16(x, dim, codec->signs + (size_t)(which * dim));
            hadamard16(x, dim);
            if (inverse) scale_rows16(x, dim, codec->signs + (size_t)(which * dim));
        }
        for (int i = 0; i < 16 * dim; i++) x[i] *= codec->normaliser;
        return;
    }
    const float *matrix = inverse ? codec->transposed : codec->matrix;
    float y[16 * TQAI_MAX_HEAD_DIM];
    for (int i = 0; i < dim; i += 2) { /* two rows of the matrix share each load of x */
        float a[16] = {0}, b[16] = {0};
        const float *row = matrix + (size_t)(i * dim);
        for (int j = 0; j < dim; j++)
            for (int l = 0; l < 16; l++) {
                a[l] += row[j] * x[16 * j + l];
                b[l] += row[dim + j] * x[16 * j + l];
            }
        memcpy(y + 16 * i, a, sizeof a);
        memcpy(y + 16 * i + 16, b, sizeof b);
    }
    memcpy(x, y, sizeof(float) * 16 * (size_t)dim);
}
