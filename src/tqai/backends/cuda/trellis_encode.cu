// Pages of trellis codes from vectors: rotate, the Viterbi algorithm of core/viterbi.py, scale, pack.
//
// A warp takes the 64 tokens of one side of a page, two for each lane (l and l + 32), which lie in the halves of
// 32-bit words. The path sums of the 64 states are 64 registers; with K = 2^BITS and P = 64 / K a step is
//
//     sum'[P r + p]  =  min over k of  sum[K p + k] + distance[index of window (P r + p) K + k]
//
// All sums are whole numbers of 16 bits. The low BITS bits of sum[K p + k] are k itself, those of distances are
// 0: the winner brings its k along, and between equals the lowest wins. What the steps decided goes to memory,
// 8 to 64 bytes per lane and step, and comes back on the way back.
//
//     distance   of target and level, squared, UNIT to the square of a level, less what all levels have in common
//                (`Target`), at most MOST; a multiple of K
//     sums       less the least of them, taken off after every step, or after every second one; they never
//                exceed (steps to get from any state to any other + 2) * MOST < 2^16
//
// Macros: HEAD_DIM, CODE_BITS, HADAMARD_ROUNDS (0: a matrix), DTYPE (of the vectors), INDEX_BITS of a level's index and
// ROW0 .. ROW6, the masks of the window that make it (core/trellis_code.py); COVER: so many r have all levels of
// a group, 0 where a level is in several. DK, DV, BK, BV of device.cuh are
// not used but wanted.

#include "device.cuh"
#include "codes.cuh"
#include "quantize.cuh"
#include "trellis_lookup.cuh"

constexpr int D = HEAD_DIM, BITS = CODE_BITS, ROUNDS = HADAMARD_ROUNDS;
#define STATES 64
#define CHOICES (1 << BITS)
#define GROUPS (STATES / CHOICES)
#define LEVELS (1 << INDEX_BITS)
#define SEAM_STEPS 64
#define LOW ((CHOICES - 1) * 0x10001u)
#define DECISION_BITS (BITS == 3 ? 4 : BITS)
#define PER_WORD (16 / DECISION_BITS)   // decisions of one token in a word
#define DECISION_WORDS (STATES / PER_WORD)  // of decisions, of each lane and step
#define CROSSING ((5 + BITS) / BITS)    // steps from any state to any other
#define MOST (CROSSING == 2 ? 16000 : CROSSING == 3 ? 10800 : 5400)
#define UNREACHABLE (CROSSING * MOST + 256)
#define UNIT (BITS == 4 ? 8.0f : BITS == 3 ? 5.0f : BITS == 2 ? 1.0f : 0.125f)
#define OUTERMOST 127.0f                // level
#define TILE_STEPS 4
#define TILE_WORDS (TILE_STEPS * DECISION_WORDS * 32)
static_assert(UNREACHABLE + CROSSING * MOST < 65536 - CHOICES && (CROSSING + 2) * MOST < 65536, "sums have 16 bits");

struct TrellisSide {
    const void* in;
    const float* plan;    // rotation
    i64 strides[3];       // page, head, token, in elements
    int codes_at, scales_at, values, least_squares;
};

struct TrellisParams {
    u8* pages;
    uint4* decisions;           // [blocks][steps][DECISION_WORDS / 4][32]
    const float* window_levels; // [CHOICES * STATES]
    i64 page_bytes;
    int heads, items, sides;    // items: pages * heads * sides
    float per_deviation;        // levels per coordinate of a unit vector
    TrellisSide side[2];
    float levels[LEVELS];       // times sqrt(UNIT / MOST)
};

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

// A target as distances are made of it, times sqrt(UNIT / MOST): within the levels, and as far beyond that twice
// the excess is added. (t - L)^2 less what is the same for all levels L is d (d + 2 o), d = inner - L, o = excess.
struct Target {
    float inner, outer;
    __device__ __forceinline__ explicit Target(float t) {
        const float limit = fminf(fmaxf(t, -OUTERMOST), OUTERMOST), shrink = sqrtf(UNIT / MOST);
        inner = limit * shrink;
        outer = (t + t - limit) * shrink;
    }
    __device__ __forceinline__ float distance(float level) const {
        // as a whole number in the low bits of a float beyond 2^23
        return fmaf(__saturatef(fabsf(inner - level)), __saturatef(fabsf(outer - level)) * (MOST / CHOICES), 8388608.0f);
    }
};

