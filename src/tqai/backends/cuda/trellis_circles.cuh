// The best circles of 64 tokens through 64 states. A warp has PAIRS pairs of tokens (t and t + 32, in the halves of a
// word), and of every pair each of four lanes makes a quarter of the new states:
//
//     lane    PAIRS quarter + pair
//     sums    [2][PAIRS][ROW] in shared memory: a step reads one half and writes the other. A row is
//
//     | 16 of quarter 0 | quarter 1 | quarter 2 | quarter 3 | least of each quarter |      words
//
// (All 64 sums of a pair in registers of one lane would save the exchange; but with the new ones and distances they are
// more than 255, and few pages would take as long as hundreds, each step being a thousand instructions of one warp.)
//
// A state's quarter and its place there are sums (exclusive or) of its bits, such that
//   - no distance is made twice: the windows of a quarter's states have a quarter of all levels (`has_level`);
//   - four neighbouring words are read together. With 4 bits every lane reads all sums, those of group p being the
//     words 4 (q ^ p) .. + 3 of each quarter q; else those that quarter q reads are the words 4 q .. + 3 of each.
//
// What a step decided is four words for each lane, four states each, in the order of their places. State i of a word has
//
//     bits 4 .. 7 of a byte if i & 2, else 0 .. 3;    byte 2 (i & 1) + half
//
// They go to memory and come back on the way back.

#define QUARTERS 4
#define PAIRS (WARP_TOKENS / 2)
#define OWN (STATES / QUARTERS)
#define ROW (STATES + QUARTERS)
#define TILE_STEPS 8
#define TILE_WORDS (2 * PAIRS * ROW)  // of sums; or of decisions, on the way back
#define STEP_BYTES (WARPS * 32 * 16)
static_assert(WARPS == 4 && D % TILE_STEPS == 0 && TILE_WORDS >= TILE_STEPS * 32 * 4, "a lane for every quarter of a pair; whole tiles");

#if CODE_BITS == 4
__device__ __forceinline__ int quarter_of(int state) { return (state >> 4 ^ state) & 3; }
__device__ __forceinline__ int place_of(int state) { return (state & 3) << 2 | (state >> 2 & 3); }
__device__ __forceinline__ int first_of(int quarter) { return quarter << 4; }
__device__ __forceinline__ int state_at(int place) { return (place >> 2) * 17 | (place & 3) << 2; }
#elif CODE_BITS == 3
__device__ __forceinline__ int quarter_of(int state) { return state & 3; }
__device__ __forceinline__ int place_of(int state) { return (state >> 3 & 3) << 2 | (state >> 2 & 1) << 1 | state >> 5; }
__device__ __forceinline__ int first_of(int quarter) { return quarter; }
__device__ __forceinline__ int state_at(int place) { return (place >> 2) << 3 | (place & 2) << 1 | (place & 1) << 5; }
#elif CODE_BITS == 2
__device__ __forceinline__ int quarter_of(int state) { return ((state >> 1 ^ state >> 2) & 1) | (state >> 2 & 2); }
__device__ __forceinline__ int place_of(int state) { return quarter_of(state >> 2) << 2 | (state & 3); }
__device__ __forceinline__ int first_of(int quarter) { return (quarter & 1) * 4 | (quarter >> 1) * 24; }
__device__ __forceinline__ int state_at(int place) { return (place >> 2) << 4 | (place & 2) << 1 | (place & 3); }
#else
__device__ __forceinline__ int quarter_of(int state) { return (state & 1) | (state >> 1 & 2); }
__device__ __forceinline__ int place_of(int state) { return quarter_of(state >> 1) << 2 | state >> 4; }
__device__ __forceinline__ int first_of(int quarter) { return (quarter & 1) | (quarter & 2) << 1; }
__device__ __forceinline__ int state_at(int place) { return (place & 3) << 4 | (place >> 2 & 1) << 1 | (place >> 3) << 3; }
#endif
// `state_at` is of quarter 0. Those of another are that ^ first_of(quarter), and so are their levels' indices.

