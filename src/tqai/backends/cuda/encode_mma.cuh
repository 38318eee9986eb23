// Pages from vectors of two bytes a number, two Hadamard rounds, head_dim 64 or 128, 2 to 4 bits: one warp
// for one side of one page and head, all numbers in registers. `encode_plan.py` makes the tables.
//
// Lane 4 g + c holds, of 16 tokens at a time, two rows (g and g + 8 of the tensor core's 16); which tokens
// they are is chosen such that codes end where the page's order wants them:
//
//     keys     rows g, g + 8 of step m:  tokens 8 g + 2 m, 8 g + 2 m + 1
//     values                             tokens 8 g + m, 8 g + m + 4
//
// Bits of a coordinate's number, and who holds them (u, j, i: registers, c1 c0: the lane):
//
//     read                          u u u x c1 c0 x      16 bytes in rows of eight by ldmatrix
//     mma 1 over bits 0 to 4        u u u j c1 c0 i      signs D_1 in the factor; products exact
//     butterflies over the other u
//     mma 2 over bits 1 to 3        keys    u u u c1 c0 j i      signs D_2 and 1 / head_dim in the factor;
//                                   values  u u u j c1 c0 i      numbers in two TF32 parts (22 bits)
//     butterflies over u and i

#define ENCODE_WARPS 4
#define STEPS 4
#define STEP_ROWS 16
#define LEAST_NORM2 1.0e-24f
#define MOST_NORM2 1.0e30f

// Words of the tables and of a warp's shared memory.
template <int D>
struct Sizes {
    static const int U = D / 16;
    static const int FACTOR = U * 32 * 4;        // mma 1: [u][lane][j][2]; mma 2: [u][lane][i][2]
    static const int CELLS = 2 * 144;            // (boundary, 4 * magnitudes below) of each bucket
    static const int TABLE = 2 * FACTOR + CELLS + 16;
    static const int ROWS = STEP_ROWS * D / 2;   // vectors of one step
    static const int STAGED = STEPS * U * 32;    // words of codes of a page's keys
};

__device__ __forceinline__ void butterfly(float& a, float& b) {
    const float sum = a + b;
    b = a - b;
    a = sum;
}

__device__ __forceinline__ float over_quad(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}

// 16 rows of a step: words (x, z) are of row g, (y, w) of row g + 8; x, y of coordinates 2 c, 2 c + 1, and z, w
// of those 8 further, of each 16.
template <int D>
struct Rows {
    uint4 word[D / 16];

    // Chunk k of 16 bytes of row r lies at chunk k ^ (r % 8), against bank conflicts.
    static __device__ __forceinline__ void fetch(u32 to, const u8* from, i64 pitch_bytes, int second, int lane) {
        constexpr int CHUNKS = D / 8, AT_ONCE = 32 / CHUNKS;
        const int k = lane % CHUNKS, first = lane / CHUNKS;
        from += 8 * first * pitch_bytes + 16 * k;
#pragma unroll
        for (int part = 0; part < STEP_ROWS / AT_ONCE; ++part) {
            const int row = part * AT_ONCE + first;  // row % 8 g, row / 8 which of the lane's two
            const u8* at = from + ((part * AT_ONCE % 8) * 8 + (part * AT_ONCE >= 8 ? second : 0)) * pitch_bytes;
            copy_sixteen(to + row * (2 * D) + ((k ^ (row & 7)) & (CHUNKS - 1)) * 16, at);
        }
        end_copies();
    }

    __device__ __forceinline__ void load(u32 rows, int lane) {
        const int row = lane & 15, upper = lane >> 4;  // matrices 0, 1 begin at chunk 2 u, matrices 2, 3 at the next
#pragma unroll
        for (int u = 0; u < D / 16; ++u) word[u] = load_matrices(rows + row * (2 * D) + (((2 * u + upper) ^ (row & 7)) & (D / 8 - 1)) * 16);
    }
};

// Butterflies between neighbours of bit `first` and above of u, of the numbers y[row][u][j][i].
template <int U>
__device__ __forceinline__ void over_units(float (&y)[2][U][2][2], int first) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int o = first; o < U; o *= 2)
#pragma unroll
                for (int u = 0; u < U; ++u)
                    if (!(u & o)) butterfly(y[r][u][k >> 1][k & 1], y[r][u + o][k >> 1][k & 1]);
}

