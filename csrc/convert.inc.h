/* convert.inc.h: float32, bfloat16 and float16 rows to float and back; included by each ISA's file. */

static inline uint16_t to_bf16(float value) {
    uint32_t bits = float_to_bits(value);
    if (value != value) return 0x7FC0;
    return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

static inline float from_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7FFFu;
    if (rest >= 0x7C00u) return bits_to_float(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
    /* exact for normal and subnormal halves alike: 2^112 moves the exponent */
    return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
}

static inline uint16_t to_half(float value) {
    uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7FFFFFFFu;
    if (rest > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
    if (rest >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);
    if (rest < 0x38800000u) { /* subnormal: adding 0.5 rounds at 2^-24 to nearest even */
        float moved = bits_to_float(rest) + 0.5f;
        return (uint16_t)(sign | (float_to_bits(moved) - 0x3F000000u));
    }
    rest += 0xFFFu + ((rest >> 13) & 1u);
    return (uint16_t)(sign | ((rest - 0x38000000u) >> 13));
}

static void to_float(const void *from, int dtype, int n, float *restrict to) {
    if (dtype == TQAI_FLOAT32) {
        memcpy(to, from, (size_t)n * sizeof(float));
    } else if (dtype == TQAI_BFLOAT16) {
        const uint16_t *restrict source = from;
        for (int i = 0; i < n; i++) to[i] = bits_to_float((uint32_t)source[i] << 16);
    } else {
        const uint16_t *restrict source = from;
        int i = 0;
#ifdef __F16C__
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(source + i))));
#endif
        for (; i < n; i++) to[i] = from_half(source[i]);
    }
}

static void from_float(const float *restrict from, int dtype, int n, void *to) {
    if (dtype == TQAI_FLOAT32) {
        memcpy(to, from, (size_t)n * sizeof(float));
    } else if (dtype == TQAI_BFLOAT16) {
        uint16_t *restrict target = to;
        for (int i = 0; i < n; i++) target[i] = to_bf16(from[i]);
    } else {
        uint16_t *restrict target = to;
        for (int i = 0; i < n; i++) target[i] = to_half(from[i]);
    }
}

static inline const void *at(const void *base, int dtype, int64_t elements) {
    return (const char *)base + elements * (dtype == TQAI_FLOAT32 ? 4 : 2);
}
