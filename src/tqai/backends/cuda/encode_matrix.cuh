// The 64 vectors of a block, rotated by a matrix, into codes of one byte each and scales.

template <int D, int BITS, int ROUNDS, bool VALUES>
__device__ __forceinline__ void encode_by_matrix(const Side& s, const float2* cells, const float* magnitudes, float* work, u8* bytes, u16* scales_out, i64 base) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const float most = s.buckets - 1;
    constexpr int N = (D + 31) / 32, R = 4;
    float* mine = work + warp * R * D;
#pragma unroll 1
    for (int t0 = warp * R; t0 < PAGE_TOKENS; t0 += CODE_WARPS * R) {
        float top[R];
        int exponent[R];
        __syncwarp();
#pragma unroll
        for (int r = 0; r < R; ++r) {
            float v[N];
            top[r] = 0.0f;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                int d = lane + 32 * i;
                v[i] = d < D ? load_one(s.in, base + (t0 + r) * s.strides[2] + d) : 0.0f;
                top[r] = max_nan(top[r], fabsf(v[i]));
            }
#pragma unroll
            for (int o = 1; o < 32; o *= 2) top[r] = max_nan(top[r], __shfl_xor_sync(FULL, top[r], o));
            exponent[r] = exponent_of(top[r]);
            bool usable = top[r] < INF && top[r] >= 1.17549435e-38f;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                int d = lane + 32 * i;
                if (d < D) mine[r * D + d] = usable ? scaled_down(v[i], exponent[r]) : 0.0f;
            }
        }
        __syncwarp();
        float y[R][N];
#pragma unroll
        for (int r = 0; r < R; ++r)
#pragma unroll
            for (int i = 0; i < N; ++i) y[r][i] = 0.0f;
#pragma unroll 4
        for (int e = 0; e < D; ++e) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                int d = lane + 32 * i;
                float m = d < D ? s.plan[e * D + d] : 0.0f;
#pragma unroll
                for (int r = 0; r < R; ++r) y[r][i] = fmaf(m, mine[r * D + e], y[r][i]);
            }
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
            float norm = 0.0f, xc = 0.0f, cc = 0.0f;
#pragma unroll
            for (int i = 0; i < N; ++i) norm = fmaf(y[r][i], y[r][i], norm);
#pragma unroll
            for (int o = 1; o < 32; o *= 2) norm += __shfl_xor_sync(FULL, norm, o);
            const float inv = norm > 0.0f ? 1.0f / sqrtf(norm) : 0.0f;
            const float bucket_inv = inv * s.bucket_scale;
#pragma unroll
            for (int i = 0; i < N; ++i) {
                int d = lane + 32 * i;
                if (d < D) {
                    float c;
                    int code = quantize<BITS>(y[r][i], inv, bucket_inv, most, cells, magnitudes, c);
                    xc = fmaf(fabsf(y[r][i]), c, xc);
                    cc = fmaf(c, c, cc);
                    put_code<D, VALUES>(bytes, t0 + r, d, top[r] < INF ? code : 0);
                }
            }
#pragma unroll
            for (int o = 1; o < 32; o *= 2) {
                xc += __shfl_xor_sync(FULL, xc, o);
                cc += __shfl_xor_sync(FULL, cc, o);
            }
            if (lane == 0) scales_out[t0 + r] = scale_bits(s.least_squares ? xc / cc : sqrtf(norm), exponent[r], top[r]);
        }
    }
}
