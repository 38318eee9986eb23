// Levels as float32, one at a look: factors of m16n8k8 products of tf32 as they are. For codes whose tables of two at a
// look do not fit.

__device__ __forceinline__ void mma_tf32(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

#if !BYTESK
// Products of two tokens' keys with all query columns; x0, x1 for column c.
__device__ __forceinline__ void take_float_keys(const Query& q, const u32 (&w)[Keys::WORDS + 1], int run, float copy, int neighbour, float& x0, float& x1) {
    u32 bits[2][Keys::LENGTH / Keys::GRAIN + 1];
#pragma unroll
    for (int t = 0; t < 2; ++t) split_run<Keys>(w, run + t, neighbour, bits[t]);
    auto level = [&](int t, int d) { return look_up<Keys, COPIESK>(bits[t], d, copy); };
    float even[4] = {0.0f, 0.0f, 0.0f, 0.0f}, odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // two chains of products
#pragma unroll
    for (int s = 0; s < DK / 8; ++s) mma_tf32(s & 1 ? odd : even, level(0, 2 * s), level(1, 2 * s), level(0, 2 * s + 1), level(1, 2 * s + 1), q.b[2 * s], q.b[2 * s + 1]);
    x0 = (even[0] + odd[0]) + (even[1] + odd[1]);
    x1 = (even[2] + odd[2]) + (even[3] + odd[3]);
}
#endif

#if !BYTESV
// Four tokens' values times their weights (of column g / 2, part g % 2) onto the outputs.
__device__ __forceinline__ void take_float_values(Running& r, const u32 (&w)[Values::WORDS + 1], int run, float copy, int neighbour, const float* weights, u32 high) {
    const float4 f = *(const float4*)weights;
    const u32 b0 = part_of(f.x, high), b1 = part_of(f.y, high), b2 = part_of(f.z, high), b3 = part_of(f.w, high);
    u32 bits[4][Values::LENGTH / Values::GRAIN + 1];
#pragma unroll
    for (int t = 0; t < 4; ++t) split_run<Values>(w, run + t, neighbour, bits[t]);
    auto level = [&](int t, int d) { return look_up<Values, COPIESV>(bits[t], d, copy); };
#pragma unroll
    for (int u = 0; u < V_UNITS; ++u) {
        mma_tf32(r.o[u], level(0, 2 * u), level(0, 2 * u + 1), level(1, 2 * u), level(1, 2 * u + 1), b0, b1);
        mma_tf32(r.o[u], level(2, 2 * u), level(2, 2 * u + 1), level(3, 2 * u), level(3, 2 * u + 1), b2, b3);
    }
}
#endif
