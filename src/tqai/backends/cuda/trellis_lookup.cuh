// Levels of trellis codes, one or two coordinates at a look.
//
// A row of codes is a circle of bits; coordinate i is levels[window of L bits from bit i * bits on]
// (docs/format.md). A table in shared memory has an entry of four bytes for every window, 32, 16 or 8 copies of
// it side by side, and lane l reads copy l % copies:
//
//     entry w of copy k at byte (w * copies + k) * 4
//
// With 32 copies every lane has a bank of its own and a look costs one cycle of the multiprocessor's shared
// memory; fewer copies cost conflicts. An entry is
//
//     one coordinate    its level as float32: `trellis_floats.cuh`
//     two (PAIR)        levels of the windows at bits s and s + bits, as bytes: `trellis_pairs.cuh`
//     two (SPLIT)       in two candidates each, as bytes: `trellis_split.cuh`, `trellis_split_two.cuh`, `trellis_sums.cuh`
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

// (a & mask) | c by one instruction, which the compiler does not find where it knows c.
__device__ __forceinline__ u32 masked_or(u32 a, u32 mask, u32 c) {
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(a), "r"(mask), "r"(c));
    return y;
}
template <u32 AT>
__device__ __forceinline__ u32 load_shared_at(u32 address) {
    u32 entry;
    asm("ld.shared.u32 %0, [%1 + %2];" : "=r"(entry) : "r"(address), "n"(AT));
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

// The same for a window that begins at bit 7: where a row of entries has 2^7 bytes, and AT is the constant address of the
// table, the bits are the rest of the address as they stand, but for the lane's copy.
template <int WINDOW, u32 AT>
__device__ __forceinline__ u32 look_up_at_7(u32 bits, int lane) { return load_shared_at<AT>(masked_or(bits, ((1u << WINDOW) - 1) << 7, 4 * lane)); }

// Where dynamic shared memory begins if there is no static one: what compilers write into the code. `Query::load` stops
// the kernel if it is not so.
#if __CUDA_ARCH__ >= 900
#define DYNAMIC_AT 1024
#else
#define DYNAMIC_AT 0
#endif

// What lane l adds to a window's place: the address of its copy, as a float. In a cluster the top byte of an
// address names the block, which a float has no room for: these kernels are launched without.
template <int COPIES>
__device__ __forceinline__ float copy_address(const u32* table, int lane) {
    return bits_float(shared_address(table) + 4 * (lane & (COPIES - 1)));
}

// 32 bits (of which COUNT count) of a token's run from bit `at` on. Its run of LENGTH bits begins at bit `from` of
// this lane's words; where it ends, that of the next lane goes on, whose first bits are `next`.
template <int LENGTH, int COUNT = 24>
__device__ __forceinline__ u32 bits_at(const u32* words, int from, int at, u32 next) {
    const int k = (from + at) >> 5, shift = (from + at) & 31, have = LENGTH - at;
    if (have == 16 && shift % 16 == 0) return __byte_perm(words[k], next, shift ? 0x5432 : 0x5410);
    u32 x = shift == 0 ? words[k] : shift + (have < COUNT ? have : COUNT) <= 32 ? words[k] >> shift : __funnelshift_r(words[k], words[k + 1], shift);
    if (have < COUNT) x = (x & ((1u << have) - 1)) | next << have;
    return x;
}

// One side of a page as the lanes of a warp hold it; `trellis_layout.py` has the picture.
template <int DIM, int BITS, int STATE_BITS, bool IS_PAIR, int PARTS>
struct Runs {
    static constexpr int DIMS = DIM / PARTS;                               // coordinates of a run: one token, one lane
    static constexpr int LENGTH = DIMS * BITS;                             // bits
    static constexpr int BITS_OF_CODE = BITS;
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

// Bits of run r of a block's words and of what it goes on with, GRAIN apart.
template <class R>
__device__ __forceinline__ void split_run(const u32* words, int r, int neighbour, u32 (&bits)[R::LENGTH / R::GRAIN + 1]) {
    const u32 next = __shfl_sync(FULL, R::head(words, r), neighbour);
#pragma unroll
    for (int at = 0; at < R::LENGTH; at += R::GRAIN) bits[at / R::GRAIN] = bits_at<R::LENGTH>(words, r * R::LENGTH, at, next);
}

// The entry of dimension d, a constant, of a run so taken apart.
template <class R, int COPIES>
__device__ __forceinline__ u32 look_up(const u32 (&bits)[R::LENGTH / R::GRAIN + 1], int d, float copy) {
    return look_up<R::WINDOW, COPIES>(bits[d * R::BITS_OF_CODE / R::GRAIN], d * R::BITS_OF_CODE % R::GRAIN, copy);
}
