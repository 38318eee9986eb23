// Pages from vectors and back: `tqai_encode` (rotate, scale, quantize, pack) and `tqai_decode`.
// One block per page, KV head and side (0 keys, 1 values). The order of the bytes is in `layout.py`.

#include "device.cuh"

#define CODE_THREADS 256
#define CODE_WARPS 8
#define BYTE_PITCH 68
#ifndef ENCODE_BLOCKS
#define ENCODE_BLOCKS 3  // per multiprocessor, for the compiler's choice of registers
#endif

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

// One vector's scale as bfloat16 bits, or the two special cases: 0, and NaN for what is not finite.
__device__ __forceinline__ u16 scale_bits(float scale, int exponent, float top) {
    if (!(top < INF)) return 0x7fc0;
    if (top < 1.17549435e-38f) return 0;
    // 2^exponent in two factors, as it may itself be out of range
    int half = exponent / 2;
    float s = scale * bits_float((u32)(127 + half) << 23) * bits_float((u32)(127 + exponent - half) << 23);
    u16 b = float_bfloat(s);
    return (b & 0x7fff) >= 0x7f80 ? 0x7f7f : b;
}

// e such that top / 2^e is in [1/2, 1); 0 where there is no such e or the vector counts as zero.
__device__ __forceinline__ int exponent_of(float top) {
    return top < INF && top >= 1.17549435e-38f ? (int)(__float_as_uint(top) >> 23) - 126 : 0;
}

__device__ __forceinline__ float scaled_down(float x, int exponent) {
    int half = exponent / 2;
    return x * bits_float((u32)(127 - half) << 23) * bits_float((u32)(127 - exponent + half) << 23);
}

// Code of one rotated coordinate and its centroid's magnitude. A cell of the table is the one boundary in a
// bucket of |y| / norm, and the number of magnitudes below it. Two small tables rather than one of wide
// entries: 16 entries of 8 bytes lie in different banks, and so do 32 of 4.
template <int BITS>
__device__ __forceinline__ int quantize(float y, float inv, float bucket_inv, float most, const float2* cells,
                                        const float* magnitudes, float& c) {
    const float t = fabsf(y) * inv;
    // the bucket's number lies in the low bits of a float beyond 2^23, rounded down
    const u32 bucket = __float_as_uint(__fadd_rz(fminf(fabsf(y) * bucket_inv, most), 8388608.0f)) & 0xffff;
    const float2 cell = cells[bucket];
    const int m = __float_as_int(cell.y) + (t >= cell.x ? 1 : 0);
    c = magnitudes[m];
    constexpr int HALF = 1 << (BITS - 1);
    return y < 0.0f ? HALF - 1 - m : HALF + m;  // not by its sign bit: -0 is 0
}

// Codes of one row's share into the byte array: keys as [token][dim], values as [dim][token].
template <int D, bool VALUES>
__device__ __forceinline__ void put_code(u8* bytes, int token, int dim, int code) {
    if (VALUES) bytes[dim * BYTE_PITCH + token] = (u8)code;
    else bytes[token * (D + 4) + dim] = (u8)code;
}

// 16 neighbouring elements as they lie in memory.
struct Sixteen {
    uint4 words[DTYPE == 2 ? 4 : 2];
    __device__ __forceinline__ void load(const void* from, i64 at) {
#pragma unroll
        for (int i = 0; i < (DTYPE == 2 ? 4 : 2); ++i)
            words[i] = *(const uint4*)((const u8*)from + at * (DTYPE == 2 ? 4 : 2) + 16 * i);
    }
    __device__ __forceinline__ void unpack(float (&x)[16]) const {
#pragma unroll
        for (int i = 0; i < (DTYPE == 2 ? 4 : 2); ++i) {
#if DTYPE == 2
            x[4 * i] = bits_float(words[i].x);
            x[4 * i + 1] = bits_float(words[i].y);
            x[4 * i + 2] = bits_float(words[i].z);
            x[4 * i + 3] = bits_float(words[i].w);
#else
            two_of_word(words[i].x, x[8 * i], x[8 * i + 1]);
            two_of_word(words[i].y, x[8 * i + 2], x[8 * i + 3]);
            two_of_word(words[i].z, x[8 * i + 4], x[8 * i + 5]);
            two_of_word(words[i].w, x[8 * i + 6], x[8 * i + 7]);
#endif
        }
    }
};