// Whether a window of quarter 0 has level m.
__device__ __forceinline__ bool has_level(int m) { return ((__popc(m & APART0) | __popc(m & APART1)) & 1) == 0; }

struct Quarter {
    u32* sums;          // of its pair
    u32 less[LEVELS];   // negative levels of its windows, in the order of quarter 0
    u32 tags[CHOICES];  // low bits of its states, likewise
    int quarter, pair;  // pair: of the block

    __device__ __forceinline__ Quarter(const TrellisParams& p, const Lane& m) {
        quarter = m.lane / PAIRS;
        pair = m.warp * PAIRS + m.lane % PAIRS;
        sums = m.tile + m.lane % PAIRS * ROW;
        const int first = first_of(quarter), moved = index_of(first * CHOICES);
#pragma unroll
        for (int i = 0; i < LEVELS; ++i)
            if (has_level(i)) less[i] = p.levels[i ^ moved];
#pragma unroll
        for (int k = 0; k < CHOICES; ++k) tags[k] = (u32)((k ^ first) & (CHOICES - 1)) * 0x10001u;
    }

    // One step from the sums of half `odd` to the other; the decisions go to `out` if it is not null. The least of the
    // sums is taken off one step later, when every lane knows it.
    __device__ __forceinline__ void step(const Targets& t, int odd, uint4* out) const {
        const u32* from = sums + odd * (PAIRS * ROW);
        u32* to = sums + (odd ^ 1) * (PAIRS * ROW);
        u32 distance[LEVELS], old[16], word[4], least = 0xffffffffu;
#pragma unroll
        for (int i = 0; i < LEVELS; ++i)
            if (has_level(i)) distance[i] = t.distances(less[i]);
        const uint4 of_quarters = *(const uint4*)(from + STATES);
        const u32 settled = least2(of_quarters.x, least2(of_quarters.y, least2(of_quarters.z, of_quarters.w)));
#pragma unroll
        for (int v = 0; v < 4; ++v) {
#pragma unroll
            for (int q = 0; q < QUARTERS; ++q) {
                if (BITS < 4 && v > 0) continue;
                const uint4 four = *(const uint4*)(from + 16 * q + 4 * (BITS < 4 ? quarter : q ^ v));
                old[4 * q] = four.x;
                old[4 * q + 1] = four.y;
                old[4 * q + 2] = four.z;
                old[4 * q + 3] = four.w;
            }
            u32 best[4], fresh[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int state = state_at(4 * v + i);
#pragma unroll
                for (int k = 0; k < CHOICES; ++k) {
                    const int window = state * CHOICES + k, before = window & (STATES - 1);
                    const u32 sum = old[4 * quarter_of(before) + place_of(before) % 4], far = distance[index_of(window)];
                    best[i] = k == 0 ? sum + far : least2(add2(sum, far), best[i]);
                }
                fresh[i] = (held(best[i] - settled) & ~LOW) | tags[state & (CHOICES - 1)];
                least = least2(least, fresh[i]);
            }
            ((uint4*)(to + OWN * quarter))[v] = make_uint4(fresh[0], fresh[1], fresh[2], fresh[3]);
            word[v] = (__byte_perm(best[0], best[1], 0x6420) & 0x0f0f0f0fu) | (__byte_perm(best[2], best[3], 0x6420) << 4 & 0xf0f0f0f0u);
        }
        to[STATES + quarter] = least & ~LOW;
        if (out) *out = make_uint4(word[0], word[1], word[2], word[3]);
        __syncwarp();
    }

