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
//                (`Targets`), at most MOST; a multiple of K. Where a target is beyond most levels nearly all of them
//                are MOST away: it must be far more than a good path costs, or a path gives the target up
//     sums       less the least of them, as of this step or the one before; at most CEILING. Where MOST is small none
//                ever comes so far: they do not exceed (steps to get from any state to any other + 2) * MOST

#define STATES (1 << BITS_OF_STATE)
#define CHOICES (1 << BITS)
#define GROUPS (STATES / CHOICES)
#define LEVELS (1 << INDEX_BITS)
#define SEAM_STEPS 64
#define LOW ((CHOICES - 1) * 0x10001u)
#define CROSSING ((BITS_OF_STATE - 1 + BITS) / BITS)  // steps from any state to any other
#define CEILING (65536 - CHOICES - MOST)  // a distance more, and a decision, are still below 2^16
#define IS_HELD ((CROSSING + 2) * MOST > CEILING + MOST)  // sums to CEILING
#define UNREACHABLE (IS_HELD ? CEILING : CROSSING * MOST + 256)
#define UNIT (UNIT_SIXTEENTHS / 16.0f)
#define OUTERMOST 127.0f  // level
#define SHRINK sqrtf(UNIT / MOST)  // of targets and levels
static_assert(MOST / CHOICES < 2048, "of halves below 2^-13 the bits are the number");
static_assert(CEILING % CHOICES == 0 && (IS_HELD ? CEILING >= MOST : UNREACHABLE + CROSSING * MOST <= CEILING + MOST), "sums have 16 bits");

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

__device__ __forceinline__ u32 held(u32 sums) { return IS_HELD ? least2(sums, CEILING * 0x10001u) : sums; }

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

__device__ __forceinline__ u32 least_halves(u32 a, u32 b) {
    u32 c;
    asm("min.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
__device__ __forceinline__ u32 most_halves(u32 a, u32 b) {
    u32 c;
    asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
__device__ __forceinline__ u32 twice_less_halves(u32 a, u32 b) {
    u32 c;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(c) : "r"(a), "r"(0x40004000u), "r"(b ^ 0x80008000u));
    return c;
}

// Two targets as distances are made of them, times SHRINK: within the levels, and as far beyond that twice the excess is
// added. (t - L)^2 less what is the same for all levels L is d (d + 2 o), d = inner - L, o = excess; both factors have
// one sign. An excess counts up to BEYOND, so that levels next to the outermost ones are still less than MOST away.
struct Targets {
    u32 inner, outer;
    __device__ __forceinline__ explicit Targets(u32 word) {
        inner = between(word, OUTERMOST);
        outer = twice_less_halves(between(word, OUTERMOST + BEYOND), inner);
    }
    __device__ __forceinline__ static u32 between(u32 word, float level) {
        const u32 most = float_half(level * SHRINK) * 0x10001u;
        return most_halves(least_halves(word, most), most ^ 0x80008000u);
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
