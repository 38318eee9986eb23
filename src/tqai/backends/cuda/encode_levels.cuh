// Rotated coordinates into the nibbles of a page, and the sums for scales.

#define CELLS 36  // room for boundaries and for levels: `encode_plan.py`

// Where the boundaries lie, less what the number 2^23's bits are there.
__device__ __forceinline__ u32 boundaries_from(u32 address) { return address - 0x4b000000u * 4; }

// Sum over its quad of row c % 2 of a lane's two.
__device__ __forceinline__ float own_row(const float (&x)[ROWS_OF_LANE], int c) {
    const bool odd = c & 1;
    const float a = (odd ? x[1] : x[0]) + __shfl_xor_sync(FULL, odd ? x[0] : x[1], 1);
    return a + __shfl_xor_sync(FULL, a, 2);
}

// Which result a nibble of a word is.
struct Place {
    int j, h, o;
    __device__ __forceinline__ constexpr Place(bool values, int nibble)
        : j(values ? nibble >> 2 : (nibble >> 1) & 1), h(values ? nibble & 1 : nibble >> 2), o(values ? (nibble >> 1) & 1 : nibble & 1) {}
};

// What turns coordinates into codes and adds up the least-squares sums of the rows.
template <int D, int BITS, bool VALUES>
struct Quantizer {
    u32 cells;                   // `boundaries_from`; levels follow
    float slope[ROWS_OF_LANE];   // takes y into the range of the boundaries
    float sum[2][ROWS_OF_LANE];  // of y c and c^2

    __device__ __forceinline__ void prepare(float, float, float, u32 at) { cells = at; }
    __device__ __forceinline__ void begin(float per_unit, const float (&inverse)[ROWS_OF_LANE], const float (&)[ROWS_OF_LANE]) {
#pragma unroll
        for (int h = 0; h < ROWS_OF_LANE; ++h) {
            slope[h] = inverse[h] * per_unit;
            sum[0][h] = sum[1][h] = 0.0f;
        }
    }

    // The word of a unit's products y[j][2 h + o]. Of y / norm between 0 and 1 the top five bits say where to
    // look for a boundary; on which side y lies, at which level. A level has its nibble in its low bits.
    __device__ __forceinline__ u32 word(const float* y) {
        u32 word = 0;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const Place p(VALUES, k);
            const float value = y[4 * p.j + 2 * p.h + p.o];
            const float t = saturated(value, slope[p.h], 0.5f);
            u32 at = cells + __float_as_uint(__fmaf_rz(t, 32.0f, 8388608.0f)) * 4;
            if (t >= shared_float(at)) at += 4;
            const float c = shared_float(at + 4 * CELLS);
            sum[0][p.h] = fmaf(value, c, sum[0][p.h]);
            sum[1][p.h] = fmaf(c, c, sum[1][p.h]);
            word = __funnelshift_r(word, __float_as_uint(c), 4);
        }
        return word;
    }

    // <y, c> / <c, c> of row c % 2.
    __device__ __forceinline__ float fitted(int c) const { return __fdividef(own_row(sum[0], c), own_row(sum[1], c)); }
};

// 2 bits: two levels and a sign, compared with.
template <int D, bool VALUES>
struct Quantizer<D, 2, VALUES> {
    static const u32 ROW = VALUES ? 0x0f0f0f0fu : 0x0000ffffu;  // nibbles of row 0
    float boundary, inner, outer;
    float slope[ROWS_OF_LANE];   // boundary times norm
    float sum[2][ROWS_OF_LANE];  // of |y|, and of that of the outer level alone
    u32 outers, alive;           // how many are at the outer level, by nibbles; nibbles of finite rows

    __device__ __forceinline__ void prepare(float b, float in, float out, u32) {
        boundary = b;
        inner = in;
        outer = out;
    }
    __device__ __forceinline__ void begin(float, const float (&)[ROWS_OF_LANE], const float (&norm)[ROWS_OF_LANE]) {
#pragma unroll
        for (int h = 0; h < ROWS_OF_LANE; ++h) {
            slope[h] = norm[h] * boundary;
            sum[0][h] = sum[1][h] = 0.0f;
        }
        outers = 0;
        alive = (norm[0] == norm[0] ? ROW : 0) | (norm[1] == norm[1] ? ~ROW : 0);
    }
    __device__ __forceinline__ u32 word(const float* y) {
        u32 signs = 0, magnitudes = 0;
#pragma unroll
        for (int k = 7; k >= 0; --k) {
            const Place p(VALUES, k);
            const float value = y[4 * p.j + 2 * p.h + p.o];
            sum[0][p.h] += fabsf(value);
            if (fabsf(value) >= slope[p.h]) {
                sum[1][p.h] += fabsf(value);
                magnitudes += 1u << (4 * k);
            }
            signs = __funnelshift_l(__float_as_uint(value), signs, 4);
        }
        outers += magnitudes;
        const u32 negative = (signs >> 3) & 0x11111111u;
        return ((magnitudes ^ negative) | ((negative ^ 0x11111111u) << 1)) & alive;
    }
    __device__ __forceinline__ float fitted(int c) const {
        float count[ROWS_OF_LANE];
#pragma unroll
        for (int h = 0; h < ROWS_OF_LANE; ++h) {
            // a nibble counts at most d / 16
            u32 n = (outers >> (h * (VALUES ? 4 : 16))) & ROW;
            n = VALUES ? n + (n >> 16) : (n & 0x0f0fu) + ((n >> 4) & 0x0f0fu);
            count[h] = (float)((n + (n >> 8)) & 0xffu);
        }
        const float tc = fmaf(outer - inner, own_row(sum[1], c), inner * own_row(sum[0], c));
        return __fdividef(tc, fmaf(own_row(count, c), outer * outer - inner * inner, D * inner * inner));
    }
};