template <int D, int BITS, int ROUNDS, bool VALUES>
__device__ void encode_side(const Side& s, u8* codes_out, u16* scales_out, int page, int head, u8* smem) {
    constexpr int BYTES = VALUES ? D * BYTE_PITCH : 64 * (D + 4);
    float* work = (float*)smem;
    constexpr int WORK = ROUNDS > 0 ? CODE_WARPS * (512 / D) * (D + 8) : CODE_WARPS * 4 * D;
    u8* bytes = smem + WORK * 4;
    float2* cells = (float2*)(bytes + ALIGN16(BYTES));
    float* magnitudes = (float*)(cells + s.buckets);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    for (int i = tid; i < s.buckets; i += CODE_THREADS) cells[i] = s.cells[i];
    for (int i = tid; i < (1 << (BITS - 1)); i += CODE_THREADS) magnitudes[i] = s.levels[(1 << (BITS - 1)) + i];
    __syncthreads();
    const float most = s.buckets - 1;
    const i64 base = page * s.strides[0] + head * s.strides[1];

    if constexpr (ROUNDS > 0) {
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
    } else {
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
    __syncthreads();
    for (int k = tid; k < D / 16 * 32; k += CODE_THREADS) {
        const int u = k >> 5, g = (k >> 2) & 7, c = k & 3;
        u32 reg[8];  // 4 codes each, one per byte
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            const u8* from = VALUES ? bytes + (16 * u + g + 8 * (r & 1)) * BYTE_PITCH + 8 * (c + 4 * (r >> 2)) + 4 * ((r & 3) >> 1)
                                    : bytes + (8 * g + r) * (D + 4) + 16 * u + 4 * c;
            reg[r] = *(const u32*)from;
        }
        u8* unit = codes_out + u * (BITS * 128);
        const int l = k & 31;
        if constexpr (BITS == 8) {
            *(uint4*)(unit + l * 16) = make_uint4(reg[0], reg[1], reg[2], reg[3]);
            *(uint4*)(unit + 512 + l * 16) = make_uint4(reg[4], reg[5], reg[6], reg[7]);
        } else {
            u32 pair[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                // bytes to nibbles: 4 of one register below 4 of the next
                u32 a = reg[2 * j] | reg[2 * j] >> 4, b = reg[2 * j + 1] | reg[2 * j + 1] >> 4;
                pair[j] = __byte_perm(__byte_perm(a, 0, 0x4420), __byte_perm(b, 0, 0x4420), 0x5410);
            }
            if constexpr (BITS == 4) {
#pragma unroll
                for (int j = 0; j < 4; ++j) pair[j] ^= ((pair[j] << 1) & 0x88888888u) ^ 0x88888888u;
                *(uint4*)(unit + l * 16) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
            } else if constexpr (BITS == 3) {
#pragma unroll
                for (int j = 0; j < 3; ++j) pair[j] |= ((pair[3] >> j) & 0x11111111u) << 3;
                *(uint2*)(unit + l * 8) = make_uint2(pair[0], pair[1]);
                *(u32*)(unit + 256 + l * 4) = pair[2];
            } else if constexpr (BITS == 2) {
                *(uint2*)(unit + l * 8) = make_uint2(pair[0] | pair[1] << 2, pair[2] | pair[3] << 2);
            } else {
                *(u32*)(unit + l * 4) = pair[0] | pair[1] << 1 | pair[2] << 2 | pair[3] << 3;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(CODE_THREADS, ENCODE_BLOCKS) tqai_encode(const __grid_constant__ CodeParams p) {
    extern __shared__ __align__(128) u8 smem[];
    const int side = blockIdx.y, page = blockIdx.x / p.heads, head = blockIdx.x - page * p.heads;
    u8* out = p.pages + (i64)blockIdx.x * PAGE_BYTES;
    if (side == 0) encode_side<DK, BK, ROTK, false>(p.side[0], out, (u16*)(out + K_SCALES_AT), page, head, smem);
    else encode_side<DV, BV, ROTV, true>(p.side[1], out + V_CODES_AT, (u16*)(out + V_SCALES_AT), page, head, smem);
}

// Code i of register r, out of the words of one lane of a unit.
template <int BITS>
__device__ __forceinline__ u32 code_of(const u32* w, int r, int i) {
    if constexpr (BITS == 8) return (w[r] >> (8 * i)) & 0xff;
    const int pair = r >> 1, shift = 16 * (r & 1) + 4 * i;
    if constexpr (BITS == 4) {
        u32 n = (w[pair] >> shift) & 15;
        return n ^ ((n << 1) & 8) ^ 8;
    }
    if constexpr (BITS == 3) {
        if (pair < 3) return (w[pair] >> shift) & 7;
        return ((w[0] >> (shift + 3)) & 1) | ((w[1] >> (shift + 3)) & 1) << 1 | ((w[2] >> (shift + 3)) & 1) << 2;
    }
    if constexpr (BITS == 2) return (w[pair >> 1] >> (shift + 2 * (pair & 1))) & 3;
    return (w[0] >> (shift + pair)) & 1;
}

template <int D, int BITS, int ROUNDS, bool VALUES>
__device__ void decode_side(const Side& s, const u8* codes, const u16* scales, u8* smem, int out_dtype, int back) {
    constexpr int PITCH = D + 1;
    float* rows = (float*)smem;
    float* levels = rows + 64 * PITCH;
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    for (int i = tid; i < (1 << BITS); i += CODE_THREADS) levels[i] = s.levels[i];
    __syncthreads();
    for (int k = tid; k < D / 16 * 32; k += CODE_THREADS) {
        const int u = k >> 5, l = k & 31, g = l >> 2, c = l & 3;
        u32 w[BITS];
        const u8* unit = codes + u * (BITS * 128);
#pragma unroll
        for (int j = 0; j < BITS; ++j) {
            int at = BITS == 8 ? (j >> 2) * 512 + l * 16 + (j & 3) * 4
                   : BITS == 4 ? l * 16 + j * 4
                   : BITS == 3 ? (j < 2 ? l * 8 + j * 4 : 256 + l * 4)
                   : BITS == 2 ? l * 8 + j * 4 : l * 4;
            w[j] = *(const u32*)(unit + at);
        }
#pragma unroll
        for (int r = 0; r < 8; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int token = VALUES ? 8 * (c + 4 * (r >> 2)) + 4 * ((r & 3) >> 1) + i : 8 * g + r;
                int dim = 16 * u + (VALUES ? g + 8 * (r & 1) : 4 * c + i);
                rows[token * PITCH + dim] = levels[code_of<BITS>(w, r, i)];
            }
    }
    __syncthreads();
    for (int token = warp; token < PAGE_TOKENS; token += CODE_WARPS) {
        float* row = rows + token * PITCH;
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

extern "C" __global__ void __launch_bounds__(CODE_THREADS) tqai_decode(const __grid_constant__ CodeParams p) {
    extern __shared__ __align__(128) u8 smem[];
    const u8* in = p.pages + (i64)blockIdx.x * PAGE_BYTES;
    if (blockIdx.y == 0) decode_side<DK, BK, ROTK, false>(p.side[0], in, (const u16*)(in + K_SCALES_AT), smem, p.out_dtype, p.back);
    else decode_side<DV, BV, ROTV, true>(p.side[1], in + V_CODES_AT, (const u16*)(in + V_SCALES_AT), smem, p.out_dtype, p.back);
}
