// Levels of two neighbours at a look, as bytes, for codes of 1 and 2 bits. Both windows are at most 10 bits together, so
// that an entry has both levels and there is nothing to choose:
//
//     entry     first level, second level, 0, 0
//
// Two entries are joined by a multiply-add to four levels, which the compiler must not know for a permute: that would be
// for the busier unit.

__device__ __forceinline__ u32 joined(u32 first, u32 second, u32 times65536) { return second * times65536 + first; }

#if PAIRK
// Products of two tokens' keys with all query columns; x0, x1 for column c.
__device__ __forceinline__ void take_pair_keys(const Params& p, const Query& q, const u32 (&w)[Keys::WORDS + 1], int run, float copy, int neighbour, float& x0, float& x1) {
    u32 bits[2][Keys::LENGTH / Keys::GRAIN + 1];
#pragma unroll
    for (int t = 0; t < 2; ++t) split_run<Keys>(w, run + t, neighbour, bits[t]);
    auto entry = [&](int t, int d) { return d < Keys::DIMS ? look_up<Keys, COPIESK>(bits[t], d, copy) : 0u; };
    const u32 up = p.times256 * p.times256;
    int dots[4] = {0, 0, 0, 0};
#pragma unroll
    for (int s = 0; s < (Keys::DIMS + 7) / 8; ++s) {
        u32 one[2], two[2];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            one[t] = joined(entry(t, 8 * s), entry(t, 8 * s + 2), up);
            two[t] = joined(entry(t, 8 * s + 4), entry(t, 8 * s + 6), up);
        }
        if (8 * s + 8 <= Keys::DIMS) mma_s8s8(dots, one[0], one[1], two[0], two[1], q.b[2 * s], q.b[2 * s + 1]);
        else mma_s8s8_half(dots, one[0], one[1], q.b[2 * s]);
    }
    x0 = (float)(dots[0] * p.times256 + dots[1]);
    x1 = (float)(dots[2] * p.times256 + dots[3]);
}
#endif

#if PAIRV
// Four tokens' values times their weights, the four bytes of `f` (of column g / 2, part g % 2). A factor's register
// has two tokens' levels of two neighbouring dimensions, each wanted by one of two products: the other's weights are 0.
__device__ __forceinline__ void take_pair_values(const Params& p, PageSums& sums, const u32 (&w)[Values::WORDS + 1], int run, float copy, int neighbour, u32 f) {
    u32 bits[4][Values::LENGTH / Values::GRAIN + 1];
#pragma unroll
    for (int t = 0; t < 4; ++t) split_run<Values>(w, run + t, neighbour, bits[t]);
    auto entry = [&](int t, int d) { return d < Values::DIMS ? look_up<Values, COPIESV>(bits[t], d, copy) : 0u; };
    const u32 up = p.times256 * p.times256;
    const u32 even0 = __byte_perm(f, 0, 0x4140), even1 = __byte_perm(f, 0, 0x4342);
    const u32 odd0 = __byte_perm(f, 0, 0x1404), odd1 = __byte_perm(f, 0, 0x3424);
#pragma unroll
    for (int r = 0; r < BYTE_ROWS; ++r) {
        u32 one[2], two[2];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            one[t] = joined(entry(2 * t, 4 * r), entry(2 * t + 1, 4 * r), up);
            two[t] = joined(entry(2 * t, 4 * r + 2), entry(2 * t + 1, 4 * r + 2), up);
        }
        mma_s8u8(sums.even[r], one[0], two[0], one[1], two[1], even0, even1);
        mma_s8u8(sums.odd[r], one[0], two[0], one[1], two[1], odd0, odd1);
    }
}
#endif
