// What the ways to levels as bytes have in common (`trellis_split.cuh`, `trellis_parts.cuh`): weights of values as
// two bytes, and sums of whole numbers.

// Weights of a page as 16-bit integers, in bytes: high and low part of column c in rows 2 c and 2 c + 1.
#define WEIGHT_ROW 80

__device__ __forceinline__ void pass_weights(const float (&w)[8], float share, u8* scratch, int g, int c) {
    u32 n[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) n[i] = __float_as_uint(fmaf(w[i], share, 8388608.0f));
    const u32 e0 = __byte_perm(n[0], n[1], 0x5410), e1 = __byte_perm(n[2], n[3], 0x5410);
    const u32 e2 = __byte_perm(n[4], n[5], 0x5410), e3 = __byte_perm(n[6], n[7], 0x5410);
    u8* to = scratch + 2 * c * WEIGHT_ROW + 8 * g;
    *(uint2*)to = make_uint2(__byte_perm(e0, e1, 0x7531), __byte_perm(e2, e3, 0x7531));
    *(uint2*)(to + WEIGHT_ROW) = make_uint2(__byte_perm(e0, e1, 0x6420), __byte_perm(e2, e3, 0x6420));
}

#define BYTE_ROWS ((DV / 8 + 3) / 4)  // dimensions 4 r .. 4 r + 3 of each part

// Sums of a page: dimensions 4 r and 4 r + 2 in `even[r]`, high and low part, 4 r + 1 and 4 r + 3 in `odd[r]`.
struct PageSums {
    int even[BYTE_ROWS][4], odd[BYTE_ROWS][4];
};
