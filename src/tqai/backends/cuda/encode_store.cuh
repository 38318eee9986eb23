// Nibbles of a page's 64 tokens and 16 dimensions, held by a warp, into the order of the page (`layout.py`).

// Words of a unit's four steps into the page.
template <int BITS, bool VALUES>
__device__ __forceinline__ void put_unit(u8* unit, int lane, const u32 (&word)[STEPS]) {
    if constexpr (!VALUES) {
        if constexpr (BITS == 4) *(uint4*)(unit + lane * 16) = make_uint4(word[0], word[1], word[2], word[3]);
        else if constexpr (BITS == 3) {
            const u32 w3 = word[3];
            *(uint2*)(unit + lane * 8) = make_uint2(word[0] | (w3 & 0x11111111u) << 3, word[1] | ((w3 >> 1) & 0x11111111u) << 3);
            *(u32*)(unit + 256 + lane * 4) = word[2] | ((w3 >> 2) & 0x11111111u) << 3;
        } else *(uint2*)(unit + lane * 8) = make_uint2(word[0] | word[1] << 2, word[2] | word[3] << 2);
    } else {
        // This lane has the tokens of group g; lane 4 d + g % 4 wants them, d being the dimension modulo 8, as
        // its words 2 (g / 4) and 2 (g / 4) + 1, of 4 tokens each.
        const int g = lane >> 2, c = lane & 3, half = g >> 2;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int to = 4 * ((c & 1) + 2 * j + 4 * (c >> 1)) + (g & 3);
            const u32 first = __byte_perm(word[0], word[1], j ? 0x7362 : 0x5140), second = __byte_perm(word[2], word[3], j ? 0x7362 : 0x5140);
            if constexpr (BITS == 4) *(uint2*)(unit + to * 16 + half * 8) = make_uint2(first, second);
            else if constexpr (BITS == 3) {
                // the last word of the upper half is spread over the top bits of the other three
                const u32 last = __shfl_xor_sync(FULL, second, 16);
                if (half == 0) *(uint2*)(unit + to * 8) = make_uint2(first | (last & 0x11111111u) << 3, second | ((last >> 1) & 0x11111111u) << 3);
                else *(u32*)(unit + 256 + to * 4) = first | ((second >> 2) & 0x11111111u) << 3;
            } else *(u32*)(unit + to * 8 + half * 4) = first | second << 2;
        }
    }
}

// All units of a page, from a lane's [unit][step][32] words in shared memory.
template <int UNITS, int BITS, bool VALUES>
__device__ __forceinline__ void put_units(u8* codes_out, int lane, const u32* codes) {
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
        u32 word[STEPS];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) word[step] = codes[(u * STEPS + step) * 32];
        put_unit<BITS, VALUES>(codes_out + u * (BITS * 128), lane, word);
    }
}
