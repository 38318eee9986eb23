// Pages from vectors of two bytes a number, two Hadamard rounds, head_dim 64 or 128, 2 to 4 bits: by the tensor
// cores of sm_80 and newer: one warp for one side of one page and head, 16 tokens at a time. `encode_plan.py` makes
// the tables.
//
// R = H D_2 H D_1 / d is one product of tensor cores, and an exact one: element (i, k) is w[i ^ k] times the
// sign D_1[k], where w = H D_2 / d has whole even numbers up to d over d, which two-byte floats hold. So all
// factors are the d numbers w, and a lane has all it needs of them in d / 8 registers (twice, as an instruction
// wants a pair of them in either order). The signs D_1 go into the vectors.
//
// Lane 4 g + c, of a coordinate's number (bits, c1 c0: the lane, o: register of a result)
//
//     vectors   x x x c1 c0 w e    word 2 x + w of a row, half e; x is the number of the product's step over k
//     keys      u u u c1 c0 j o    result o of product j of unit u
//     values    u u u o c1 j c0
//
// and of 64 tokens 8 g + 2 step + h: row g + 8 h of the products. A step makes one word of a unit's codes:
//
//     nibble     0       1       2       3       4       5       6       7
//     keys       h 0 j 0 o 0, o 1,   j 1 o 0, o 1,   h 1 j 0 o 0, o 1,   j 1 o 0, o 1
//     values     j 0 o 0 h 0, h 1,   o 1 h 0, h 1,   j 1 o 0 h 0, h 1,   o 1 h 0, h 1

// Words of the tables and of a warp's shared memory.
template <int D>
struct Sizes {
    static const int W = D / 8;                 // words of a row that a lane holds
    static const int FACTOR = 2 * W * 32;       // [j][word][lane]
    static const int SIGNS = 4 * W;             // [c][word]
    static const int TABLE = SIGNS + 2 * CELLS; // signs, boundaries, levels: in shared memory
    static const int ROWS = STEP_ROWS * D / 2;  // vectors of one step
    static const int CODES = STEPS * D / 16 * 32;  // [unit][step][lane]
    static const int WARP = 2 * ROWS + CODES;
};

// Rows h of a lane, words as above.
template <int D>
struct Rows {
    u32 word[ROWS_OF_LANE][D / 8];

    // Row 8 h + g of shared memory is token 8 g + h of the step's. Its 32 bytes number x lie at number
    // x ^ (g % 4), against bank conflicts.
    static __device__ __forceinline__ void fetch(u32 to, const u8* from, int pitch_bytes, int lane) {
        constexpr int CHUNKS = D / 8, AT_ONCE = 32 / CHUNKS;
        const int k = lane % CHUNKS, first = lane / CHUNKS;
        from += (i64)(8 * first) * pitch_bytes + 16 * k;
#pragma unroll
        for (int part = 0; part < STEP_ROWS / AT_ONCE; ++part) {
            const int row = part * AT_ONCE;
            const u8* at = from + (i64)pitch_bytes * (row % 8 * 8 + row / 8);
            copy_sixteen(to + (row + first) * (2 * D) + (((k >> 1) ^ ((row + first) & 3)) * 2 + (k & 1)) * 16, at);
        }
        end_copies();
    }

    __device__ __forceinline__ void load(const u8* rows, const u32* signs, int lane) {
        const int g = lane >> 2, c = lane & 3;
        const u8* at[4];
#pragma unroll
        for (int x = 0; x < 4; ++x) at[x] = rows + g * (2 * D) + (x ^ (g & 3)) * 32 + 8 * c;
#pragma unroll
        for (int x = 0; x < D / 16; x += 2) {
            const uint4 s = *(const uint4*)(signs + c * (D / 8) + 2 * x);
#pragma unroll
            for (int r = 0; r < ROWS_OF_LANE; ++r) {
                const uint2 a = *(const uint2*)(at[x & 3] + r * (16 * D) + (x >> 2) * 128);
                const uint2 b = *(const uint2*)(at[(x + 1) & 3] + r * (16 * D) + (x >> 2) * 128);
                word[r][2 * x] = a.x ^ s.x;
                word[r][2 * x + 1] = a.y ^ s.y;
                word[r][2 * x + 2] = b.x ^ s.z;
                word[r][2 * x + 3] = b.y ^ s.w;
            }
        }
    }

    // d = (ALONE ? 0 : d) + step x of the rows times a factor.
    template <bool ALONE>
    __device__ __forceinline__ void times(float (&d)[4], int x, u32 b0, u32 b1) const {
        if (ALONE) mma_alone(d, word[0][2 * x], word[1][2 * x], word[0][2 * x + 1], word[1][2 * x + 1], b0, b1);
        else mma(d, word[0][2 * x], word[1][2 * x], word[0][2 * x + 1], word[1][2 * x + 1], b0, b1);
    }
};

// y[j][2 h + o] of unit u.
template <int D>
__device__ __forceinline__ void products(const Rows<D>& v, const u32 (&factor)[2][D / 8], int u, float (&y)[8]) {
#pragma unroll
    for (int x = 0; x < D / 16; ++x)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float(&d)[4] = *(float(*)[4])(y + 4 * j);
            if (x == 0) v.template times<true>(d, x, factor[j][2 * (u ^ x)], factor[j][2 * (u ^ x) + 1]);
            else v.template times<false>(d, x, factor[j][2 * (u ^ x)], factor[j][2 * (u ^ x) + 1]);
        }
}

// One warp: the 64 vectors at `from` of one page and head, the first step's on their way into the first of
// the two buffers at `rows`; the first step of `after`, if any, is asked for before the last is worked on.
template <int D, int BITS, bool VALUES>
__device__ __forceinline__ void encode_page(Quantizer<D, BITS, VALUES>& q, const u32 (&factor)[2][D / 8], const u32* signs, float per_unit, const u8* from, const u8* after, int pitch_bytes, bool least_squares, u8* codes_out, u16* scales_out, u32 rows, const u8* rows_here, u32* codes, int lane) {
    constexpr int U = D / 16;
    const int g = lane >> 2, c = lane & 3;
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
        const u8* next = step + 1 < STEPS ? from + (i64)pitch_bytes * (2 * step + 2) : after;
        __syncwarp();
        if (next) Rows<D>::fetch(rows + ((step + 1) & 1) * (4 * Sizes<D>::ROWS), next, pitch_bytes, lane);
        else end_copies();
        await_copies<1>();
        __syncwarp();
        Rows<D> v;
        v.load(rows_here + (step & 1) * (4 * Sizes<D>::ROWS), signs, lane);
        float n2[ROWS_OF_LANE], inverse[ROWS_OF_LANE], norm[ROWS_OF_LANE], top = 1.0f;
        int exponent = 0;
        usable_norms2(v.word, lane, n2, exponent, top);
        norms_of(n2, inverse, norm);
        q.begin(per_unit, inverse, norm);
        float y[2][8];
        products<D>(v, factor, 0, y[0]);
#pragma unroll
        for (int u = 0; u < U; ++u) {
            if (u + 1 < U) products<D>(v, factor, u + 1, y[(u + 1) & 1]);
            codes[(u * STEPS + step) * 32] = q.word(y[u & 1]);
        }
        const float fitted = q.fitted(c), own_norm = c & 1 ? norm[1] : norm[0];
        if (c < 2) scales_out[8 * g + 2 * step + c] = scale_bits(least_squares ? fitted : own_norm, exponent, top);
    }
    put_units<U, BITS, VALUES>(codes_out, lane, codes);
}
