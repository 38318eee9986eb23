// Norms of a lane's rows of vectors, and rows so far from 1 that their squares are out of range. word[h][a]
// has two numbers of row h of lane 4 g + c: g or g + 8 of a product's 16. Words 2 x and 2 x + 1 are of its step x.

#define LEAST_NORM2 1.0e-24f
#define MOST_NORM2 1.0e30f

// Squared norms of the rows: the diagonals of x x^T, as a lane's words are the same number's place in both
// factors. Lane 4 n + n / 2 has the diagonal's number n.
template <int W>
__device__ __forceinline__ void norms2(const u32 (&word)[ROWS_OF_LANE][W], int lane, float (&n)[ROWS_OF_LANE]) {
    const bool odd = lane & 4;
    const int from = (lane & 28) + (lane >> 3);
    float d[4], e[4];
#pragma unroll
    for (int a = 0; a < W; a += 2) {
        const u32 p = word[0][a], q = word[1][a], r = word[0][a + 1], s = word[1][a + 1];
        if (a == 0) {
            mma_alone(d, p, q, r, s, p, r);
            mma_alone(e, p, q, r, s, q, s);
        } else {
            mma(d, p, q, r, s, p, r);
            mma(e, p, q, r, s, q, s);
        }
    }
    n[0] = __shfl_sync(FULL, odd ? d[1] : d[0], from);
    n[1] = __shfl_sync(FULL, odd ? e[3] : e[2], from);
}

// A word's two numbers times a power of two in two factors, or zeros.
__device__ __forceinline__ u32 scaled_word(u32 w, int exponent, bool usable) {
    float a, b;
    two_of_word(w, a, b);
    a = usable ? scaled_down(a, exponent) : 0.0f;
    b = usable ? scaled_down(b, exponent) : 0.0f;
#if DTYPE == 0
    return (u32)float_half(a) | (u32)float_half(b) << 16;
#else
    return (u32)float_bfloat(a) | (u32)float_bfloat(b) << 16;
#endif
}

// Rows scaled by a power of two, so that no square overflows or vanishes. `top` is the greatest magnitude before,
// of row c % 2 of the lane, as `exponent`. What is zero, subnormal or not finite becomes zero; its squared norm is
// made 1, for which every code is that of 0, or, if not finite, NaN, for which every code is 0.
template <int W>
__device__ __forceinline__ void bring_near(u32 (&word)[ROWS_OF_LANE][W], int lane, float (&n2)[ROWS_OF_LANE], int& exponent, float& top) {
    float tops[ROWS_OF_LANE];
#pragma unroll
    for (int h = 0; h < ROWS_OF_LANE; ++h) {
        float most = 0.0f;
#pragma unroll
        for (int a = 0; a < W; ++a) {
            float one, two;
            two_of_word(word[h][a], one, two);
            most = max_nan(most, max_nan(fabsf(one), fabsf(two)));
        }
        most = max_nan(most, __shfl_xor_sync(FULL, most, 1));
        most = max_nan(most, __shfl_xor_sync(FULL, most, 2));
        const bool usable = most < INF && most >= 1.17549435e-38f;
        const int down = exponent_of(most);
        tops[h] = most;
        if ((lane & 1) == h) {
            top = most;
            exponent = down;
        }
#pragma unroll
        for (int a = 0; a < W; ++a) word[h][a] = scaled_word(word[h][a], down, usable);
    }
    norms2(word, lane, n2);
#pragma unroll
    for (int h = 0; h < ROWS_OF_LANE; ++h)
        if (!(n2[h] > 0.0f)) n2[h] = tops[h] < INF ? 1.0f : bits_float(0x7fffffffu);
}

// Squared norms of the rows, which are brought near 1 where one of the warp's is not.
template <int W>
__device__ __forceinline__ void usable_norms2(u32 (&word)[ROWS_OF_LANE][W], int lane, float (&n2)[ROWS_OF_LANE], int& exponent, float& top) {
    norms2(word, lane, n2);
    bool ordinary = true;
#pragma unroll
    for (int h = 0; h < ROWS_OF_LANE; ++h) ordinary = ordinary && n2[h] > LEAST_NORM2 && n2[h] < MOST_NORM2;
    if (!__all_sync(FULL, ordinary)) bring_near(word, lane, n2, exponent, top);
}

// 1 / norm, by one step of Newton's from the fast one, and the norm.
__device__ __forceinline__ void norms_of(const float (&n2)[ROWS_OF_LANE], float (&inverse)[ROWS_OF_LANE], float (&norm)[ROWS_OF_LANE]) {
#pragma unroll
    for (int h = 0; h < ROWS_OF_LANE; ++h) {
        inverse[h] = rsqrtf(n2[h]);
        inverse[h] = inverse[h] * fmaf(-0.5f * n2[h] * inverse[h], inverse[h], 1.5f);
        norm[h] = n2[h] * inverse[h];
    }
}