// Distances of two targets to one level.
__device__ __forceinline__ u32 distances(const Target& t0, const Target& t1, float level) {
    return __byte_perm(__float_as_uint(t0.distance(level)), __float_as_uint(t1.distance(level)), 0x5410) << BITS;
}

// One step; the decisions go to `out` if it is not null. With `settle` the least sum is taken off.
template <bool SETTLE>
__device__ __forceinline__ void step(const u32 (&from)[STATES], u32 (&to)[STATES], const Target& t0, const Target& t1, const TrellisParams& p, uint4* out) {
    u32 least = 0xffffffffu;
    u32 word[4] = {0, 0, 0, 0};
    // Where every level belongs to one group of states its distance is made there, else all of them first.
    u32 distance[LEVELS];
    if (COVER == 0) {
#pragma unroll
        for (int m = 0; m < LEVELS; ++m) distance[m] = distances(t0, t1, p.levels[m]);
    }
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        if (COVER > 0) {
#pragma unroll
            for (int r = 0; r < COVER; ++r)
#pragma unroll
                for (int k = 0; k < CHOICES; ++k) {
                    const int m = index_of((GROUPS * r + group) * CHOICES + k);
                    distance[m] = distances(t0, t1, p.levels[m]);
                }
        }
#pragma unroll
        for (int r = 0; r < CHOICES; ++r) {
            const int state = GROUPS * r + group;
            u32 best = add2(from[CHOICES * group], distance[index_of(state * CHOICES)]);
#pragma unroll
            for (int k = 1; k < CHOICES; ++k) best = least2(add2(from[CHOICES * group + k], distance[index_of(state * CHOICES + k)]), best);
            const int place = group * CHOICES + r, slot = place % PER_WORD;
            word[place / PER_WORD % 4] = (best & LOW) * (1u << (DECISION_BITS * slot)) + (slot ? word[place / PER_WORD % 4] : 0);
            if (place % (4 * PER_WORD) == 4 * PER_WORD - 1 && out) out[place / (4 * PER_WORD) * 32] = make_uint4(word[0], word[1], word[2], word[3]);
            to[state] = (best & ~LOW) | (state & (CHOICES - 1)) * 0x10001u;
            if (SETTLE) least = least2(least, best);
        }
    }
    if (SETTLE) {
        least &= ~LOW;
#pragma unroll
        for (int s = 0; s < STATES; ++s) to[s] -= least;
    }
}

struct Lane {
    u32* targets;  // [D][32], see `target_at`: two tokens' targets as float16, in levels; later their codes, one byte each
    u32* tile;     // [TILE_STEPS][DECISION_WORDS / 4][32][4]
    float* norms;  // [64]
    float* tops;   // [64] largest magnitude
    int lane;
    // Token l and l + 32 of dimension d; turned, so that lanes of different tokens or dimensions have other banks.
    __device__ __forceinline__ u32& target_at(int d, int l) const { return targets[d * 32 + ((l + d) & 31)]; }
};

// Targets of the 64 tokens.
__device__ __forceinline__ void make_targets(const TrellisParams& p, const TrellisSide& s, const Lane& m, i64 base) {
    constexpr int N = (D + 31) / 32;
    float coming[N];
    auto load = [&](int token) {
#pragma unroll
        for (int i = 0; i < N; ++i) coming[i] = D % 32 == 0 || m.lane + 32 * i < D ? load_one(s.in, base + token * s.strides[2] + m.lane + 32 * i) : 0.0f;
    };
    load(0);
#pragma unroll 1
    for (int token = 0; token < PAGE_TOKENS; ++token) {
        float v[N], top = 0.0f, norm = 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            v[i] = coming[i];
            top = max_nan(top, fabsf(v[i]));
        }
        if (token + 1 < PAGE_TOKENS) load(token + 1);
#pragma unroll
        for (int o = 1; o < 32; o *= 2) top = max_nan(top, __shfl_xor_sync(FULL, top, o));
        const bool usable = top < INF && top >= 1.17549435e-38f;
        const int exponent = exponent_of(top);
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = usable ? scaled_down(v[i], exponent) : 0.0f;
        rotate<D, ROUNDS, false>(v, (float*)m.tile, s.plan, m.lane);
#pragma unroll
        for (int i = 0; i < N; ++i) norm = fmaf(v[i], v[i], norm);
#pragma unroll
        for (int o = 1; o < 32; o *= 2) norm += __shfl_xor_sync(FULL, norm, o);
        norm = sqrtf(norm);
        const float up = norm > 0.0f ? p.per_deviation / norm : 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (D % 32 == 0 || m.lane + 32 * i < D) ((u16*)&m.target_at(m.lane + 32 * i, token & 31))[token >> 5] = float_half(v[i] * up);
        if (m.lane == 0) {
            m.norms[token] = norm;
            m.tops[token] = top;
        }
    }
    __syncwarp();
}