template <int D>
__device__ __forceinline__ void rotate_rows(const Rows<D>& x, const u32* table, int lane, float (&y)[2][D / 16][2][2]) {
    constexpr int U = D / 16;
#pragma unroll
    for (int u = 0; u < U; u += 2) {
        const uint4 p = x.word[u], q = x.word[u + 1];
        const uint4 f = *(const uint4*)(table + (u * 32 + lane) * 4), e = *(const uint4*)(table + (u * 32 + 32 + lane) * 4);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const u32 f0 = j ? f.z : f.x, f1 = j ? f.w : f.y, e0 = j ? e.z : e.x, e1 = j ? e.w : e.y;
            float sum[4], difference[4];
            mma_first_alone(sum, p.x, p.y, p.z, p.w, f0, f1);
            mma_first_alone(difference, p.x, p.y, p.z, p.w, f0, f1);
            mma_first(sum, q.x, q.y, q.z, q.w, e0, e1);
            mma_first(difference, q.x, q.y, q.z, q.w, e0 ^ 0x80008000u, e1 ^ 0x80008000u);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                y[k >> 1][u][j][k & 1] = sum[k];
                y[k >> 1][u + 1][j][k & 1] = difference[k];
            }
        }
    }
    over_units<U>(y, 2);
    table += Sizes<D>::FACTOR;
#pragma unroll
    for (int u = 0; u < U; ++u) {
        const uint4 f = *(const uint4*)(table + (u * 32 + lane) * 4);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 high[4], low[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {  // row k & 1, j k >> 1
                const float v = y[k & 1][u][k >> 1][i];
                high[k] = __float_as_uint(v) & 0xffffe000u;
                low[k] = __float_as_uint(v - bits_float(high[k]));
            }
            float d[4];
            mma_second_alone(d, low[0], low[1], low[2], low[3], i ? f.z : f.x, i ? f.w : f.y);
            mma_second(d, high[0], high[1], high[2], high[3], i ? f.z : f.x, i ? f.w : f.y);
            y[0][u][0][i] = d[0]; y[0][u][1][i] = d[1]; y[1][u][0][i] = d[2]; y[1][u][1][i] = d[3];
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int u = 0; u < U; ++u) {
            butterfly(y[r][u][0][0], y[r][u][0][1]);
            butterfly(y[r][u][1][0], y[r][u][1][1]);
        }
    over_units<U>(y, 1);
}

