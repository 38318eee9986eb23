// Levels of 4-bit codes as bytes, out of registers: nothing is looked up in memory.
//
// The level of window w is low[m % 16] + high[m / 16] (core/trellis_code.py), with
//
//     m % 16 = sum (exclusive or) of (w >> shift) & mask over a few terms;    m / 16 likewise
//
// Windows of neighbours begin 4 bits apart. So a word of the row's bits, shifted and masked in every nibble, has a
// term of eight neighbours, and the sum of such words is their selectors for byte permutes, which take selectors from
// nibbles, four at a time:
//
//     selectors   nibble i: m % 16 of coordinate 8 k + i (i = 0 .. 7); in another word m / 16
//     permute     byte i: of 8 entries that of nibble i; 0 where the nibble's top bit is set, which asks for the sign
//                 of the entry, and entries of `low` are below 128
//
// `low` takes two permutes: of its first half, which has no positive number and is subtracted, and, with inverted selectors
// and entries in reverse, of its second, which has no negative one. Each is 0 where the other has the level. `high` takes
// one. A bias added to its entries leaves no negative level, so that words can be added without carries from byte to
// byte; sums of products begin with what the bias adds to them, subtracted.
//
// Integer units do most of this and are what these kernels wait for: what can be done by the multipliers is.
//
// Macros for keys (K) and values (V):
//   MAPK0, MAPK1             of m % 16 and m / 16, a byte for each term: the shift, below 16, and 16 times the mask
//   LEVELSK0 .. LEVELSK5     four entries each: -low[0 .. 7], low[15 .. 8], high[0 .. 7] with the bias
//   BIASK

template <u32 MAP>
__device__ __forceinline__ u32 selectors(u32 bits, u32 next) {
    u32 y = 0;
#pragma unroll
    for (int i = 0; i < 32; i += 8) {
        const int shift = MAP >> i & 15;
        const u32 mask = (MAP >> (i + 4) & 15) * 0x11111111u;
        if (mask) y ^= (shift ? __funnelshift_r(bits, next, shift) : bits) & mask;
    }
    return y;
}

// 32 bits of a run, a whole number of bytes, from its bit 32 k on; where it ends, that of the next lane goes on, whose
// first bits are `next`.
template <int LENGTH>
__device__ __forceinline__ u32 run_word(const u32* words, int from, int k, u32 next) {
    const int have = LENGTH / 8 - 4 * k, at = from / 8 + 4 * k, shift = at % 4;
    if (have <= 0) return next;
    if (have >= 4) return shift ? __funnelshift_r(words[at / 4], words[at / 4 + 1], 8 * shift) : words[at / 4];
    const bool one = shift + have <= 4;  // the bytes lie in one word
    const u32 x = one ? words[at / 4] : __funnelshift_r(words[at / 4], words[at / 4 + 1], 8 * shift);
    const u32 own = (0x3210u + (one ? 0x1111u * shift : 0)) & ((1u << 4 * have) - 1);
    return __byte_perm(x, next, own | (0x7654u << 4 * have & 0xffffu));
}

// What follows these: nothing that counts, if they are not all of this run.
template <int LENGTH>
__device__ __forceinline__ u32 word_after(const u32* words, int from, int k, u32 next) {
    return LENGTH - 32 * k < 32 ? 0 : run_word<LENGTH>(words, from, k + 1, next);
}

// -1 and 256, which the compiler must not know: it would take their products to the busier unit.
struct Factors {
    u32 minus, times256;
    __device__ __forceinline__ explicit Factors(const Params& p) : minus((u32)(-p.times256 >> 8)), times256((u32)p.times256) {}
};

__device__ __forceinline__ u32 upper_half(u32 x, const Factors& by) {
    u32 y;  // lower half times 0 and upper half times 1, the bytes of 256
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(by.times256), "r"(0));
    return y;
}

// Levels, with the bias, by eight selectors of each kind: four, then the other four.
template <u32 L0, u32 L1, u32 L2, u32 L3, u32 H0, u32 H1>
__device__ __forceinline__ void eight_levels(u32 low, u32 high, const Factors& by, u32& one, u32& two) {
    const u32 other = low * by.minus + by.minus;
    one = permute(L0, L1, low) * by.minus + permute(L2, L3, other) + permute(H0, H1, high);
    two = permute(L0, L1, upper_half(low, by)) * by.minus + permute(L2, L3, upper_half(other, by)) + permute(H0, H1, upper_half(high, by));
}

#if PARTSK
__device__ __forceinline__ void mma_u8s8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_u8s8_half(int (&d)[4], u32 a0, u32 a1, u32 b0) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(b0));
}

