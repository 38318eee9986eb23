// One code per byte, of a block's 64 vectors, into the order of a page; `layout.py` has the picture.

template <int D, int BITS, bool VALUES>
__device__ __forceinline__ void pack_units(const u8* bytes, u8* codes_out) {
    for (int k = threadIdx.x; k < D / 16 * 32; k += CODE_THREADS) {
        const int u = k >> 5, g = (k >> 2) & 7, c = k & 3;
        u32 reg[8];  // 4 codes each, one per byte
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            const u8* from = VALUES ? bytes + (16 * u + g + 8 * (r & 1)) * BYTE_PITCH + 8 * (c + 4 * (r >> 2)) + 4 * ((r & 3) >> 1)
                                    : bytes + (8 * g + r) * (D + 4) + 16 * u + 4 * c;
            reg[r] = *(const u32*)from;
        }
        u8* unit = codes_out + u * (BITS * 128);
        const int l = k & 31;
        if constexpr (BITS == 8) {
            *(uint4*)(unit + l * 16) = make_uint4(reg[0], reg[1], reg[2], reg[3]);
            *(uint4*)(unit + 512 + l * 16) = make_uint4(reg[4], reg[5], reg[6], reg[7]);
        } else {
            u32 pair[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                // bytes to nibbles: 4 of one register below 4 of the next
                u32 a = reg[2 * j] | reg[2 * j] >> 4, b = reg[2 * j + 1] | reg[2 * j + 1] >> 4;
                pair[j] = __byte_perm(__byte_perm(a, 0, 0x4420), __byte_perm(b, 0, 0x4420), 0x5410);
            }
            if constexpr (BITS == 4) {
#pragma unroll
                for (int j = 0; j < 4; ++j) pair[j] ^= ((pair[j] << 1) & 0x88888888u) ^ 0x88888888u;
                *(uint4*)(unit + l * 16) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
            } else if constexpr (BITS == 3) {
#pragma unroll
                for (int j = 0; j < 3; ++j) pair[j] |= ((pair[3] >> j) & 0x11111111u) << 3;
                *(uint2*)(unit + l * 8) = make_uint2(pair[0], pair[1]);
                *(u32*)(unit + 256 + l * 4) = pair[2];
            } else if constexpr (BITS == 2) {
                *(uint2*)(unit + l * 8) = make_uint2(pair[0] | pair[1] << 2, pair[2] | pair[3] << 2);
            } else {
                *(u32*)(unit + l * 4) = pair[0] | pair[1] << 1 | pair[2] << 2 | pair[3] << 3;
            }
        }
    }
}
