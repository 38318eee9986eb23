// Look-ups of levels of 2 bits in two candidates, as bytes, as `trellis_split.cuh`: for values beside a table that leaves no
// room for that of `trellis_pairs.cuh`, which is four times as large. The windows of two neighbours are 10 bits together:
//
//     bit   0   1 ........ 8   9        entry: byte 0, 1   first level, for s = 0, 1    s = bit 0 ^ bit 1
//           s   '-- entry -'   t               byte 2, 3   second level, for t = 0, 1   t = bit 8 ^ bit 9
//
// s and t lie at bits 1 and 9 of x ^ 2 x. Of eight coordinates of a token, 16 bits, windows begin at bits 0 and 8, or 4 and
// 12; those of another token are taken 4 bits further up.

#define OF_FIRST_TWO 0x30303u  // bits 0, 1, 8, 9, 16, 17

// Levels of the windows at AT (`one`) and AT + 8 (`two`) of both tokens: bytes first of a, first of b, second of a, second
// of b. `higher`: b, 4 bits further up.
template <int AT>
__device__ __forceinline__ void four_levels_of_two(u32 a, u32 b, u32 higher, float copy, u32 times2, u32& one, u32& two) {
    const u32 mixed = either(a, higher, OF_FIRST_TWO << AT), above = mixed * times2;
    one = permute(look_up<8, 32>(a, AT + 1, copy), look_up<8, 32>(b, AT + 1, copy), moved_down(differing(mixed, above, CHOICES << (AT + 1)), AT + 1, ENTRIES));
    const u32 choices = differing(mixed, above, CHOICES << (AT + 9));
    // 13 bits down, where that would not be exact for a float: 3 up and 16 down
    const u32 selectors = AT == 0 ? moved_down(choices, 9, ENTRIES) : upper_half_plus(choices * (times2 * 4), times2 * 128, ENTRIES);
    two = permute(look_up<8, 32>(a, AT + 9, copy), look_up<8, 32>(b, AT + 9, copy), selectors);
}

// Four tokens' values times their weights, the four bytes of `f` (of column g / 2, part g % 2), as `take_split_values`. Of
// dimensions 8 k .. 8 k + 7 row 2 k of the sums has 0 and 4, and 1 and 5, row 2 k + 1 the others.
__device__ __forceinline__ void take_two_values(const Params& p, PageSums& sums, const u32 (&w)[Values::WORDS + 1], int run, float copy, int neighbour, u32 f) {
    static_assert(Values::DIMS % 8 == 0, "eight coordinates at a time");
    const u32 times2 = p.times256 >> 7, times16 = p.times256 >> 4;
    u32 next[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) next[t] = __shfl_sync(FULL, Values::head(w, run + t), neighbour);
    const u32 f0 = f & 0xffffu, f1 = f >> 16, f2 = f << 16, f3 = f & 0xffff0000u;
#pragma unroll
    for (int k = 0; k < Values::DIMS / 8; ++k) {
        u32 one[2][2], two[2][2];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            const u32 a = bits_at<Values::LENGTH>(w, (run + 2 * t) * Values::LENGTH, 16 * k, next[2 * t]);
            const u32 b = bits_at<Values::LENGTH>(w, (run + 2 * t + 1) * Values::LENGTH, 16 * k, next[2 * t + 1]);
            const u32 higher = b * times16;
            four_levels_of_two<0>(a, b, higher, copy, times2, one[0][t], two[0][t]);
            four_levels_of_two<4>(a, b, higher, copy, times2, one[1][t], two[1][t]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            mma_s8u8(sums.even[2 * k + h], one[h][0], two[h][0], one[h][1], two[h][1], f0, f1);
            mma_s8u8(sums.odd[2 * k + h], one[h][0], two[h][0], one[h][1], two[h][1], f2, f3);
        }
    }
}