__device__ __forceinline__ void two_targets(u32 word, float& t0, float& t1) {
    t0 = half_float((u16)word);
    t1 = half_float((u16)(word >> 16));
}

// Where the decision on how `state` is reached lies: word and slot.
__device__ __forceinline__ u32 decision(const u32* tile, int step, int state, int half, int lane) {
    const int place = state % GROUPS * CHOICES + state / GROUPS, word = place / PER_WORD;
    const u32 w = tile[((step * (DECISION_WORDS / 4) + word / 4) * 32 + lane) * 4 + word % 4];
    return (w >> (16 * half + DECISION_BITS * (place % PER_WORD))) & (CHOICES - 1);
}

// From the states after step `last` back to those before step 0 of the decisions at `from`; codes and sums for
// the scale if `final`.
__device__ __forceinline__ void way_back(const TrellisParams& p, const Lane& m, const uint4* from, int last, bool final, int (&state)[2], float (&product)[2], float (&square)[2]) {
    constexpr int QUADS = TILE_STEPS * DECISION_WORDS / 4;
    uint4 coming[QUADS];
    auto load = [&](int tile) {
#pragma unroll
        for (int k = 0; k < QUADS; ++k) coming[k] = from[(tile * QUADS + k) * 32 + m.lane];
    };
    int tile = last / TILE_STEPS;
    load(tile);
#pragma unroll 1
    for (; tile >= 0; --tile) {
#pragma unroll
        for (int k = 0; k < QUADS; ++k) ((uint4*)m.tile)[k * 32 + m.lane] = coming[k];
        if (tile > 0) load(tile - 1);
#pragma unroll
        for (int i = TILE_STEPS - 1; i >= 0; --i) {
            u32 codes = 0;
            u32* at = &m.target_at(tile * TILE_STEPS + i, m.lane);
            float t[2];
            if (final) two_targets(*at, t[0], t[1]);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const u32 k = decision(m.tile, i, state[h], h, m.lane);
                const int window = state[h] * CHOICES + k;
                state[h] = window & (STATES - 1);
                if (final) {
                    const float level = __ldg(p.window_levels + window);
                    product[h] = fmaf(t[h], level, product[h]);
                    square[h] = fmaf(level, level, square[h]);
                    codes |= k << (8 * h);
                }
            }
            if (final) *at = codes;
        }
    }
}

template <bool VALUES>
__device__ __forceinline__ void pack_page(const Lane& m, u8* out) {
    using R = Runs<D, BITS, 6, false, VALUES ? 8 : 4>;
    const int g = m.lane >> 2, c = m.lane & 3, part = VALUES ? g : c;
    constexpr int QUADS = R::WORDS & ~3;
#pragma unroll 1
    for (int block = 0; block < R::TOKENS / R::BLOCK; ++block)
#pragma unroll 1
        for (int k = 0; k < R::WORDS; ++k) {
            u32 word = 0;
#pragma unroll 1
            for (int j = 32 * k / BITS; j * BITS < 32 * k + 32; ++j) {
                const int run = block * R::BLOCK + j / R::DIMS, d = part * R::DIMS + j % R::DIMS;
                const int token = VALUES ? run / 4 * 16 + 4 * c + run % 4 : 8 * g + run;
                const u32 code = (m.target_at(d, token & 31) >> (8 * (token >> 5))) & 0xff;
                const int shift = j * BITS - 32 * k;
                word |= shift >= 0 ? code << shift : code >> -shift;
            }
            const int at = k < QUADS ? (k & ~3) * 128 + m.lane * 16 + (k & 3) * 4
                         : (R::WORDS & 2) && k < QUADS + 2 ? QUADS * 128 + m.lane * 8 + (k - QUADS) * 4 : (R::WORDS - 1) * 128 + m.lane * 4;
            *(u32*)(out + block * (R::WORDS * 128) + at) = word;
        }
}

