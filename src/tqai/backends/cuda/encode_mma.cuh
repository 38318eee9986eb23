// Pages from vectors of two bytes a number, two Hadamard rounds, head_dim 64 or 128, 2 to 4 bits: one warp
// for one side of one page and head, everything in registers. `encode_plan.py` makes the tables.
//
// Lane 4 g + c holds, of 16 tokens at a time, two rows (g and g + 8 of the tensor core's 16); which tokens
// they are is chosen such that codes end where the page's order wants them:
//
//     keys     rows g, g + 8 of step m:  tokens 8 g + 2 m, 8 g + 2 m + 1
//     values                             tokens 8 g + m, 8 g + m + 4
//
// Bits of a coordinate's number, and who holds them (b: registers; c0, c1: the lane; the rest: registers):
//
//     read                       b b c1 c0 h x x     16 bytes for each b
//     mma 1 over bits 0 1 3 4    b b c1 c0 h t i     signs D_1 in the factor; products exact
//     butterflies over b and h
//     mma 2 over bits 2 3 4      keys    b b j c1 c0 t i      signs D_2 and 1 / head_dim in the factor;
//                                values  b b c1 j c0 t i      numbers in two TF32 parts (22 bits)
//     butterflies over b, t and i

#define ENCODE_WARPS 4
#define STEPS 4
#define LEAST_NORM2 1.0e-24f
#define MOST_NORM2 1.0e30f

struct EncodeTables {
    const u32* words;  // [B1 | B2 | cells | magnitudes], sizes in `TableSizes`
};

template <int D>
struct Sizes {
    static const int B = D / 32;                 // registers over the bits b
    static const int FIRST = 2 * B * 32 * 4;     // words of the factors of mma 1: [b][h][lane][t][2]
    static const int SECOND = 2 * B * 32 * 4;    // of mma 2: [b][t][lane][i][2]
    static const int CELLS = 2 * 144;            // (boundary, 4 * magnitudes below) of each bucket
    static const int TABLE = FIRST + SECOND + CELLS + 16;
};

__device__ __forceinline__ void mma_first(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if DTYPE == 0
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
#endif
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
}

__device__ __forceinline__ void mma_second(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void butterfly(float& a, float& b) {
    const float sum = a + b;
    b = a - b;
    a = sum;
}

__device__ __forceinline__ float over_quad(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}

// Two rows of one step as they lie in memory: words (0 1)(2 3)(4 5)(6 7) of eight numbers, for each b.
template <int D>
struct Rows {
    uint4 word[2][D / 32];
    __device__ __forceinline__ void load(const u8* from, i64 pitch_bytes, int first, int second) {
#pragma unroll
        for (int b = 0; b < D / 32; ++b) {
            word[0][b] = *(const uint4*)(from + first * pitch_bytes + 64 * b);
            word[1][b] = *(const uint4*)(from + second * pitch_bytes + 64 * b);
        }
    }
};

// Rotated rows y[row][b][h or j][t][i].
template <int D>
__device__ __forceinline__ void rotate_rows(const Rows<D>& x, const u32* table, int lane, float (&y)[2][D / 32][2][2][2]) {
    constexpr int B = D / 32;
#pragma unroll
    for (int b = 0; b < B; ++b)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint4 f = *(const uint4*)(table + ((b * 2 + h) * 32 + lane) * 4);
            const uint4 p = x.word[0][b], q = x.word[1][b];
            float d[4];
            mma_first(d, h ? p.z : p.x, h ? q.z : q.x, h ? p.w : p.y, h ? q.w : q.y, f.x, f.y);
            y[0][b][h][0][0] = d[0]; y[0][b][h][0][1] = d[1]; y[1][b][h][0][0] = d[2]; y[1][b][h][0][1] = d[3];
            mma_first(d, h ? p.z : p.x, h ? q.z : q.x, h ? p.w : p.y, h ? q.w : q.y, f.z, f.w);
            y[0][b][h][1][0] = d[0]; y[0][b][h][1][1] = d[1]; y[1][b][h][1][0] = d[2]; y[1][b][h][1][1] = d[3];
        }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int b = 0; b < B; ++b) butterfly(y[r][b][0][t][i], y[r][b][1][t][i]);
#pragma unroll
                for (int h = 0; h < 2; ++h)
#pragma unroll
                    for (int o = 1; o < B; o *= 2)
#pragma unroll
                        for (int b = 0; b < B; ++b)
                            if (!(b & o)) butterfly(y[r][b][h][t][i], y[r][b + o][h][t][i]);
            }
    table += Sizes<D>::FIRST;
