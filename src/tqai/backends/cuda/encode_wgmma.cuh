// Pages from vectors of two bytes a number, two Hadamard rounds, head_dim 64 or 128, 2 to 4 bits, by the tensor
// cores of sm_90: four warps together, each for one side of one page and head, 16 tokens at a time.
//
// R = H D_2 H D_1 / d is one product, and an exact one: element (i, k) is w[i ^ k] D_1[k], where w = H D_2 / d has
// whole even numbers up to d over d, which two-byte floats hold. It lies in shared memory, transposed, in blocks of
// 8 rows of R by 8 columns, 16 bytes a row of R:
//
//     byte     128 (2 (d / 8 * x + i) + b) + 16 n + 2 s     row n of block i, slot 8 b + s of step x over k
//
// Lane 4 g + c, of a coordinate's number (bits, c1 c0: the lane, o: register of a result)
//
//     vectors   p p c1 c0 x0 w e    word 2 x + w of a row, half e; x = 2 p + x0; slot 8 w + 2 c + e
//     keys      u u u c1 c0 j o     result o of block 2 u + j, n = 2 c + o
//     values    u u u o c1 j c0
//
// and of 64 tokens 8 g + 2 step + h: row g + 8 h of the products. A step makes one word of a unit's codes, as in
// `encode_mma.cuh`.

// Words of the tables and of a warp's shared memory.
template <int D>
struct Sizes {
    static const int FACTOR = D * D / 2;
    static const int TABLE = FACTOR + 2 * CELLS;
    static const int ROWS = STEP_ROWS * D / 2;     // vectors of one step
    static const int CODES = STEPS * D / 16 * 32;  // [unit][step][lane]
    static const int WARP = ROWS + CODES;
};

// Rows h of a lane, words as above.
template <int D>
struct Rows {
    u32 word[ROWS_OF_LANE][D / 8];

    // A lane's 16 bytes number p of row h; nobody else reads them.
    static __device__ __forceinline__ void fetch(u32 to, const u8* from, int pitch_bytes) {
#pragma unroll
        for (int h = 0; h < ROWS_OF_LANE; ++h) {
#pragma unroll
            for (int p = 0; p < D / 32; ++p) copy_sixteen(to + (h * (D / 32) + p) * 512, from + 64 * p);
            from += pitch_bytes;
        }
        end_copies();
    }

    __device__ __forceinline__ void load(const uint4* rows) {
#pragma unroll
        for (int h = 0; h < ROWS_OF_LANE; ++h)
#pragma unroll
            for (int p = 0; p < D / 32; ++p) {
                const uint4 w = rows[(h * (D / 32) + p) * 32];
                word[h][4 * p] = w.x;
                word[h][4 * p + 1] = w.y;
                word[h][4 * p + 2] = w.z;
                word[h][4 * p + 3] = w.w;
            }
    }
};

// Four warps together: the 64 vectors of a page and head each, of which those of the first step are under way.
template <int D, int BITS, bool VALUES>
__device__ __forceinline__ void encode_page(Quantizer<D, BITS, VALUES>& q, u64 factor, float per_unit, const u8* from, const u8* after, int pitch_bytes, bool least_squares, u8* codes_out, u16* scales_out, u32 rows, const uint4* rows_here, u32* codes, int lane) {
    constexpr int U = D / 16, HALF = D / 2;
    const int g = lane >> 2, c = lane & 3;
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
        await_copies<0>();
        Rows<D> v;
        v.load(rows_here);
        float n2[ROWS_OF_LANE], inverse[ROWS_OF_LANE], norm[ROWS_OF_LANE], top = 1.0f;
        int exponent = 0;
        usable_norms2(v.word, lane, n2, exponent, top);
        // The vote has waited for all words, so their place is free.
        Rows<D>::fetch(rows, step + 1 < STEPS ? from + (i64)pitch_bytes * (2 * step + 2) : after, pitch_bytes);
        float y[2][HALF / 2];
        begin_products();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int x = 0; x < U; ++x) {
                const u64 b = factor + (x * (32 * D) + half * (32 * HALF)) / 16;
                if (x == 0) times_matrix<HALF, false>(y[half], v.word[0][2 * x], v.word[1][2 * x], v.word[0][2 * x + 1], v.word[1][2 * x + 1], b);
                else times_matrix<HALF, true>(y[half], v.word[0][2 * x], v.word[1][2 * x], v.word[0][2 * x + 1], v.word[1][2 * x + 1], b);
            }
            end_products();
        }
        norms_of(n2, inverse, norm);
        q.begin(per_unit, inverse, norm);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (half == 0) await_products<1>(y[half]);
            else await_products<0>(y[half]);
#pragma unroll
            for (int u = 0; u < U / 2; ++u) codes[((half * (U / 2) + u) * STEPS + step) * 32] = q.word(y[half] + 8 * u);
        }
        const float fitted = q.fitted(c), own_norm = c & 1 ? norm[1] : norm[0];
        if (c < 2) scales_out[8 * g + 2 * step + c] = scale_bits(least_squares ? fitted : own_norm, exponent, top);
    }
    put_units<U, BITS, VALUES>(codes_out, lane, codes);
}
