/* trellis_lanes.h: unsigned 16-bit lanes of the instruction set that is compiled for: `LANES` of them in a
 * `lanes`. Their meaning is the last block's. */
#if defined(__AVX512BW__)
#define LANES 32
typedef __m512i lanes;
static inline lanes l_load(const uint16_t *p) { return _mm512_loadu_si512(p); }
static inline void l_store(uint16_t *p, lanes x) { _mm512_storeu_si512(p, x); }
static inline lanes l_set(int x) { return _mm512_set1_epi16((short)x); }
static inline lanes l_add_limited(lanes a, lanes b) { return _mm512_adds_epu16(a, b); }
static inline lanes l_sub(lanes a, lanes b) { return _mm512_sub_epi16(a, b); }
static inline lanes l_least(lanes a, lanes b) { return _mm512_min_epu16(a, b); }
static inline lanes l_within(lanes z, lanes most) {
    return _mm512_max_epi16(_mm512_min_epi16(z, most), _mm512_sub_epi16(_mm512_setzero_si512(), most));
}
static inline lanes l_less(lanes a, lanes b, int doublings) {
    lanes d = _mm512_subs_epi16(a, b);
    for (int i = 0; i < doublings; i++) d = _mm512_adds_epi16(d, d);
    return d;
}
static inline lanes l_product(lanes d, lanes over) { return _mm512_mulhi_epi16(d, _mm512_adds_epi16(d, over)); }
static inline void l_transpose(const uint16_t *from, uint16_t *to) {
    lanes a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        const lanes one = l_load(from + i * LANES), two = l_load(from + (i + 1) * LANES);
        a[i] = _mm512_unpacklo_epi16(one, two);
        a[i + 1] = _mm512_unpackhi_epi16(one, two);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi32(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi32(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        l_store(to + 2 * i * LANES, _mm512_unpacklo_epi64(b[i], b[i + 4]));
        l_store(to + (2 * i + 1) * LANES, _mm512_unpackhi_epi64(b[i], b[i + 4]));
    }
}
#elif defined(__AVX2__)
#define LANES 16
typedef __m256i lanes;
static inline lanes l_load(const uint16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
static inline void l_store(uint16_t *p, lanes x) { _mm256_storeu_si256((__m256i *)p, x); }
static inline lanes l_set(int x) { return _mm256_set1_epi16((short)x); }
static inline lanes l_add_limited(lanes a, lanes b) { return _mm256_adds_epu16(a, b); }
static inline lanes l_sub(lanes a, lanes b) { return _mm256_sub_epi16(a, b); }
static inline lanes l_least(lanes a, lanes b) { return _mm256_min_epu16(a, b); }
static inline lanes l_within(lanes z, lanes most) {
    return _mm256_max_epi16(_mm256_min_epi16(z, most), _mm256_sub_epi16(_mm256_setzero_si256(), most));
}
static inline lanes l_less(lanes a, lanes b, int doublings) {
    lanes d = _mm256_subs_epi16(a, b);
    for (int i = 0; i < doublings; i++) d = _mm256_adds_epi16(d, d);
    return d;
}
static inline lanes l_product(lanes d, lanes over) { return _mm256_mulhi_epi16(d, _mm256_adds_epi16(d, over)); }
static inline void l_transpose(const uint16_t *from, uint16_t *to) {
    lanes a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        const lanes one = l_load(from + i * LANES), two = l_load(from + (i + 1) * LANES);
        a[i] = _mm256_unpacklo_epi16(one, two);
        a[i + 1] = _mm256_unpackhi_epi16(one, two);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_unpacklo_epi32(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm256_unpackhi_epi32(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        l_store(to + 2 * i * LANES, _mm256_unpacklo_epi64(b[i], b[i + 4]));
        l_store(to + (2 * i + 1) * LANES, _mm256_unpackhi_epi64(b[i], b[i + 4]));
    }
}
#elif defined(NEON_LANES) /* by kernels_neon.c alone: kernels_scalar.c is plain C on Arm too */
#define LANES 8
typedef uint16x8_t lanes;
static inline lanes l_load(const uint16_t *p) { return vld1q_u16(p); }
static inline void l_store(uint16_t *p, lanes x) { vst1q_u16(p, x); }
static inline lanes l_set(int x) { return vdupq_n_u16((uint16_t)x); }
static inline lanes l_add_limited(lanes a, lanes b) { return vqaddq_u16(a, b); }
static inline lanes l_sub(lanes a, lanes b) { return vsubq_u16(a, b); }
static inline lanes l_least(lanes a, lanes b) { return vminq_u16(a, b); }
static inline int16x8_t l_signed(lanes x) { return vreinterpretq_s16_u16(x); }
static inline lanes l_within(lanes z, lanes most) {
    return vreinterpretq_u16_s16(vmaxq_s16(vminq_s16(l_signed(z), l_signed(most)), vnegq_s16(l_signed(most))));
}
static inline lanes l_less(lanes a, lanes b, int doublings) {
    int16x8_t d = vqsubq_s16(l_signed(a), l_signed(b));
    for (int i = 0; i < doublings; i++) d = vqaddq_s16(d, d);
    return vreinterpretq_u16_s16(d);
}
static inline lanes l_product(lanes d, lanes over) {
    const int16x8_t a = l_signed(d), b = vqaddq_s16(a, l_signed(over));
    const int32x4_t low = vmull_s16(vget_low_s16(a), vget_low_s16(b)), high = vmull_high_s16(a, b);
    return vcombine_u16(vshrn_n_u32(vreinterpretq_u32_s32(low), 16), vshrn_n_u32(vreinterpretq_u32_s32(high), 16));
}
static inline void l_transpose(const uint16_t *from, uint16_t *to) {
    for (int i = 0; i < 8; i++)
        for (int l = 0; l < LANES; l++) to[l * 8 + i] = from[i * LANES + l];
}
#else
#define LANES 8
typedef struct {
    uint16_t at[LANES];
} lanes;
static inline int l_limited(int x) { return x > 32767 ? 32767 : x < -32768 ? -32768 : x; }
#define EACH for (int i = 0; i < LANES; i++)
static inline lanes l_load(const uint16_t *p) { lanes x; EACH x.at[i] = p[i]; return x; }
static inline void l_store(uint16_t *p, lanes x) { EACH p[i] = x.at[i]; }
static inline lanes l_set(int x) { lanes y; EACH y.at[i] = (uint16_t)x; return y; }
/* a + b, at most 65535 */
static inline lanes l_add_limited(lanes a, lanes b) {
    EACH { const unsigned sum = (unsigned)a.at[i] + b.at[i]; a.at[i] = (uint16_t)(sum > 65535u ? 65535u : sum); }
    return a;
}
static inline lanes l_sub(lanes a, lanes b) { EACH a.at[i] = (uint16_t)(a.at[i] - b.at[i]); return a; }
static inline lanes l_least(lanes a, lanes b) { EACH a.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i]; return a; }
/* Signed: z, at most `most` away from 0. */
static inline lanes l_within(lanes z, lanes most) {
    EACH {
        const int limit = most.at[i], x = (int16_t)z.at[i];
        z.at[i] = (uint16_t)(x > limit ? limit : x < -limit ? -limit : x);
    }
    return z;
}
/* Signed: a - b, doubled so many times; every step stays within 16 bits. */
static inline lanes l_less(lanes a, lanes b, int doublings) {
    EACH {
        int d = l_limited((int16_t)a.at[i] - (int16_t)b.at[i]);
        for (int j = 0; j < doublings; j++) d = l_limited(2 * d);
        a.at[i] = (uint16_t)d;
    }
    return a;
}
/* Signed: d (d + over) / 65536, the sum within 16 bits. */
static inline lanes l_product(lanes d, lanes over) {
    EACH {
        const int x = (int16_t)d.at[i];
        d.at[i] = (uint16_t)(x * l_limited(x + (int16_t)over.at[i]) >> 16);
    }
    return d;
}
/* Eight rows of lanes to eight numbers a lane: those of lane l at to + LANES (l % 8) + 8 (l / 8). */
static inline void l_transpose(const uint16_t *from, uint16_t *to) {
    for (int i = 0; i < 8; i++)
        for (int l = 0; l < LANES; l++) to[l * 8 + i] = from[i * LANES + l];
}
#undef EACH
#endif
