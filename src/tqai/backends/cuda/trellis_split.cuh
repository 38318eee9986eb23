// Look-ups of two neighbours' levels in two candidates each, as bytes ("split" tables), for codes of 3 bits and 64 states.
//
// Both windows are 12 bits together. The 10 in the middle are looked up; bit 0 belongs to the first window alone and bit 11 to
// the second, and they choose among the four bytes of the entry:
//
//     bit   0   1 ............ 10   11        entry: byte 0, 1   first level, for s = 0, 1    s = bit 0 ^ bit 3
//           s   '---- entry ----'    t               byte 2, 3   second level, for t = 0, 1   t = bit 8 ^ bit 11
//
// s and t, so chosen, lie at bits 3 and 11 of x ^ 8 x (a product, as a shift would be for the busier unit). Two streams of
// bits, the second one 4 bits further up than the first, then have theirs in turn at every fourth bit, where a byte
// permute's selector wants them: it takes four levels out of two entries. Windows begin at bits 0 and 6 of the first
// stream, 4 and 10 of the second; what is looked up at bits 1, 7, 5 and 11.

#define OF_FIRST 0x24b49u  // bits 0, 3, 8, 11 and the same 6 further: what is needed of the first stream
#define CHOICES 0x1111u
#define ENTRIES 0x6240u    // first levels of both, then second levels of both

// Exact, as in `look_up`, for numbers below 2^24.
__device__ __forceinline__ u32 moved_down(u32 bits, int by, u32 plus) {
    return __float_as_uint(multiply_add(bits_float(bits), bits_float((u32)(127 - by) << 23), bits_float(plus)));
}

__device__ __forceinline__ u32 upper_half_plus(u32 x, u32 times256, u32 plus) {
    u32 y;  // lower half times 0 and upper half times 1, the bytes of 256
    asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(times256), "r"(plus));
    return y;
}

// One instruction each, which the compiler does not find: a where the mask is 1, else b; a ^ b where it is 1.
__device__ __forceinline__ u32 either(u32 a, u32 b, u32 mask) {
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(y) : "r"(a), "r"(b), "r"(mask));
    return y;
}
__device__ __forceinline__ u32 differing(u32 a, u32 b, u32 mask) {
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0x28;" : "=r"(y) : "r"(a), "r"(b), "r"(mask));
    return y;
}

// Levels of the windows at 0 (`one`) and 6 (`two`) of stream a and at 4 and 10 of stream b: bytes first of a,
// first of b, second of a, second of b. The table begins at the constant address AT.
template <u32 AT>
__device__ __forceinline__ void four_levels(u32 a, u32 b, float copy, int lane, u32 times8, u32& one, u32& two) {
    const u32 mixed = either(a, b, OF_FIRST), above = mixed * times8;
    one = permute(look_up<10, 32>(a, 1, copy), look_up<10, 32>(b, 5, copy), moved_down(differing(mixed, above, CHOICES << 3), 3, ENTRIES));
    two = permute(look_up_at_7<10, AT>(a, lane), look_up<10, 32>(b, 11, copy), moved_down(differing(mixed, above, CHOICES << 9), 9, ENTRIES));
}

#if SPLITK && !SUMSK
// Where a dimension's byte lies among those of its lane: `four_levels` gives them in this order.
__device__ __forceinline__ int key_place(int d) {
    constexpr int WHOLE = DK / 4 / 8 * 8;
    const int k = d & 7;
    // 0 4 1 5 2 6 3 7; where four are left, 0 2 1 3
    return d < WHOLE ? (d & ~7) | (k & 2) << 1 | (k & 1) << 1 | k >> 2 : (d & ~3) | (d & 1) << 1 | (d & 2) >> 1;
}

// Products of two tokens' keys with all query columns; x0, x1 for column c.
__device__ __forceinline__ void take_split_keys(const Params& p, const Query& q, const u32 (&w)[Keys::WORDS + 1], int run, float copy, int lane, int neighbour, float& x0, float& x1) {
    constexpr u32 AT = DYNAMIC_AT + RING_BYTES;
    const u32 times8 = p.times256 >> 5;
    u32 next[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) next[t] = __shfl_sync(FULL, Keys::head(w, run + t), neighbour);
    auto bits = [&](int t, int at) { return bits_at<Keys::LENGTH>(w, (run + t) * Keys::LENGTH, at, next[t]); };
    int dots[4] = {0, 0, 0, 0};
#pragma unroll
    for (int s = 0; s < Keys::DIMS / 8; ++s) {
        u32 one[2], two[2];
#pragma unroll
        for (int t = 0; t < 2; ++t) four_levels<AT>(bits(t, 24 * s), bits(t, 24 * s + 8), copy, lane, times8, one[t], two[t]);
        mma_s8s8(dots, one[0], one[1], two[0], two[1], q.b[2 * s], q.b[2 * s + 1]);
    }
    if constexpr (Keys::DIMS % 8) {
        constexpr int REST = 8 * BK * (Keys::DIMS / 8);
        u32 one[2], none;
#pragma unroll
        for (int t = 0; t < 2; ++t) four_levels<AT>(bits(t, REST), bits(t, REST + 2), copy, lane, times8, one[t], none);
        mma_s8s8_half(dots, one[0], one[1], q.b[Keys::DIMS / 4 - 1]);
    }
    x0 = (float)(dots[0] * p.times256 + dots[1]);
    x1 = (float)(dots[2] * p.times256 + dots[3]);
}
#endif

#if SPLITV && !SUMSV && !TWOV
// Four tokens' values times their weights, the four bytes of `f` (of column g / 2, part g % 2). A factor's
// register has two tokens' levels of two neighbouring dimensions, each wanted by one of two products: the
// other's weights are 0.
__device__ __forceinline__ void take_split_values(const Params& p, PageSums& sums, const u32 (&w)[Values::WORDS + 1], int run, float copy, int lane, int neighbour, u32 f) {
    constexpr u32 AT = DYNAMIC_AT + RING_BYTES + (SAME ? 0 : 4 * K_TABLE_WORDS);
    const u32 times8 = p.times256 >> 5;
    u32 next[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) next[t] = __shfl_sync(FULL, Values::head(w, run + t), neighbour);
    auto bits = [&](int t, int at) { return bits_at<Values::LENGTH>(w, (run + t) * Values::LENGTH, at, next[t]); };
    const u32 f0 = f & 0xffffu, f1 = f >> 16, f2 = f << 16, f3 = f & 0xffff0000u;
#pragma unroll
    for (int r = 0; r < BYTE_ROWS; ++r) {
        u32 one[2], two[2];
#pragma unroll
        for (int t = 0; t < 2; ++t) four_levels<AT>(bits(2 * t, 12 * r), bits(2 * t + 1, 12 * r - 4), copy, lane, times8, one[t], two[t]);
        if (4 * r + 2 >= DV / 8) two[0] = two[1] = 0;
        mma_s8u8(sums.even[r], one[0], two[0], one[1], two[1], f0, f1);
        mma_s8u8(sums.odd[r], one[0], two[0], one[1], two[1], f2, f3);
    }
}
#endif