    // Sums before the first step: alike, or those of circles through `state`, of two tokens.
    __device__ __forceinline__ void begin(bool circle, const int (&state)[2]) const {
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const int its = state_at(i) ^ first_of(quarter);
            u32 start = UNREACHABLE * 0x10001u;
            if (state[0] == its) start &= 0xffff0000u;
            if (state[1] == its) start &= 0x0000ffffu;
            sums[OWN * quarter + i] = (circle ? start & ~LOW : 0) | tags[state_at(i) & (CHOICES - 1)];
        }
        sums[STATES + quarter] = 0;
        __syncwarp();
    }

    // The state of the least sum, of two tokens.
    __device__ __forceinline__ void best_states(int (&state)[2]) const {
        u32 best[2] = {0xffffffffu, 0xffffffffu};
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            const u32 sum = sums[OWN * quarter + i] & ~LOW, its = state_at(i) ^ first_of(quarter);
            best[0] = min(best[0], (sum & 0xffff) << 8 | its);
            best[1] = min(best[1], sum >> 16 << 8 | its);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int o = PAIRS; o < 32; o *= 2) best[h] = min(best[h], __float_as_uint(__shfl_xor_sync(FULL, bits_float(best[h]), o)));
            state[h] = best[h] & 0xff;
        }
    }
};

// From `state` after step `last` back to the one before step 0 of the decisions at `from`, one token by each lane; codes
// and sums for the scale if `final`.
__device__ __forceinline__ int way_back(const TrellisParams& p, const Lane& m, const uint4* from, int last, bool final, int state, float& product, float& square) {
    uint4 coming[TILE_STEPS];
    auto load = [&](int tile) {
#pragma unroll
        for (int i = 0; i < TILE_STEPS; ++i) coming[i] = from[(tile * TILE_STEPS + i) * (WARPS * 32) + m.lane];
    };
    int tile = last / TILE_STEPS;
    load(tile);
#pragma unroll 1
    for (; tile >= 0; --tile) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < TILE_STEPS; ++i) ((uint4*)m.tile)[i * 32 + m.lane] = coming[i];
        __syncwarp();
        if (tile > 0) load(tile - 1);
#pragma unroll
        for (int i = TILE_STEPS - 1; i >= 0; --i) {
            const int place = place_of(state);
            const u32 word = m.tile[(i * 32 + quarter_of(state) * PAIRS + m.lane % PAIRS) * 4 + place / 4];
            const u32 k = word >> ((place & 1) * 16 + (place & 2) * 2 + m.half() * 8) & (CHOICES - 1);
            const int window = state * CHOICES + k;
            state = window & (STATES - 1);
            if (final && m.lane < WARP_TOKENS) {
                u16* at = m.half_at(tile * TILE_STEPS + i, m.token());
                const float target = half_float(*at), level = __ldg(p.window_levels + window);
                product = fmaf(target, level, product);
                square = fmaf(level, level, square);
                *at = (u16)k;
            }
        }
    }
    __syncwarp();
    return state;
}

// Codes in place of the targets, and what the scale of the lane's token is made of.
__device__ __forceinline__ void take_circles(const TrellisParams& p, const Lane& m, uint4* decisions, float& product, float& square) {
    const Quarter mine(p, m);
    uint4* kept = decisions + m.warp * 32;
    int state[2] = {0, 0};
    // First around the seam for the state there, then the circle through it.
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
        mine.begin(pass, state);
        const int steps = pass ? D : 2 * SEAM_STEPS, kept_from = pass ? 0 : SEAM_STEPS;
        int d = pass ? 0 : (D - SEAM_STEPS % D) % D;
#pragma unroll 1
        for (int i = 0; i < steps; i += 2) {
            uint4* out = i >= kept_from ? kept + (i - kept_from) * (WARPS * 32) + m.lane : 0;
            mine.step(Targets(m.target_at(d, mine.pair)), 0, out);
            // the number of dimensions is even
            mine.step(Targets(m.target_at(d + 1, mine.pair)), 1, out ? out + WARPS * 32 : 0);
            d = d + 2 == D ? 0 : d + 2;
        }
        if (pass == 0) mine.best_states(state);
        const int seam = way_back(p, m, kept, (pass ? D : SEAM_STEPS) - 1, pass == 1, m.half() ? state[1] : state[0], product, square);
#pragma unroll
        for (int h = 0; h < 2; ++h) state[h] = (int)__shfl_sync(FULL, (u32)seam, h * PAIRS + m.lane % PAIRS);
    }
}
