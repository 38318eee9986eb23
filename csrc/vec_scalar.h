/* vec_scalar.h: the vector operations of softmax.inc.h, one lane at a time; their meaning is defined here.
 *
 * max_or_nan(a, b)          b if b > a or b is NaN, else a
 * zero_below(x, y, limit)   0 where y < limit, else x
 * whole(x)                  the nearest whole number n to x, |x| <= 126, in whatever form suits the next two
 * from_whole(n)             n as a float;       times_power(x, n)   x * 2^n
 * copysign(a, sign)         a, which is not negative, with the sign of `sign`
 * sum, largest              over all lanes
 */
#define VL 1
typedef float vf;
static inline vf v_load(const float *p) { return *p; }
static inline void v_store(float *p, vf x) { *p = x; }
static inline vf v_set(float x) { return x; }
static inline vf v_from_int(const int32_t *p) { return (float)*p; }
static inline vf v_add(vf a, vf b) { return a + b; }
static inline vf v_sub(vf a, vf b) { return a - b; }
static inline vf v_mul(vf a, vf b) { return a * b; }
static inline vf v_fma(vf a, vf b, vf c) { return a * b + c; }
static inline vf v_div(vf a, vf b) { return a / b; }
static inline vf v_copysign(vf a, vf sign) { return copysignf(a, sign); }
static inline vf v_abs(vf a) { return fabsf(a); }
static inline vf v_max_or_nan(vf a, vf b) { return b > a || b != b ? b : a; }
static inline vf v_max(vf a, vf b) { return b > a ? b : a; }
static inline vf v_zero_below(vf x, vf y, vf limit) { return y < limit ? 0.0f : x; }
/* n + 1.5 * 2^23: adding that number rounds, and leaves n in the low bits */
static inline vf v_whole(vf x) { return x + 12582912.0f; }
static inline vf v_from_whole(vf n) { return n - 12582912.0f; }
static inline vf v_times_power(vf x, vf n) { return x * bits_to_float((float_to_bits(n) + 127u) << 23); }
static inline float v_sum(vf a) { return a; }
static inline float v_largest(vf a) { return a; }
static inline int v_any_nan(vf a) { return a != a; }
/* The nearest whole numbers of two vectors times `by`, |x * by| <= 32767, as int16. */
static inline void v_store_int16(int16_t *p, vf a, vf b, float by) {
    p[0] = (int16_t)lrintf(a * by);
    p[1] = (int16_t)lrintf(b * by);
}
