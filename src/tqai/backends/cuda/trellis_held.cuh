// A page of trellis codes in the registers of a warp, or on its way there: not by way of shared memory, which is busy
// with look-ups. Values are asked for when the keys of their page are to be used, the next page's keys when those before
// have been: each has about half a page's time to come.
//
// A lane's words, as `trellis_layout.py` has the picture: blocks of N words per lane lie in planes of 16, then 8, then 4
// bytes for each of 32 lanes.

// Loads of what is read once: past the first-level cache, and the first to leave the second.
struct Stream {
    u64 policy;

    __device__ __forceinline__ Stream() { policy = read_once(); }
    // N words of a lane.
    template <int N>
    __device__ __forceinline__ void load(const u8* block, int lane, u32 (&w)[N + 1]) const {
#pragma unroll
        for (int k = 0; k + 4 <= N; k += 4) {
            const uint4 a = stream_four(block + k * 128 + lane * 16, policy);
            w[k] = a.x; w[k + 1] = a.y; w[k + 2] = a.z; w[k + 3] = a.w;
        }
        constexpr int K = N & ~3;
        if constexpr (N & 2) {
            const uint2 a = stream_two(block + K * 128 + lane * 8, policy);
            w[K] = a.x; w[K + 1] = a.y;
        }
        if constexpr (N & 1) w[N - 1] = stream_one(block + (N - 1) * 128 + lane * 4, policy);
        w[N] = 0;  // what follows the last word is never among the bits that count
    }
};

struct Held {
    static constexpr int KEY_BLOCKS = 8 / Keys::BLOCK, VALUE_BLOCKS = 16 / Values::BLOCK;
    static constexpr int BLOCKS_IN_TURN = KEY_BLOCKS > VALUE_BLOCKS ? KEY_BLOCKS / VALUE_BLOCKS : 1;
    static constexpr int LAST_KEYS = PARTSK ? VALUE_BLOCKS : 0;  // after so many blocks of values all of the next keys are asked for
    u32 keys[KEY_BLOCKS][Keys::WORDS + 1], values[VALUE_BLOCKS][Values::WORDS + 1];
    uint4 key_scales, value_scales;  // of tokens 8 g .. 8 g + 7
    Stream stream;

    __device__ __forceinline__ void load_keys(const u8* page, int block, int lane) { stream.load<Keys::WORDS>(page + block * (Keys::WORDS * 128), lane, keys[block]); }
    __device__ __forceinline__ void load_keys(const u8* page, int lane) {
#pragma unroll
        for (int b = 0; b < KEY_BLOCKS; ++b) load_keys(page, b, lane);
    }
    // Of the next page, when `done` of this one's VALUE_BLOCKS blocks of values have been used: all at once before any, or, of
    // 4 bits, which want registers for constants too, one block for another.
    __device__ __forceinline__ void load_next_keys(const u8* page, int done, int lane) {
#pragma unroll
        for (int b = 0; b < KEY_BLOCKS; ++b)
            if (PARTSK ? done > 0 && b / BLOCKS_IN_TURN == done - 1 : done == 0) load_keys(page, b, lane);
    }
    // And all scales, which are wanted after the keys.
    __device__ __forceinline__ void load_values(const u8* page, int lane) {
#pragma unroll
        for (int b = 0; b < VALUE_BLOCKS; ++b) stream.load<Values::WORDS>(page + V_CODES_AT + b * (Values::WORDS * 128), lane, values[b]);
        key_scales = stream_four(page + K_SCALES_AT + (lane >> 2) * 16, stream.policy);
        value_scales = stream_four(page + V_SCALES_AT + (lane >> 2) * 16, stream.policy);
    }
};
