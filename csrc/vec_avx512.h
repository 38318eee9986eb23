/* vec_avx512.h: see vec_scalar.h. */
#define VL 16
typedef __m512 vf;
static inline vf v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
static inline vf v_set(float x) { return _mm512_set1_ps(x); }
static inline vf v_from_int(const int32_t *p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
static inline vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf v_copysign(vf a, vf sign) {
    return _mm512_or_ps(a, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}
static inline vf v_abs(vf a) { return _mm512_abs_ps(a); }
/* the instruction gives its second operand where one is NaN */
static inline vf v_max_or_nan(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf v_max(vf a, vf b) { return _mm512_max_ps(b, a); }
static inline vf v_zero_below(vf x, vf y, vf limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, limit, _CMP_NLT_UQ), x);
}
static inline vf v_zero_if_zero(vf x, vf y) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_NEQ_UQ), x);
}
static inline vf v_whole(vf x) { return _mm512_roundscale_ps(x, 0); }
static inline vf v_from_whole(vf n) { return n; }
static inline vf v_times_power(vf x, vf n) { return _mm512_scalef_ps(x, n); }
static inline float v_sum(vf a) { return _mm512_reduce_add_ps(a); }
static inline float v_largest(vf a) { return _mm512_reduce_max_ps(a); }
static inline int v_any_nan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
static inline void v_store_int16(int16_t *p, vf a, vf b) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a)));
    _mm256_storeu_si256((__m256i *)(p + 16), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(b)));
}