// Squared norms of the two rows: the diagonals of x x^T, as a lane's words are the same number's place in
// both factors. Lane 4 n + n / 2 has the diagonal's number n.
template <int D>
__device__ __forceinline__ void norms2(const Rows<D>& x, int lane, float (&n)[2]) {
    float d[4], e[4];
#pragma unroll
    for (int u = 0; u < D / 16; ++u) {
        const uint4 p = x.word[u];
        if (u == 0) {
            mma_first_alone(d, p.x, p.y, p.z, p.w, p.x, p.z);
            mma_first_alone(e, p.x, p.y, p.z, p.w, p.y, p.w);
        } else {
            mma_first(d, p.x, p.y, p.z, p.w, p.x, p.z);
            mma_first(e, p.x, p.y, p.z, p.w, p.y, p.w);
        }
    }
    const bool odd = lane & 4;
    const int from = (lane & 28) + (lane >> 3);
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

// Rows far from 1 scaled by a power of two, so that no square overflows or vanishes; `top` is their greatest
// magnitude before. What is zero, subnormal or not finite becomes zero.
template <int D>
__device__ __forceinline__ void bring_near(Rows<D>& x, int (&exponent)[2], float (&top)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float most = 0.0f;
#pragma unroll
        for (int u = 0; u < D / 16; ++u) {
            const u32 w[2] = {r ? x.word[u].y : x.word[u].x, r ? x.word[u].w : x.word[u].z};
#pragma unroll
            for (int k = 0; k < 2; ++k) {
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
        for (int u = 0; u < D / 16; ++u) {
            uint4& w = x.word[u];
            if (r == 0) {
                w.x = scaled_word(w.x, exponent[r], usable);
                w.z = scaled_word(w.z, exponent[r], usable);
            } else {
                w.y = scaled_word(w.y, exponent[r], usable);
                w.w = scaled_word(w.w, exponent[r], usable);
            }
        }
    }
}

// What turns coordinates into magnitudes (0 to 2^(BITS - 1) - 1) and adds up a row's least-squares sums.
template <int BITS>
struct Quantizer {
    u32 cells, levels;  // addresses in shared memory; of the cells less that of the number 2^23's bits
    float buckets, boundary, inner, outer;  // the last three for 2 bits alone

    // 4 * magnitude of y; a and b are the sums of |t| c and c^2, t = y / norm; for 2 bits of |t|, and, of the
    // outer level alone, |t| and 1.
    __device__ __forceinline__ u32 magnitude(float y, float inv, float (&sum)[3]) const {
        const float t = fabsf(y * inv);
        if constexpr (BITS == 2) {
            sum[0] += t;
            u32 m = 0;
            if (t >= boundary) {
                sum[1] += t;
                sum[2] += 1.0f;
                m = 4;
            }
            return m;
        } else {
            // the bucket's number lies in the low bits of a float beyond 2^23, rounded down
            const u32 bucket = __float_as_uint(__fmaf_rz(t, buckets, 8388608.0f));
            float boundary_here, c;
            u32 m;
            shared_pair(cells + bucket * 8, boundary_here, m);
            if (t >= boundary_here) m += 4;
            c = shared_float(levels + m);
            sum[0] = fmaf(t, c, sum[0]);
            sum[1] = fmaf(c, c, sum[1]);
            return m;
        }
    }

    // <t, c> / <c, c> of a row, from the sums of its quad.
    template <int D>
    __device__ __forceinline__ float fitted(float (&sum)[3]) const {
        float tc = over_quad(sum[0]), cc = over_quad(sum[1]);
        if constexpr (BITS == 2) {
            const float outer_count = over_quad(sum[2]);
            tc = fmaf(outer - inner, cc, inner * tc);
            cc = fmaf(outer_count, outer * outer - inner * inner, D * inner * inner);
        }
        return __fdividef(tc, cc);
    }
};

#define NIBBLES(bits) (((1u << (bits)) - 1) * 0x11111111u)

// 4 dimensions (j, i) of both rows as nibbles: magnitude ^ (sign ? ones : 0), and so the sign on top.
template <int D, int BITS>
__device__ __forceinline__ u32 key_word(const Quantizer<BITS>& q, const float (&y)[2][D / 16][2][2], int u, const float (&inv)[2], float (&sum)[2][3]) {
    u32 word = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const u32 m = q.magnitude(y[k >> 2][u][(k >> 1) & 1][k & 1], inv[k >> 2], sum[k >> 2]);
        word = k == 0 ? m >> 2 : times_plus(m, 1u << (4 * k - 2), word);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // bytes 0 and 2 are the sign of j = 0, bytes 1 and 3 that of j = 1
            const u32 signs = __byte_perm(__float_as_uint(y[r][u][0][i]), __float_as_uint(y[r][u][1][i]), 0xfbfb);
            word ^= signs & NIBBLES(BITS) & ((i ? 0xf0f0u : 0x0f0fu) << (16 * r));
        }
    return word;
}

// Dimensions d and d + 8 (j) of one row, as `key_word` has them, in nibbles 0 and 4.
template <int D, int BITS>
__device__ __forceinline__ u32 value_pair(const Quantizer<BITS>& q, const float (&y)[2][D / 16][2][2], int r, int u, int i, float inv, float (&sum)[3]) {
    const float low = y[r][u][0][i], high = y[r][u][1][i];
    const u32 m = q.magnitude(low, inv, sum) + (q.magnitude(high, inv, sum) << 16);
    const u32 signs = __byte_perm(__float_as_uint(low), __float_as_uint(high), 0xffbb);
    return (m >> 2) ^ (signs & NIBBLES(BITS) & 0x000f000fu);
}

// Two codes of 2 bits in every nibble.
__device__ __forceinline__ u32 stored_pairs(u32 word) { return word ^ 0xaaaaaaaau; }

// Nibbles of `key_word` into the page's: the code itself, and for 4 bits code ^ (code << 1 & 8) ^ 8.
template <int BITS>
__device__ __forceinline__ u32 stored(u32 word) {
    if constexpr (BITS == 4) return word ^ ((word << 1) & 0x88888888u);
    else return word ^ (0x11111111u << (BITS - 1));
}

// Words j = 0 .. 3 of two registers each (`layout.py`) into the page.
template <int BITS>
__device__ __forceinline__ void store_unit(u8* unit, int lane, u32 w0, u32 w1, u32 w2, u32 w3) {
    if constexpr (BITS == 4) *(uint4*)(unit + lane * 16) = make_uint4(w0, w1, w2, w3);
    else if constexpr (BITS == 3) {
        *(uint2*)(unit + lane * 8) = make_uint2(w0 | (w3 & 0x11111111u) << 3, w1 | ((w3 >> 1) & 0x11111111u) << 3);
        *(u32*)(unit + 256 + lane * 4) = w2 | ((w3 >> 2) & 0x11111111u) << 3;
    } else *(uint2*)(unit + lane * 8) = make_uint2(w0 | w1 << 2, w2 | w3 << 2);
}

// One warp: the 64 vectors at `from` of one page and head, the first step's on their way into the first of
// the two buffers at `rows`; the first step of `after`, if any, is asked for before the last is worked on.
template <int D, int BITS, bool VALUES>
__device__ __forceinline__ void encode_page(const Quantizer<BITS>& q, const u32* table, const u8* from, const u8* after, i64 pitch_bytes, bool least_squares, u8* codes_out, u16* scales_out, u32 rows, u32* staged, int lane) {
    constexpr int U = D / 16, TOKEN_STEP = VALUES ? 1 : 2, SECOND = VALUES ? 4 : 1;
    const int g = lane >> 2, c = lane & 3;
    u32 kept[VALUES ? 2 : 1][VALUES ? U : 1][2] = {};
#pragma unroll 1
    for (int step = 0; step < STEPS; ++step) {
        const u8* next = step + 1 < STEPS ? from + (step + 1) * TOKEN_STEP * pitch_bytes : after;
        __syncwarp();
        if (next) Rows<D>::fetch(rows + ((step + 1) & 1) * (4 * Sizes<D>::ROWS), next, pitch_bytes, SECOND, lane);
        else end_copies();
        await_copies();
        Rows<D> x;
        x.load(rows + (step & 1) * (4 * Sizes<D>::ROWS), lane);
        float y[2][U][2][2], n2[2], top[2] = {1.0f, 1.0f};
        int exponent[2] = {0, 0};
        norms2<D>(x, lane, n2);
        rotate_rows<D>(x, table, lane, y);
        const bool ordinary = n2[0] > LEAST_NORM2 && n2[0] < MOST_NORM2 && n2[1] > LEAST_NORM2 && n2[1] < MOST_NORM2;
        if (!__all_sync(FULL, ordinary)) {
            x.load(rows + (step & 1) * (4 * Sizes<D>::ROWS), lane);
            bring_near<D>(x, exponent, top);
            norms2<D>(x, lane, n2);
            rotate_rows<D>(x, table, lane, y);
#pragma unroll
            for (int r = 0; r < 2; ++r)
                if (!(n2[r] > 0.0f)) {
                    // zero: every code is that of 0; not finite: every code is 0, that of the least coordinate
                    n2[r] = 1.0f;
#pragma unroll
                    for (int k = 0; k < 4 * U; ++k) y[r][k >> 2][(k >> 1) & 1][k & 1] = top[r] < INF ? 0.0f : -1.0f;
                }
        }
        float inv[2], sum[2][3] = {};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            inv[r] = rsqrtf(n2[r]);
            inv[r] = inv[r] * fmaf(-0.5f * n2[r] * inv[r], inv[r], 1.5f);
        }
        if constexpr (VALUES) {
            const u32 place = opaque(1u << (4 * step));
#pragma unroll
            for (int u = 0; u < U; ++u)
#pragma unroll
                for (int i = 0; i < 2; ++i)
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        const u32 pair = value_pair<D, BITS>(q, y, r, u, i, inv[r], sum[r]);
                        if constexpr (BITS == 2) kept[0][u][i] = times_plus(pair, r ? 4 * place : place, kept[0][u][i]);
                        else kept[r][u][i] = times_plus(pair, place, kept[r][u][i]);
                    }
        } else {
#pragma unroll
            for (int u = 0; u < U; ++u) staged[(step * U + u) * 32 + lane] = key_word<D, BITS>(q, y, u, inv, sum);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float norm = n2[r] * inv[r], fitted = q.template fitted<D>(sum[r]);
            if (c == 0) scales_out[8 * g + step * TOKEN_STEP + r * SECOND] = scale_bits(least_squares ? norm * fitted : norm, exponent[r], top[r]);
        }
    }
    if constexpr (!VALUES) {
#pragma unroll
        for (int u = 0; u < U; ++u) {
            u32 w[4];
#pragma unroll
            for (int m = 0; m < 4; ++m) w[m] = stored<BITS>(staged[(m * U + u) * 32 + lane]);
            store_unit<BITS>(codes_out + u * (BITS * 128), lane, w[0], w[1], w[2], w[3]);
        }
    } else {
        // This lane has the tokens of group g; lane 4 g' + g % 4 wants them, g' being the dimension modulo 8,
        // as its words 2 (g / 4) and 2 (g / 4) + 1 of two registers each.
        const int half = g >> 2;
#pragma unroll
        for (int u = 0; u < U; ++u)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                u8* unit = codes_out + u * (BITS * 128);
                const int to = 4 * (i + 2 * c) + (g & 3);
                if constexpr (BITS == 2) *(u32*)(unit + to * 8 + half * 4) = stored_pairs(kept[0][u][i]);
                else {
                    u32 first = stored<BITS>(kept[0][u][i]), second = stored<BITS>(kept[1][u][i]);
                    if constexpr (BITS == 4) *(uint2*)(unit + to * 16 + half * 8) = make_uint2(first, second);
                    else {
                        // the last word of the upper half is spread over the top bits of the other three
                        const u32 last = __shfl_xor_sync(FULL, second, 16);
                        if (half == 0) {
                            first |= (last & 0x11111111u) << 3;
                            second |= ((last >> 1) & 0x11111111u) << 3;
                            *(uint2*)(unit + to * 8) = make_uint2(first, second);
                        } else *(u32*)(unit + 256 + to * 4) = first | ((second >> 2) & 0x11111111u) << 3;
                    }
                }
            }
    }
}
