// What `encode.cu` and `decode.cu` are told. One block per page, KV head and side (0 keys, 1 values).

#define CODE_THREADS 256
#define CODE_WARPS 8
#define BYTE_PITCH 68

struct Side {
    const void* in;       // encode: vectors
    void* out;            // decode: vectors [pages * heads, 64, D]
    const float* plan;    // rotation
    const float* levels;  // [2^bits] centroids
    const float2* cells;  // encode: [buckets] of |y| / norm; see `quantize`
    i64 strides[3];       // page, head, token, in elements
    float bucket_scale;
    int buckets, least_squares;
};

struct CodeParams {
    u8* pages;
    Side side[2];
    int heads, out_dtype, back;  // back: decode into the original space, else the rotated
};
