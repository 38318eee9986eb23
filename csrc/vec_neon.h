/* vec_neon.h: see vec_scalar.h. */
#define VL 4
typedef float32x4_t vf;
static inline vf v_load(const float *p) { return vld1q_f32(p); }
static inline void v_store(float *p, vf x) { vst1q_f32(p, x); }
static inline vf v_set(float x) { return vdupq_n_f32(x); }
static inline vf v_from_int(const int32_t *p) { return vcvtq_f32_s32(vld1q_s32(p)); }
static inline vf v_add(vf a, vf b) { return vaddq_f32(a, b); }
static inline vf v_sub(vf a, vf b) { return vsubq_f32(a, b); }
static inline vf v_mul(vf a, vf b) { return vmulq_f32(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
static inline vf v_div(vf a, vf b) { return vdivq_f32(a, b); }
static inline vf v_copysign(vf a, vf sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, a); }
static inline vf v_abs(vf a) { return vabsq_f32(a); }
static inline vf v_max_or_nan(vf a, vf b) { return vmaxq_f32(a, b); }
static inline vf v_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(b, a), b, a); }
static inline vf v_zero_below(vf x, vf y, vf limit) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(x), vcltq_f32(y, limit)));
}
static inline vf v_whole(vf x) { return vrndnq_f32(x); }
static inline vf v_from_whole(vf n) { return n; }
static inline vf v_times_power(vf x, vf n) {
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    return vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
}
static inline float v_sum(vf a) { return vaddvq_f32(a); }
static inline float v_largest(vf a) { return vmaxvq_f32(a); }
static inline int v_any_nan(vf a) { return vminvq_u32(vceqq_f32(a, a)) == 0; }
static inline void v_store_int16(int16_t *p, vf a, vf b, float by) {
    vst1q_s16(p, vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(a, by))), vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(b, by)))));
}
