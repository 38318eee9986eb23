// Path sums and distances of the Viterbi algorithm, of two tokens at a time in the halves of 32-bit words.
//
// With K = 2^BITS and P = STATES / K a step is
//
//     sum'[P r + p]  =  min over k of  sum[K p + k] + distance[index of window (P r + p) K + k]
//
// All sums are whole numbers of 16 bits. The low BITS bits of sum[K p + k] are k itself, those of distances are
// 0: the winner brings its k along, and between equals the lowest wins.
//
//     distance   of target and level, squared, UNIT to the square of a level, less what all levels have in common
//                (`Targets`), at most MOST; a multiple of K
//     sums       less the least of them, taken off after every step, or after every second one; they never
//                exceed (steps to get from any state to any other + 2) * MOST < 2^16

#define STATES (1 << BITS_OF_STATE)
#define CHOICES (1 << BITS)
#define GROUPS (STATES / CHOICES)
#define LEVELS (1 << INDEX_BITS)
#define SEAM_STEPS 64
#define LOW ((CHOICES - 1) * 0x10001u)
#define CROSSING ((BITS_OF_STATE - 1 + BITS) / BITS)  // steps from any state to any other
#define UNREACHABLE (CROSSING * MOST + 256)
#define UNIT (UNIT_EIGHTHS / 8.0f)
#define OUTERMOST 127.0f  // level
static_assert(MOST / CHOICES < 2048, "of halves below 2^-13 the bits are the number");
static_assert(UNREACHABLE + CROSSING * MOST < 65536 - CHOICES && (CROSSING + 2) * MOST < 65536, "sums have 16 bits");

__device__ __forceinline__ int bit_of(int window, int row, int j) { return (__popc(window & row) & 1) << j; }
__device__ __forceinline__ int index_of(int window) {
    return bit_of(window, ROW0, 0) | bit_of(window, ROW1, 1) | bit_of(window, ROW2, 2) | bit_of(window, ROW3, 3) |
           bit_of(window, ROW4, 4) | bit_of(window, ROW5, 5) | bit_of(window, ROW6, 6);
}

__device__ __forceinline__ u32 least2(u32 a, u32 b) {
    u32 c;
#if __CUDA_ARCH__ >= 900
    asm("min.u16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#else
    c = __vminu2(a, b);
#endif
    return c;
}
__device__ __forceinline__ u32 add2(u32 a, u32 b) {
    u32 c;
#if __CUDA_ARCH__ >= 900
    asm("add.u16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
#else
    c = a + b;  // no sum exceeds 16 bits
#endif
    return c;
}

// Two numbers of float16 at a time; denormal ones count.
__device__ __forceinline__ u32 add_halves(u32 a, u32 b) {
    u32 c;
    asm("add.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
__device__ __forceinline__ u32 times_halves(u32 a, u32 b) {
    u32 c;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
__device__ __forceinline__ u32 times_halves_below_one(u32 a, u32 b) {
    u32 c;
    asm("mul.sat.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

// Two targets as distances are made of them, times sqrt(UNIT / MOST): within the levels, and as far beyond that
// twice the excess is added. (t - L)^2 less what is the same for all levels L is d (d + 2 o), d = inner - L,
// o = excess; both factors have one sign.
struct Targets {
    u32 inner, outer;
    __device__ __forceinline__ explicit Targets(u32 word) {
        inner = outer = 0;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float t = half_float((u16)(word >> (16 * h))), shrink = sqrtf(UNIT / MOST);
            const float limit = fminf(fmaxf(t, -OUTERMOST), OUTERMOST);
            inner |= (u32)float_half(limit * shrink) << (16 * h);
            outer |= (u32)float_half((t + t - limit) * shrink) << (16 * h);
        }
    }
    // To the level of which `less` is the negative.
    __device__ __forceinline__ u32 distances(u32 less) const {
        const u32 share = times_halves_below_one(add_halves(inner, less), add_halves(outer, less));
        // in 2^-24ths, of which a half's bits are the number
        return times_halves(share, (MOST / CHOICES) * 0x10001u) << BITS;
    }
};

__device__ __forceinline__ void two_targets(u32 word, float& t0, float& t1) {
    t0 = half_float((u16)word);
    t1 = half_float((u16)(word >> 16));
}

