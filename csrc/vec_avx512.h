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
/* 2^x for x <= 0 to 2e-7 relative; 0 for -inf; NaN for NaN. x less its floor is 0 for -inf. */
#define EXP2_BELOW
static inline vf exp2_below(vf x) {
    const vf f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
    vf p = v_fma(v_set(1.8793185e-3f), f, v_set(8.99099559e-3f));
    p = v_fma(p, f, v_set(5.58186769e-2f));
    p = v_fma(p, f, v_set(2.40159273e-1f));
    p = v_fma(p, f, v_set(6.93151712e-1f));
    return _mm512_scalef_ps(v_fma(p, f, v_set(1.0f)), x); /* scalef takes the floor itself */
}
/* The same to 1e-4 and 0 below -126; without the two instructions of two cycles. x + 1.5 * 2^23 is rounded to a whole
 * number, which is the sum's low bits. */
static inline vf exp2_of_weight(vf x) {
    const vf shift = v_set(12582912.0f), whole = v_add(x, shift), f = v_sub(x, v_sub(whole, shift));
    vf p = v_fma(v_set(5.50089329e-2f), f, v_set(2.42210969e-1f));
    p = v_fma(p, f, v_set(6.93282902e-1f));
    p = v_fma(p, f, v_set(1.0f));
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(_mm512_cmp_ps_mask(x, v_set(-126.0f), _CMP_NLT_UQ), _mm512_castps_si512(p),
                                                      _mm512_slli_epi32(_mm512_castps_si512(whole), 23)));
}
static inline float v_sum(vf a) { return _mm512_reduce_add_ps(a); }
static inline float v_largest(vf a) { return _mm512_reduce_max_ps(a); }
static inline int v_any_nan(vf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
static inline void v_store_int16(int16_t *p, vf a, vf b, float by) {
    /* + 1.5 * 2^23 rounds, and leaves the whole number in the low bits: of each 32, the low 16 */
    const vf shift = v_set(12582912.0f), factor = v_set(by);
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                          22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(_mm512_castps_si512(v_fma(a, factor, shift)), even,
                                                     _mm512_castps_si512(v_fma(b, factor, shift))));
}
