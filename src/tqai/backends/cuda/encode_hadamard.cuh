// The 64 vectors of a block, rotated by Hadamard rounds, into codes of one byte each and scales.

template <int D, int BITS, int ROUNDS, bool VALUES>
__device__ __forceinline__ void encode_by_hadamard(const Side& s, const float2* cells, const float* magnitudes, float* work, u8* bytes, u16* scales_out, i64 base) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const float most = s.buckets - 1;
    constexpr int T = D / 16, ROWS = 32 / T, PITCH = D + 8;
    const int q = lane % T, r = lane / T;
    float* row = work + warp * ROWS * PITCH + r * PITCH;
    // Chunk k of 4 floats of thread q lies at chunk k ^ (q / 2 % 4), against bank conflicts. Two views of
    // a row: `whole[k]` are the chunks of 16 neighbours, `spread(i)` is coordinate i T + q.
    float* whole[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) whole[k] = row + q * 16 + ((k ^ (q >> 1)) & 3) * 4;
    constexpr int MOVING = T >= 16 ? 3 : T >= 8 ? 1 : 0;  // bits of the chunk that depend on q
    float* bases[MOVING + 1];
#pragma unroll
    for (int k = 0; k <= MOVING; ++k) bases[k] = row + ((((q >> 2) ^ k) & MOVING) * 4) + (T >= 4 ? q & 3 : q);
    auto spread = [&](int i) -> float& {
        // i T + q = 16 owner + 4 chunk + q % 4, with the fixed part of the chunk from i alone
        const int owner = i * T >> 4, fixed = (i * T >> 2) & 3, turn = (owner >> 1) & 3;
        return bases[turn & MOVING][owner * 16 + ((fixed ^ turn) & 3 & ~MOVING) * 4 + (T < 4 ? (i * T) & 3 : 0)];
    };
    float first[16], second[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        first[i] = s.plan[q * 16 + i];
        second[i] = ROUNDS > 1 ? s.plan[D + i * T + q] : 1.0f;
    }
    Sixteen coming;  // asked for one round ahead
    if (warp * ROWS + r < PAGE_TOKENS) coming.load(s.in, base + (warp * ROWS + r) * s.strides[2] + q * 16);
#pragma unroll 1
    for (int token = warp * ROWS + r; token < PAGE_TOKENS; token += CODE_WARPS * ROWS) {
        float x[16];
        coming.unpack(x);
        if (token + CODE_WARPS * ROWS < PAGE_TOKENS) coming.load(s.in, base + (token + CODE_WARPS * ROWS) * s.strides[2] + q * 16);
        float top = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) top = max_nan(top, fabsf(x[i]));
#pragma unroll
        for (int o = 1; o < T; o *= 2) top = max_nan(top, __shfl_xor_sync(FULL, top, o));
        int exponent = 0;
        if (!(top < 1.0e15f && top > 1.0e-15f)) {
            // far from 1: scaled by a power of two, so that no square overflows or vanishes
            exponent = exponent_of(top);
            bool usable = top < INF && top >= 1.17549435e-38f;
#pragma unroll
            for (int i = 0; i < 16; ++i) x[i] = usable ? scaled_down(x[i], exponent) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) x[i] *= first[i];
#pragma unroll
        for (int h = 1; h < T; h *= 2) {
#pragma unroll
            for (int i = 0; i < 16; ++i)
                if (!(i & h)) {
                    float a = x[i], b = x[i + h];
                    x[i] = a + b;
                    x[i + h] = a - b;
                }
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < 4; ++k)
            *(float4*)whole[k] = make_float4(x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3]);
        __syncwarp();
        float y[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) y[i] = spread(i);
#pragma unroll
        for (int round = 0; round < ROUNDS; ++round) {
            if (round == 1) {
#pragma unroll
                for (int i = 0; i < 16; ++i) y[i] *= second[i];
            }
#pragma unroll
            for (int h = 1; h < 16; h *= 2) {
#pragma unroll
                for (int i = 0; i < 16; ++i)
                    if (!(i & h)) {
                        float a = y[i], b = y[i + h];
                        y[i] = a + b;
                        y[i + h] = a - b;
                    }
            }
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) spread(i) = y[i];
        __syncwarp();
        float norm = 0.0f;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float4 f = *(const float4*)whole[k];
            x[4 * k] = f.x; x[4 * k + 1] = f.y; x[4 * k + 2] = f.z; x[4 * k + 3] = f.w;
        }
        if (ROUNDS > 1) {
#pragma unroll
            for (int h = 1; h < T; h *= 2) {
#pragma unroll
                for (int i = 0; i < 16; ++i)
                    if (!(i & h)) {
                        float a = x[i], b = x[i + h];
                        x[i] = a + b;
                        x[i + h] = a - b;
                    }
            }
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) norm = fmaf(x[i], x[i], norm);
#pragma unroll
        for (int o = 1; o < T; o *= 2) norm += __shfl_xor_sync(FULL, norm, o);
        const float inv = norm > 0.0f ? 1.0f / sqrtf(norm) : 0.0f;
        const float bucket_inv = inv * s.bucket_scale;
        float xc = 0.0f, cc = 0.0f;
        u32 word[4];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float c;
            int code = quantize<BITS>(x[i], inv, bucket_inv, most, cells, magnitudes, c);
            xc = fmaf(fabsf(x[i]), c, xc);
            cc = fmaf(c, c, cc);
            if (!(top < INF)) code = 0;
            if (VALUES) put_code<D, VALUES>(bytes, token, q * 16 + i, code);
            else if (i % 4 == 0) word[i / 4] = code;
            else word[i / 4] |= code << (8 * (i % 4));
        }
        if (!VALUES) {
#pragma unroll
            for (int k = 0; k < 4; ++k) *(u32*)(bytes + token * (D + 4) + q * 16 + 4 * k) = word[k];
        }
#pragma unroll
        for (int o = 1; o < T; o *= 2) {
            xc += __shfl_xor_sync(FULL, xc, o);
            cc += __shfl_xor_sync(FULL, cc, o);
        }
        if (q == 0) scales_out[token] = scale_bits(s.least_squares ? xc / cc : sqrtf(norm), exponent, top);
        __syncwarp();
    }
}
