// The best circles of 64 tokens through 64 states by one warp: two for each lane (l and l + 32), with the path sums
// in 64 registers. What the steps decided goes to memory, 8 to 64 bytes per lane and step, and comes back on the
// way back.
//
// COVER: so many r have all levels of a group of states, 0 where a level is in several.

#define DECISION_BITS (BITS == 3 ? 4 : BITS)
#define PER_WORD (16 / DECISION_BITS)   // decisions of one token in a word
#define DECISION_WORDS (STATES / PER_WORD)  // of decisions, of each lane and step
#define TILE_STEPS 4
#define TILE_WORDS (TILE_STEPS * DECISION_WORDS * 32)  // [TILE_STEPS][DECISION_WORDS / 4][32][4]
#define STEP_BYTES (DECISION_WORDS * 128)
#define MORE_WORDS 0

// One step; the decisions go to `out` if it is not null. With `settle` the least sum is taken off.
template <bool SETTLE>
__device__ __forceinline__ void step(const u32 (&from)[STATES], u32 (&to)[STATES], const Targets& t, const TrellisParams& p, uint4* out) {
    u32 least = 0xffffffffu;
    u32 word[4] = {0, 0, 0, 0};
    // Where every level belongs to one group of states its distance is made there, else all of them first.
    u32 distance[LEVELS];
    if (COVER == 0) {
#pragma unroll
        for (int m = 0; m < LEVELS; ++m) distance[m] = t.distances(p.levels[m]);
    }
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        if (COVER > 0) {
#pragma unroll
            for (int r = 0; r < COVER; ++r)
#pragma unroll
                for (int k = 0; k < CHOICES; ++k) {
                    const int m = index_of((GROUPS * r + group) * CHOICES + k);
                    distance[m] = t.distances(p.levels[m]);
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

// Codes in place of the targets, and what the scales of this lane's tokens are made of.
__device__ __forceinline__ void take_circles(const TrellisParams& p, const Lane& m, uint4* decisions, float (&product)[2], float (&square)[2]) {
    int state[2] = {0, 0};
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
            step<BITS <= 2>(sums, next, Targets(m.target_at(d, m.lane)), p, out);
            // the number of dimensions is even
            step<true>(next, sums, Targets(m.target_at(d + 1, m.lane)), p, out ? out + DECISION_WORDS / 4 * 32 : 0);
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
}
