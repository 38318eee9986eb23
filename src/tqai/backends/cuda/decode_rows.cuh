// The rows of a decoded page, levels in shared memory, on their way out: rotated back, scaled, stored.

#define ROW_PITCH(dim) ((dim) + 1)  // floats of a row there

template <int D, int ROUNDS>
__device__ __forceinline__ void give_rows(const Side& s, float* rows, const u16* scales, int out_dtype, int back, int warp, int lane) {
    for (int token = warp; token < PAGE_TOKENS; token += CODE_WARPS) {
        float* row = rows + token * ROW_PITCH(D);
        float v[(D + 31) / 32];
#pragma unroll
        for (int i = 0; i < (D + 31) / 32; ++i) v[i] = D % 32 == 0 || lane + 32 * i < D ? row[lane + 32 * i] : 0.0f;
        if (back) rotate<D, ROUNDS, true>(v, row, s.plan, lane);
        const float scale = bits_float((u32)scales[token] << 16);
        const float most = out_dtype == 0 ? 65504.0f : out_dtype == 1 ? bits_float(0x7f7f0000u) : bits_float(0x7f7fffffu);
#pragma unroll
        for (int i = 0; i < (D + 31) / 32; ++i) {
            const int d = lane + 32 * i;
            float y = v[i] * scale;
            if (y > most) y = most;
            if (y < -most) y = -most;
            if (D % 32 == 0 || d < D) store_one(s.out, ((i64)blockIdx.x * PAGE_TOKENS + token) * D + d, y, out_dtype);
        }
    }
}
