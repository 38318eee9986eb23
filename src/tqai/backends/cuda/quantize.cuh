// Scale and codes of a rotated vector, and 16 elements at a time out of memory.

// One vector's scale as bfloat16 bits, or the two special cases: 0, and NaN for what is not finite.
__device__ __forceinline__ u16 scale_bits(float scale, int exponent, float top) {
    if (!(top < INF)) return 0x7fc0;
    if (top < 1.17549435e-38f) return 0;
    // 2^exponent in two factors, as it may itself be out of range
    int half = exponent / 2;
    float s = scale * bits_float((u32)(127 + half) << 23) * bits_float((u32)(127 + exponent - half) << 23);
    u16 b = float_bfloat(s);
    return (b & 0x7fff) >= 0x7f80 ? 0x7f7f : b;
}

// e such that top / 2^e is in [1/2, 1); 0 where there is no such e or the vector counts as zero.
__device__ __forceinline__ int exponent_of(float top) {
    return top < INF && top >= 1.17549435e-38f ? (int)(__float_as_uint(top) >> 23) - 126 : 0;
}

__device__ __forceinline__ float scaled_down(float x, int exponent) {
    int half = exponent / 2;
    return x * bits_float((u32)(127 - half) << 23) * bits_float((u32)(127 - exponent + half) << 23);
}

// Code of one rotated coordinate and its centroid's magnitude. A cell of the table is the one boundary in a
// bucket of |y| / norm, and the number of magnitudes below it. Two small tables rather than one of wide
// entries: 16 entries of 8 bytes lie in different banks, and so do 32 of 4.
template <int BITS>
__device__ __forceinline__ int quantize(float y, float inv, float bucket_inv, float most, const float2* cells,
                                        const float* magnitudes, float& c) {
    const float t = fabsf(y) * inv;
    // the bucket's number lies in the low bits of a float beyond 2^23, rounded down
    const u32 bucket = __float_as_uint(__fadd_rz(fminf(fabsf(y) * bucket_inv, most), 8388608.0f)) & 0xffff;
    const float2 cell = cells[bucket];
    const int m = __float_as_int(cell.y) + (t >= cell.x ? 1 : 0);
    c = magnitudes[m];
    constexpr int HALF = 1 << (BITS - 1);
    return y < 0.0f ? HALF - 1 - m : HALF + m;  // not by its sign bit: -0 is 0
}

// Codes of one row's share into the byte array: keys as [token][dim], values as [dim][token].
template <int D, bool VALUES>
__device__ __forceinline__ void put_code(u8* bytes, int token, int dim, int code) {
    if (VALUES) bytes[dim * BYTE_PITCH + token] = (u8)code;
    else bytes[token * (D + 4) + dim] = (u8)code;
}

// 16 neighbouring elements as they lie in memory.
struct Sixteen {
    uint4 words[DTYPE == 2 ? 4 : 2];
    __device__ __forceinline__ void load(const void* from, i64 at) {
#pragma unroll
        for (int i = 0; i < (DTYPE == 2 ? 4 : 2); ++i)
            words[i] = *(const uint4*)((const u8*)from + at * (DTYPE == 2 ? 4 : 2) + 16 * i);
    }
    __device__ __forceinline__ void unpack(float (&x)[16]) const {
#pragma unroll
        for (int i = 0; i < (DTYPE == 2 ? 4 : 2); ++i) {
#if DTYPE == 2
            x[4 * i] = bits_float(words[i].x);
            x[4 * i + 1] = bits_float(words[i].y);
            x[4 * i + 2] = bits_float(words[i].z);
            x[4 * i + 3] = bits_float(words[i].w);
#else
            two_of_word(words[i].x, x[8 * i], x[8 * i + 1]);
            two_of_word(words[i].y, x[8 * i + 2], x[8 * i + 3]);
            two_of_word(words[i].z, x[8 * i + 4], x[8 * i + 5]);
            two_of_word(words[i].w, x[8 * i + 6], x[8 * i + 7]);
#endif
        }
    }
};
