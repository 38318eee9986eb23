// The best circles of 64 tokens through 256 states by four warps: of two tokens (t and t + 32) at a time by each, with
// the path sums in its shared memory, eight new ones for each lane. Two of each, so that a step need only wait once:
//
//     sums        [2][STATES]    as states are numbered: the K that a group comes from lie side by side
//     distance    [2][LEVELS]    to the target of a step
//
// The j-th new state of lane l is P r + p. A lane has PER_LANE groups p; or, where there are fewer groups than
// lanes, SHARE lanes have one together:
//
//     P >= 32    p = l + 32 (j / K)    r = j % K
//     P < 32     p = l % P             r = 8 (l / P) + j
//
// and its decisions of a step are two words, 4 bits each: of states j = 0 .. 3, then 4 .. 7, token t in the low half.

#define PER_LANE (GROUPS < 32 ? 1 : GROUPS / 32)
#define NEW 8
#define IN_GROUP (NEW / PER_LANE)  // new states that a lane has of a group
#define TILE_STEPS 16
#define KEPT_WORDS (TILE_STEPS * 64)  // decisions on the way back
#define TILE_WORDS (KEPT_WORDS + 2 * STATES + 2 * LEVELS)
#define STEP_BYTES (WARPS * 256)
static_assert(STATES == 256 && IN_GROUP <= CHOICES, "eight new states for each lane");

__device__ __forceinline__ int group_of(int lane, int j) { return GROUPS < 32 ? lane % GROUPS : lane + 32 * (j / IN_GROUP); }
__device__ __forceinline__ int row_of(int lane, int j) { return GROUPS < 32 ? NEW * (lane / GROUPS) + j : j % IN_GROUP; }

__device__ __forceinline__ void put_distances(const TrellisParams& p, const Lane& m, u32* to, u32 target) {
    const Targets t(target);
#pragma unroll
    for (int i = 0; i < LEVELS / 32; ++i) to[m.lane + 32 * i] = t.distances(p.levels[m.lane + 32 * i]);
}

__device__ __forceinline__ u32 least_of_warp(u32 x) {
#pragma unroll 1
    for (int o = 1; o < 32; o *= 2) x = least2(x, __float_as_uint(__shfl_xor_sync(FULL, bits_float(x), o)));
    return x;
}

// One way around from dimension `from` on: `steps` steps, of which the decisions from step `kept_from` on are kept.
// Sums begin in sums[0] and end in the registers `best`, where their low bits are those of the last decision.
__device__ __forceinline__ void go_around(const TrellisParams& p, const Lane& m, int pair, int from, int steps, int kept_from, uint2* decisions, u32 (&best)[NEW]) {
    u32 *sums = m.tile + KEPT_WORDS, *distance = sums + 2 * STATES;
    // where this lane's windows have their distances
    int index[NEW][CHOICES];
#pragma unroll
    for (int j = 0; j < NEW; ++j)
#pragma unroll
        for (int k = 0; k < CHOICES; ++k)
            index[j][k] = index_of(GROUPS * CHOICES * (GROUPS < 32 ? j : j % IN_GROUP) + k + (j / IN_GROUP) * 32 * CHOICES * (GROUPS < 32 ? 0 : 1)) ^
                          index_of((GROUPS < 32 ? GROUPS * NEW * (m.lane / GROUPS) + m.lane % GROUPS : m.lane) * CHOICES);
    int d = from;
    put_distances(p, m, distance, m.target_at(d, pair));
    __syncwarp();
    auto step = [&](int i, int odd) {
        const u32 *old = sums + odd * STATES, *far = distance + odd * LEVELS;
        u32 least = 0xffffffffu, word[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < NEW; ++j) {
            const u32* group = old + group_of(m.lane, j) * CHOICES;
            best[j] = add2(group[0], far[index[j][0]]);
#pragma unroll
            for (int k = 1; k < CHOICES; ++k) best[j] = least2(add2(group[k], far[index[j][k]]), best[j]);
            word[j / 4] |= (best[j] & LOW) << (4 * (j % 4));
            least = least2(least, best[j]);
        }
        least = least_of_warp(least) & ~LOW;
        d = d + 1 == D ? 0 : d + 1;
        u32* fresh = sums + (odd ^ 1) * STATES;
#pragma unroll
        for (int j = 0; j < NEW; ++j) {
            best[j] = held(best[j] - least);
            const int state = GROUPS * row_of(m.lane, j) + group_of(m.lane, j);
            fresh[state] = (best[j] & ~LOW) | (state & (CHOICES - 1)) * 0x10001u;
        }
        put_distances(p, m, distance + (odd ^ 1) * LEVELS, m.target_at(d, pair));
        if (i >= kept_from) decisions[(i - kept_from) * 32 + m.lane] = make_uint2(word[0], word[1]);
        __syncwarp();
    };
#pragma unroll 1
    for (int i = 0; i < steps; i += 2) {  // an even number
        step(i, 0);
        step(i + 1, 1);
    }
}