extern "C" __global__ void __launch_bounds__(32, 8) tqai_encode(const __grid_constant__ TrellisParams p) {
    extern __shared__ __align__(128) u8 smem[];
    Lane m;
    m.lane = threadIdx.x;
    m.targets = (u32*)smem;
    m.tile = m.targets + D * 32;
    m.norms = (float*)(m.tile + TILE_WORDS);
    m.tops = m.norms + 64;
    constexpr int STEPS = D > SEAM_STEPS ? D : SEAM_STEPS;
    uint4* decisions = p.decisions + (i64)blockIdx.x * (STEPS * DECISION_WORDS / 4 * 32);
#pragma unroll 1
    for (int item = blockIdx.x; item < p.items; item += gridDim.x) {
        const int at = item / p.sides, page = at / p.heads, head = at - page * p.heads;
        const TrellisSide& s = p.side[item - at * p.sides];
        make_targets(p, s, m, page * s.strides[0] + head * s.strides[1]);
        int state[2] = {0, 0};
        float product[2] = {0.0f, 0.0f}, square[2] = {0.0f, 0.0f};
        // First around the seam for the state there, then the circle through it.
#pragma unroll 1
        for (int pass = 0; pass < 2; ++pass) {
            u32 sums[STATES], next[STATES];
#pragma unroll
            for (int i = 0; i < STATES; ++i) {
                u32 start = UNREACHABLE * 0x10001u;
                if (state[0] == i) start &= 0xffff0000u;
                if (state[1] == i) start &= 0x0000ffffu;
                sums[i] = (pass ? start & ~LOW : 0) | (i & (CHOICES - 1)) * 0x10001u;
            }
            const int steps = pass ? D : 2 * SEAM_STEPS, kept_from = pass ? 0 : SEAM_STEPS;
            int d = pass ? 0 : (D - SEAM_STEPS % D) % D;
#pragma unroll 1
            for (int i = 0; i < steps; i += 2) {
                uint4* out = i >= kept_from ? decisions + (i - kept_from) * (DECISION_WORDS / 4 * 32) + m.lane : 0;
                float t0, t1;
                two_targets(m.target_at(d, m.lane), t0, t1);
                step<BITS <= 2>(sums, next, Target(t0), Target(t1), p, out);
                two_targets(m.target_at(d + 1, m.lane), t0, t1);  // the number of dimensions is even
                step<true>(next, sums, Target(t0), Target(t1), p, out ? out + DECISION_WORDS / 4 * 32 : 0);
                d = d + 2 == D ? 0 : d + 2;
            }
            if (pass == 0) {
                u32 best0 = 0xffffffffu, best1 = 0xffffffffu;
#pragma unroll
                for (int i = 0; i < STATES; ++i) {
                    best0 = min(best0, (sums[i] & 0xffff & ~LOW) << 8 | i);
                    best1 = min(best1, (sums[i] >> 16 & ~LOW) << 8 | i);
                }
                state[0] = best0 & 0xff;
                state[1] = best1 & 0xff;
            }
            way_back(p, m, decisions, (pass ? D : SEAM_STEPS) - 1, pass == 1, state, product, square);
        }
        u8* out = p.pages + at * p.page_bytes;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int token = m.lane + 32 * h;
            const float top = m.tops[token], norm = m.norms[token];
            const float scale = s.least_squares ? norm * (product[h] / square[h]) : norm;
            ((u16*)(out + s.scales_at))[token] = scale_bits(scale, exponent_of(top), top);
            if (!(top < INF && top >= 1.17549435e-38f)) {
                for (int k = 0; k < D; ++k) m.target_at(k, m.lane) &= h ? 0x00ffu : 0xff00u;
            }
        }
        __syncwarp();
        if (s.values) pack_page<true>(m, out + s.codes_at);
        else pack_page<false>(m, out + s.codes_at);
        __syncwarp();
    }
}
