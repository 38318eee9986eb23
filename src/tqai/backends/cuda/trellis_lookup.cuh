// Levels of trellis codes, one or two coordinates at a look.
//
// A row of codes is a circle of bits; coordinate i is levels[window of L bits from bit i * bits on]
// (docs/format.md). A table in shared memory has an entry of four bytes for every window, 32, 16 or 8 copies of
// it side by side, and lane l reads copy l % copies:
//
//     entry w of copy k at byte (w * copies + k) * 4
//
// With 32 copies every lane has a bank of its own and a look costs one cycle of the multiprocessor's shared
// memory, which is what bounds these kernels; fewer copies cost conflicts. An entry is
//
//     one coordinate    its level as float32; the factor of an m16n8k8 product of tf32, as it is
//     two (PAIR)        levels of the windows at bits s and s + bits, as a pair of bfloat16, for m16n8k16
//     two (SPLIT)       in two candidates each, as bytes: `trellis_split.cuh`
//
// Codes of 4 bits need no table: `trellis_parts.cuh`.
//
// Levels are whole numbers up to 127, exact in either. Their other factors come in two parts.

#define TABLE_SHIFT(copies) ((copies) == 32 ? 7 : (copies) == 16 ? 6 : 5)

__device__ __forceinline__ float multiply_add(float a, float b, float c) {
    float y;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(a), "f"(b), "f"(c));
    return y;
}
__device__ __forceinline__ u32 load_shared(u32 address) {
    u32 entry;
    asm("ld.shared.u32 %0, [%1];" : "=r"(entry) : "r"(address));
    return entry;
}

// The entry of the window at bit `at`, a constant, of `bits`; at + WINDOW <= 24. The shift of the window to its
// place in the address and the addition of the copy's address are one fused multiply-add of numbers below 2^24
// taken for floats, most of them denormal: it is exact, and the unit that does it is otherwise idle.
template <int WINDOW, int COPIES>
__device__ __forceinline__ u32 look_up(u32 bits, int at, float copy) {
    static_assert(WINDOW + TABLE_SHIFT(COPIES) <= 17, "a table has at most 128 KiB");
    const float shift = bits_float((u32)(127 + TABLE_SHIFT(COPIES) - at) << 23);
    return load_shared(__float_as_uint(multiply_add(bits_float(bits & (((1u << WINDOW) - 1) << at)), shift, copy)));
}

// What lane l adds to a window's place: the address of its copy, as a float. In a cluster the top byte of an
// address names the block, which a float has no room for: these kernels are launched without.
template <int COPIES>
__device__ __forceinline__ float copy_address(const u32* table, int lane) {
    return bits_float(shared_address(table) + 4 * (lane & (COPIES - 1)));
}

// 32 bits (of which 24 count) of a token's run from bit `at` on. Its run of LENGTH bits begins at bit `from` of
// this lane's words; where it ends, that of the next lane goes on, whose first bits are `next`.
template <int LENGTH>
__device__ __forceinline__ u32 bits_at(const u32* words, int from, int at, u32 next) {
    const int k = (from + at) >> 5, shift = (from + at) & 31, have = LENGTH - at;
    if (have == 16 && shift % 16 == 0) return __byte_perm(words[k], next, shift ? 0x5432 : 0x5410);
    u32 x = shift == 0 ? words[k] : shift + (have < 24 ? have : 24) <= 32 ? words[k] >> shift : __funnelshift_r(words[k], words[k + 1], shift);
    if (have < 24) x = (x & ((1u << have) - 1)) | next << have;
    return x;
}

// Words of a block of N words per lane: planes of 16, then 8, then 4 bytes for each of 32 lanes.
template <int N>
__device__ __forceinline__ void load_words(const u8* block, int lane, u32 (&w)[N + 1]) {
#pragma unroll
    for (int k = 0; k + 4 <= N; k += 4) {
        const uint4 a = *(const uint4*)(block + k * 128 + lane * 16);
        w[k] = a.x; w[k + 1] = a.y; w[k + 2] = a.z; w[k + 3] = a.w;
    }
    constexpr int K = N & ~3;
    if constexpr (N & 2) {
        const uint2 a = *(const uint2*)(block + K * 128 + lane * 8);
        w[K] = a.x; w[K + 1] = a.y;
    }
    if constexpr (N & 1) w[N - 1] = *(const u32*)(block + (N - 1) * 128 + lane * 4);
    w[N] = 0;  // what follows the last word is never among the bits that count
}

// One side of a page as the lanes of a warp hold it; `trellis_layout.py` has the picture.
template <int DIM, int BITS, int STATE_BITS, bool IS_PAIR, int PARTS>
struct Runs {
    static constexpr int DIMS = DIM / PARTS;                               // coordinates of a run: one token, one lane
    static constexpr int LENGTH = DIMS * BITS;                             // bits
    static constexpr int STEP = IS_PAIR ? 2 : 1;                           // coordinates of a look
    static constexpr int WINDOW = BITS + STATE_BITS + (IS_PAIR ? BITS : 0);
    static constexpr int TOKENS = 64 * PARTS / 32;                         // runs of a lane
    static constexpr int LEAST = PARTS == 4 ? 2 : 4;                       // runs that are needed at a time
    static constexpr int BLOCK = LEAST * LENGTH % 32 == 0 ? LEAST : 2 * LEAST * LENGTH % 32 == 0 ? 2 * LEAST : 4 * LEAST;  // runs that begin at a whole word
    static constexpr int WORDS = BLOCK * LENGTH / 32;                      // of a block, for each lane
    static constexpr int GRAIN = BITS == 3 && WINDOW > 9 ? 8 : 16;         // windows begin so far into a register at most
    static_assert(BLOCK * LENGTH % 32 == 0 && TOKENS % BLOCK == 0, "blocks are whole words");

    // The first bits of run r of a block, for the lane before.
    __device__ __forceinline__ static u32 head(const u32* words, int r) {
        const int k = (r * LENGTH) >> 5, shift = (r * LENGTH) & 31;
        return shift == 0 ? words[k] : shift + STATE_BITS <= 32 ? words[k] >> shift : __funnelshift_r(words[k], words[k + 1], shift);
    }
};

__device__ __forceinline__ void mma_tf32(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