// From the states after step `last` back to those before step 0; codes and sums for the scale if `final`. The first
// lane goes, the others fetch.
__device__ __forceinline__ void way_back(const TrellisParams& p, const Lane& m, int pair, const uint2* from, int last, bool final, int (&state)[2], float (&product)[2], float (&square)[2]) {
#pragma unroll 1
    for (int tile = last / TILE_STEPS; tile >= 0; --tile) {
        __syncwarp();
#pragma unroll 4
        for (int i = 0; i < TILE_STEPS; ++i)
            if (tile * TILE_STEPS + i <= last) ((uint2*)m.tile)[i * 32 + m.lane] = from[(tile * TILE_STEPS + i) * 32 + m.lane];
        __syncwarp();
        if (m.lane == 0) {
#pragma unroll 1
            for (int i = min((u32)last - tile * TILE_STEPS, (u32)TILE_STEPS - 1); i >= 0; --i) {
                u32* at = &m.target_at(tile * TILE_STEPS + i, pair);
                float t[2];
                if (final) two_targets(*at, t[0], t[1]);
                u32 codes = 0;
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int group = state[h] % GROUPS, row = state[h] / GROUPS;
                    const int lane = GROUPS < 32 ? group + GROUPS * (row / NEW) : group % 32;
                    const int j = GROUPS < 32 ? row % NEW : group / 32 * IN_GROUP + row;
                    const u32 k = m.tile[(i * 32 + lane) * 2 + j / 4] >> (16 * h + 4 * (j % 4)) & (CHOICES - 1);
                    const int window = state[h] * CHOICES + k;
                    state[h] = window & (STATES - 1);
                    if (final) {
                        const float level = __ldg(p.window_levels + window);
                        product[h] = fmaf(t[h], level, product[h]);
                        square[h] = fmaf(level, level, square[h]);
                        codes |= k << (16 * h);
                    }
                }
                if (final) *at = codes;
            }
        }
    }
    __syncwarp();
}

// Codes in place of the targets, and what the scale of the lane's token is made of.
__device__ __forceinline__ void take_circles(const TrellisParams& p, const Lane& m, uint4* kept, float& product, float& square) {
    constexpr int STEPS = D > SEAM_STEPS ? D : SEAM_STEPS;
    uint2* decisions = (uint2*)kept + m.warp * (STEPS * 32);
    u32* sums = m.tile + KEPT_WORDS;
#pragma unroll 1
    for (int i = 0; i < WARP_TOKENS / 2; ++i) {
        const int pair = m.warp * (WARP_TOKENS / 2) + i;
        int state[2] = {0, 0};
        float its_product[2], its_square[2];
        // First around the seam for the state there, then the circle through it.
#pragma unroll 1
        for (int pass = 0; pass < 2; ++pass) {
#pragma unroll
            for (int j = 0; j < NEW; ++j) {
                const int its = m.lane + 32 * j;
                u32 start = UNREACHABLE * 0x10001u;
                if (state[0] == its) start &= 0xffff0000u;
                if (state[1] == its) start &= 0x0000ffffu;
                sums[its] = (pass ? start & ~LOW : 0) | (its & (CHOICES - 1)) * 0x10001u;
            }
            u32 best[NEW];
            const int steps = pass ? D : 2 * SEAM_STEPS, from = pass ? 0 : (D - SEAM_STEPS % D) % D;
            go_around(p, m, pair, from, steps, pass ? 0 : SEAM_STEPS, decisions, best);
            if (pass == 0) {
                u32 best0 = 0xffffffffu, best1 = 0xffffffffu;
#pragma unroll
                for (int j = 0; j < NEW; ++j) {
                    const u32 its = GROUPS * row_of(m.lane, j) + group_of(m.lane, j);
                    best0 = min(best0, (best[j] & 0xffff & ~LOW) << 8 | its);
                    best1 = min(best1, (best[j] >> 16 & ~LOW) << 8 | its);
                }
#pragma unroll 1
                for (int o = 1; o < 32; o *= 2) {
                    best0 = min(best0, __float_as_uint(__shfl_xor_sync(FULL, bits_float(best0), o)));
                    best1 = min(best1, __float_as_uint(__shfl_xor_sync(FULL, bits_float(best1), o)));
                }
                state[0] = best0 & 0xff;
                state[1] = best1 & 0xff;
            }
            its_product[0] = its_product[1] = its_square[0] = its_square[1] = 0.0f;
            way_back(p, m, pair, decisions, (pass ? D : SEAM_STEPS) - 1, pass == 1, state, its_product, its_square);
#pragma unroll
            for (int h = 0; h < 2; ++h) state[h] = (int)__shfl_sync(FULL, (u32)state[h], 0);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float a = bits_float(__shfl_sync(FULL, __float_as_uint(its_product[h]), 0));
            const float b = bits_float(__shfl_sync(FULL, __float_as_uint(its_square[h]), 0));
            if (m.token() == pair + 32 * h) {
                product = a;
                square = b;
            }
        }
    }
}
