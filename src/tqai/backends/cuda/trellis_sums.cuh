// Codes of 3 bits and 256 states, whose windows are too long for the tables of `trellis_split.cuh` as they stand. But a level
// depends on six sums (exclusive or) of the window's bits b, up to the order of the levels:
//
//     x0 = b1 ^ b7 ^ b2 ^ b3 ^ b10     x1 = b2 ^ b8     x2 = b3 ^ b9     x3 = b4     x4 = b5     x5 = b6
//
// With y = b ^ b >> 6, and b >> 1 ^ b >> 2 ^ b >> 9 added to every third bit of it, the first three of coordinate i are
// bits 3 i + 1 .. 3 i + 3 of y, and the last three bits 3 i + 4 .. 3 i + 6 of b: all are made at once in a word that has the
// bits of eight coordinates. Three bits of y and three of b in turn:
//
//     even   bit 1 ..  6   7 .. 12   13 .. 18   19 .. 24     odd, three bits further down, the same of
//            coord. 0      2         4          6            coordinates 1, 3, 5, 7
//
// Two levels are 12 bits side by side, x, of which the middle 10 are looked up, and the outer two choose as there:
// s = x0 ^ x3, t = x8 ^ x11.

#define EVERY_THIRD 0x12492492u  // bits 1, 4, 7, ...
#define EVEN_SUMS 0x38e38eu      // bits 1 .. 3, 7 .. 9, ...
#define OF_FIRST_SUMS 0x1212u    // bits 1, 4, 9, 12: what the choices are made of

// Sums of the eight coordinates whose bits begin at bit 0 of b; all 32 count.
__device__ __forceinline__ void sums_of(const Params& p, u32 b, u32& even, u32& odd) {
    // products for shifts, which would be for the busier unit
    const u32 third = (b * (u32)p.times256 ^ b * ((u32)p.times256 >> 1) ^ b) >> 9;
    const u32 differs = b >> 6 ^ third & EVERY_THIRD;
    even = b ^ differs & EVEN_SUMS;
    odd = (b ^ differs & EVEN_SUMS << 3) >> 3;
}

// Levels of the first two (`one`) and the last two coordinates of a and b: bytes first of a, first of b, second of a,
// second of b.
__device__ __forceinline__ void four_levels_of_sums(const Params& p, u32 a, u32 b, float copy, u32& one, u32& two) {
    const u32 times8 = p.times256 >> 5, higher = b * (u32)(p.times256 >> 4);
    const u32 low = either(a, higher, OF_FIRST_SUMS), high = either(a, higher, OF_FIRST_SUMS << 12);
    const u32 low_choices = differing(low, low * times8, CHOICES << 4), high_choices = differing(high, high * times8, CHOICES << 16);
    one = permute(look_up<10, 32>(a, 2, copy), look_up<10, 32>(b, 2, copy), moved_down(low_choices, 4, ENTRIES));
    two = permute(look_up<10, 32>(a, 14, copy), look_up<10, 32>(b, 14, copy), upper_half_plus(high_choices, p.times256, ENTRIES));
}

#if SUMSK
__device__ __forceinline__ int key_place(int d) { return d; }

// Products of two tokens' keys with all query columns; x0, x1 for column c.
__device__ __forceinline__ void take_sum_keys(const Params& p, const Query& q, const u32 (&w)[Keys::WORDS + 1], int run, float copy, int neighbour, float& x0, float& x1) {
    static_assert(Keys::DIMS % 8 == 0, "eight coordinates at a time");
    u32 next[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) next[t] = __shfl_sync(FULL, Keys::head(w, run + t), neighbour);
    int dots[4] = {0, 0, 0, 0};
#pragma unroll
    for (int s = 0; s < Keys::DIMS / 8; ++s) {
        u32 one[2], two[2];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            u32 even, odd;
            sums_of(p, bits_at<Keys::LENGTH, 32>(w, (run + t) * Keys::LENGTH, 24 * s, next[t]), even, odd);
            four_levels_of_sums(p, even, odd, copy, one[t], two[t]);
        }
        mma_s8s8(dots, one[0], one[1], two[0], two[1], q.b[2 * s], q.b[2 * s + 1]);
    }
    x0 = (float)(dots[0] * p.times256 + dots[1]);
    x1 = (float)(dots[2] * p.times256 + dots[3]);
}
#endif

#if SUMSV
// Four tokens' values times their weights, the four bytes of `f` (of column g / 2, part g % 2). A factor's register has two
// tokens' levels of dimensions d and d + 2, each wanted by one of two products: the other's weights are 0. Of 8 k .. 8 k + 7
// the sums are those of dimensions 0 and 4, 2 and 6 (`even` and `odd` of row 2 k), 1 and 5, 3 and 7 (of row 2 k + 1).
__device__ __forceinline__ void take_sum_values(const Params& p, PageSums& sums, const u32 (&w)[Values::WORDS + 1], int run, float copy, int neighbour, u32 f) {
    static_assert(Values::DIMS % 8 == 0, "eight coordinates at a time");
    u32 next[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) next[t] = __shfl_sync(FULL, Values::head(w, run + t), neighbour);
    const u32 f0 = f & 0xffffu, f1 = f >> 16, f2 = f << 16, f3 = f & 0xffff0000u;
#pragma unroll
    for (int k = 0; k < Values::DIMS / 8; ++k) {
        u32 of[2][4];
#pragma unroll
        for (int t = 0; t < 4; ++t) sums_of(p, bits_at<Values::LENGTH, 32>(w, (run + t) * Values::LENGTH, 24 * k, next[t]), of[0][t], of[1][t]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            u32 one[2], two[2];
#pragma unroll
            for (int t = 0; t < 2; ++t) four_levels_of_sums(p, of[h][2 * t], of[h][2 * t + 1], copy, one[t], two[t]);
            mma_s8u8(sums.even[2 * k + h], one[0], two[0], one[1], two[1], f0, f1);
            mma_s8u8(sums.odd[2 * k + h], one[0], two[0], one[1], two[1], f2, f3);
        }
    }
}
#endif
