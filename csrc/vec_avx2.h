/* vec_avx2.h: see vec_scalar.h. */
#define VL 8
typedef __m256 vf;
static inline vf v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
static inline vf v_set(float x) { return _mm256_set1_ps(x); }
static inline vf v_from_int(const int32_t *p) { return _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf v_copysign(vf a, vf sign) {
    return _mm256_or_ps(a, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}
static inline vf v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
/* the instruction gives its second operand where one is NaN */
static inline vf v_max_or_nan(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf v_max(vf a, vf b) { return _mm256_max_ps(b, a); }
static inline vf v_zero_below(vf x, vf y, vf limit) { return _mm256_and_ps(_mm256_cmp_ps(y, limit, _CMP_NLT_UQ), x); }
/* n + 1.5 * 2^23: adding that number rounds, and leaves n in the low bits */
static inline vf v_whole(vf x) { return _mm256_add_ps(x, _mm256_set1_ps(12582912.0f)); }
static inline vf v_from_whole(vf n) { return _mm256_sub_ps(n, _mm256_set1_ps(12582912.0f)); }
static inline vf v_times_power(vf x, vf n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
}
static inline float v_sum(vf a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
static inline float v_largest(vf a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
static inline int v_any_nan(vf a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
static inline void v_store_int16(int16_t *p, vf a, vf b, float by) {
    const vf factor = v_set(by);
    const __m256i both = _mm256_packs_epi32(_mm256_cvtps_epi32(v_mul(a, factor)), _mm256_cvtps_epi32(v_mul(b, factor)));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(both, 0xD8)); /* the pack works by halves */
}