// Products of two tokens' keys with all query columns; x0, x1 for column c.
__device__ __forceinline__ void take_part_keys(const Params& p, const Query& q, const u32 (&w)[Keys::WORDS + 1], int run, int neighbour, float& x0, float& x1) {
    const Factors by(p);
    u32 next[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) next[t] = __shfl_sync(FULL, Keys::head(w, run + t), neighbour);
    int dots[4] = {q.without_bias[0], q.without_bias[1], q.without_bias[0], q.without_bias[1]};
#pragma unroll
    for (int k = 0; k < (Keys::DIMS + 7) / 8; ++k) {
        u32 one[2], two[2];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            const int from = (run + t) * Keys::LENGTH;
            const u32 bits = run_word<Keys::LENGTH>(w, from, k, next[t]), after = word_after<Keys::LENGTH>(w, from, k, next[t]);
            eight_levels<LEVELSK0, LEVELSK1, LEVELSK2, LEVELSK3, LEVELSK4, LEVELSK5>(selectors<MAPK0>(bits, after), selectors<MAPK1>(bits, after), by, one[t], two[t]);
        }
        if (8 * k + 8 <= Keys::DIMS) mma_u8s8(dots, one[0], one[1], two[0], two[1], q.b[2 * k], q.b[2 * k + 1]);
        else mma_u8s8_half(dots, one[0], one[1], q.b[2 * k]);
    }
    x0 = (float)(dots[0] * p.times256 + dots[1]);
    x1 = (float)(dots[2] * p.times256 + dots[3]);
}
#endif

#if PARTSV
__device__ __forceinline__ void mma_u8u8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// What the sums of a page begin with. `weights` of column g / 2, part g % 2, as for `take_part_values`.
__device__ __forceinline__ void begin_sums(PageSums& sums, const u8* weights) {
    int less[4] = {0, 0, 0, 0};
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
        const u32 w0 = *(const u32*)(weights + 16 * n), w1 = *(const u32*)(weights + 16 * n + 16);
        mma_s8u8(less, MINUS_BYTES(BIASV), MINUS_BYTES(BIASV), MINUS_BYTES(BIASV), MINUS_BYTES(BIASV), w0, w1);
    }
#pragma unroll
    for (int r = 0; r < BYTE_ROWS; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.even[r][i] = sums.odd[r][i] = less[i];
}

// Four tokens' values times their weights, the four bytes of `f` (of column g / 2, part g % 2). Of two tokens'
// selectors the bytes are taken in turn, so that a factor's register has the levels of two neighbouring dimensions of
// one token, then of the other; each is wanted by one of two products: the other's weights are 0.
__device__ __forceinline__ void take_part_values(const Params& p, PageSums& sums, const u32 (&w)[Values::WORDS + 1], int run, int neighbour, u32 f) {
    const Factors by(p);
    u32 next[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) next[t] = __shfl_sync(FULL, Values::head(w, run + t), neighbour);
    const u32 even0 = __byte_perm(f, 0, 0x4140), even1 = __byte_perm(f, 0, 0x4342);
    const u32 odd0 = __byte_perm(f, 0, 0x1404), odd1 = __byte_perm(f, 0, 0x3424);
#pragma unroll
    for (int k = 0; k < (Values::DIMS + 7) / 8; ++k) {
        u32 levels[2][4];  // of two tokens: dimensions 8 k + 2 i and 8 k + 2 i + 1
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            u32 low[2], high[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int from = (run + 2 * t + h) * Values::LENGTH;
                const u32 n = next[2 * t + h];
                const u32 bits = run_word<Values::LENGTH>(w, from, k, n), after = word_after<Values::LENGTH>(w, from, k, n);
                low[h] = selectors<MAPV0>(bits, after);
                high[h] = selectors<MAPV1>(bits, after);
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const u32 order = h ? 0x7362 : 0x5140;
                eight_levels<LEVELSV0, LEVELSV1, LEVELSV2, LEVELSV3, LEVELSV4, LEVELSV5>(
                    __byte_perm(low[0], low[1], order), __byte_perm(high[0], high[1], order), by, levels[t][2 * h], levels[t][2 * h + 1]);
            }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int r = 2 * k + h;
            if (4 * r >= Values::DIMS) break;
            // where a part has but two dimensions more, rows 8 to 15 are what nobody reads
            mma_u8u8(sums.even[r], levels[0][2 * h], levels[0][2 * h + 1], levels[1][2 * h], levels[1][2 * h + 1], even0, even1);
            mma_u8u8(sums.odd[r], levels[0][2 * h], levels[0][2 * h + 1], levels[1][2 * h], levels[1][2 * h + 1], odd0, odd1);
        }
    }
}
#endif