#pragma unroll
    for (int b = 0; b < B; ++b)
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            const uint4 f = *(const uint4*)(table + ((b * 2 + t) * 32 + lane) * 4);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                u32 high[4], low[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) {  // row k & 1, h k >> 1
                    const float v = y[k & 1][b][k >> 1][t][i];
                    high[k] = __float_as_uint(v) & 0xffffe000u;
                    low[k] = __float_as_uint(v - bits_float(high[k]));
                }
                float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                mma_second(d, low[0], low[1], low[2], low[3], i ? f.z : f.x, i ? f.w : f.y);
                mma_second(d, high[0], high[1], high[2], high[3], i ? f.z : f.x, i ? f.w : f.y);
                y[0][b][0][t][i] = d[0]; y[0][b][1][t][i] = d[1]; y[1][b][0][t][i] = d[2]; y[1][b][1][t][i] = d[3];
            }
        }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int t = 0; t < 2; ++t)
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int o = 1; o < B; o *= 2)
#pragma unroll
                        for (int b = 0; b < B; ++b)
                            if (!(b & o)) butterfly(y[r][b][j][t][i], y[r][b + o][j][t][i]);
#pragma unroll
            for (int b = 0; b < B; ++b) {
                butterfly(y[r][b][j][0][0], y[r][b][j][1][0]);
                butterfly(y[r][b][j][0][1], y[r][b][j][1][1]);
                butterfly(y[r][b][j][0][0], y[r][b][j][0][1]);
                butterfly(y[r][b][j][1][0], y[r][b][j][1][1]);
            }
        }
}

// Squared norms of the two rows, whole quads.
template <int B>
__device__ __forceinline__ void norms2(const float (&y)[2][B][2][2][2], float (&n)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float s[2] = {0.0f, 0.0f};
#pragma unroll
        for (int b = 0; b < B; ++b)
#pragma unroll
            for (int k = 0; k < 8; ++k) s[k & 1] = fmaf(y[r][b][k >> 2][(k >> 1) & 1][k & 1], y[r][b][k >> 2][(k >> 1) & 1][k & 1], s[k & 1]);
        n[r] = over_quad(s[0] + s[1]);
    }
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

// Rows far from 1 scaled by a power of two, so that no square overflows or vanishes; others stay.
template <int D>
__device__ __noinline__ void bring_near(Rows<D>& x, int (&exponent)[2], float (&top)[2]) {
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
        float most = 0.0f;
#pragma unroll
        for (int b = 0; b < D / 32; ++b) {
            const u32 w[4] = {x.word[r][b].x, x.word[r][b].y, x.word[r][b].z, x.word[r][b].w};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                float one, two;
                two_of_word(w[k], one, two);
                most = max_nan(most, max_nan(fabsf(one), fabsf(two)));
            }
        }
        most = max_nan(most, __shfl_xor_sync(FULL, most, 1));
        most = max_nan(most, __shfl_xor_sync(FULL, most, 2));
        const bool usable = most < INF && most >= 1.17549435e-38f;
        top[r] = most;
        exponent[r] = exponent_of(most);
#pragma unroll
        for (int b = 0; b < D / 32; ++b) {
            uint4& w = x.word[r][b];
            w = make_uint4(scaled_word(w.x, exponent[r], usable), scaled_word(w.y, exponent[r], usable),
                           scaled_word(w.z, exponent[r], usable), scaled_word(w.w, exponent[r], usable));
        }
    }
}

// Sums for the least-squares scale of one row, and 8 numbers' codes as nibbles of magnitudes.
struct Fit {
    float yc, cc;
};

template <int BITS>
struct Quantizer {
    const float2* cells;
    const float* levels;  // magnitudes
    float buckets;

    // 4 * magnitude of t, |t| = |y| / norm
    __device__ __forceinline__ u32 magnitude(float t, Fit& fit) const {
        // the bucket's number lies in the low bits of a float beyond 2^23, rounded down
        const u32 bucket = __float_as_uint(__fmaf_rz(fabsf(t), buckets, 8388608.0f)) - 0x4b000000u;
        const float2 cell = cells[bucket];
        u32 m = __float_as_uint(cell.y);
        if (fabsf(t) >= cell.x) m += 4;
        const float c = *(const float*)((const u8*)levels + m);
        fit.yc = fmaf(fabsf(t), c, fit.yc);
        fit.cc = fmaf(c, c, fit.cc);
        return m;
    }
};

// Signs of two numbers as masks of 16 bits.
__device__ __forceinline__ u32 two_signs(float low, float high) {
    return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0xffbb);
}

// Codes of 8 numbers, y[k] in nibble k, as magnitude ^ (sign ? 7 : 0) with the sign above it, BITS wide.
template <int BITS>
__device__ __forceinline__ u32 codes_of_eight(const Quantizer<BITS>& q, const float* y0, const float* y1, float inv0, float inv1, Fit& f0, Fit& f1);
