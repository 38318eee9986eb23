// A table of levels out of global memory, every entry in COPIES copies; by the whole block. Each thread asks for its
// entries at once and early, and writes their rows late:
//
//     entry     tid, tid + THREADS, ...
//     row       COPIES / 4 times 16 bytes, begun at another place by each of the lanes that write together, so that eight
//               lanes have all banks
template <int ENTRIES, int COPIES>
struct OwnEntries {
    static constexpr int N = (ENTRIES + THREADS - 1) / THREADS, CHUNKS_OF_ROW = COPIES / 4;
    u32 entry[N];

    __device__ __forceinline__ void load(const u32* entries, int tid) {
#pragma unroll
        for (int i = 0; i < N; ++i) entry[i] = tid + i * THREADS < ENTRIES ? __ldg(entries + tid + i * THREADS) : 0;
    }
    __device__ __forceinline__ void keep(u32* table, int tid) const {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (tid + i * THREADS < ENTRIES) {
#pragma unroll
                for (int k = 0; k < CHUNKS_OF_ROW; ++k) {
                    const int chunk = (k + tid / (32 / COPIES)) & (CHUNKS_OF_ROW - 1);
                    *(uint4*)(table + (tid + i * THREADS) * COPIES + 4 * chunk) = make_uint4(entry[i], entry[i], entry[i], entry[i]);
                }
            }
    }
};

// None: codes in parts, or values that read the keys' table.
template <int ENTRIES>
struct OwnEntries<ENTRIES, 0> {
    __device__ __forceinline__ void load(const u32*, int) {}
    __device__ __forceinline__ void keep(u32*, int) const {}
};
