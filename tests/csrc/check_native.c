/* check_native.c: random shapes, bits, alignments and special values through the native kernels, built
 * with sanitizers or run under an emulator. No framework: it prints one line and returns 0, or says what
 * differed and returns 1.
 *
 *     check_native SEED SECONDS
 *
 * Every buffer is allocated at its exact size, so that AddressSanitizer sees a byte too many. Checked:
 * all instruction sets encode and decode to the same bytes; attention agrees with a double-precision
 * computation on the decoded numbers.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tqai.h"

static uint64_t state = 1;

static uint32_t draw(void) { /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 2685821657736338717ull) >> 32);
}

static int below(int n) { return (int)(draw() % (uint32_t)n); }
static float uniform(void) { return (float)draw() / 4294967296.0f * 2.0f - 1.0f; }
static float gaussian(void) { return (uniform() + uniform() + uniform() + uniform()) * 0.866f; }

static void *room(size_t bytes) {
    void *p = malloc(bytes ? bytes : 1);
    if (!p) exit(2);
    memset(p, 0xFF, bytes);
    return p;
}

static void codec_make(tqai_codec *c, int dim, int bits) {
    const int count = 1 << bits, hadamard = (dim & (dim - 1)) == 0 && below(4) != 0;
    float *signs = room(sizeof(float) * 2 * (size_t)dim), *matrix = room(sizeof(float) * (size_t)(dim * dim));
    float *transposed = room(sizeof(float) * (size_t)(dim * dim)), *centroids = room(sizeof(float) * (size_t)count);
    float *boundaries = room(sizeof(float) * (size_t)(count - 1));
    int16_t *levels = room(sizeof(int16_t) * (size_t)count);
    const float most = 2.7f / sqrtf((float)dim);
    for (int i = 0; i < 2 * dim; i++) signs[i] = below(2) ? 1.0f : -1.0f;
    for (int i = 0; i < dim; i++)
        for (int j = 0; j < dim; j++) { /* a reflection: orthogonal and not symmetric in its rows' order */
            const float v = (float)(i == (j + 1) % dim) - 2.0f / (float)dim;
            matrix[i * dim + j] = v;
            transposed[j * dim + i] = v;
        }
    for (int i = 0; i < count; i++) centroids[i] = most * (2.0f * ((float)i + 0.5f) / (float)count - 1.0f);
    for (int i = 0; i < count - 1; i++) boundaries[i] = (centroids[i] + centroids[i + 1]) / 2.0f;
    /* uniform, as the centroids here: whole numbers of a byte, if these are to be seen */
    const int of_bytes = bits < 8 && below(3) != 0;
    const int most_level = of_bytes ? (count - 1) * (127 / (count - 1)) : 4095;
    const float step = centroids[count - 1] / (float)most_level;
    for (int i = 0; i < count; i++) levels[i] = (int16_t)lrintf(centroids[i] / step);
    int8_t *byte_levels = of_bytes ? room((size_t)count) : NULL;
    for (int i = 0; of_bytes && i < count; i++) byte_levels[i] = (int8_t)levels[i];
    *c = (tqai_codec){.head_dim = dim, .bits = bits, .rounds = hadamard ? 1 + below(2) : 0, .scale_norm = below(2),
                      .signs = signs, .matrix = matrix, .transposed = transposed, .centroids = centroids,
                      .boundaries = boundaries, .levels = levels, .level_step = step, .largest_sum = 523000.0f,
                      .byte_levels = byte_levels};
    c->normaliser = c->rounds == 2 ? 1.0f / (float)dim : 1.0f / sqrtf((float)dim);
}

#include "trellis_tables.h"

static void codec_free(tqai_codec *c) {
    trellis_free(c);
    free((void *)c->signs);
    free((void *)c->matrix);
    free((void *)c->transposed);
    free((void *)c->centroids);
    free((void *)c->boundaries);
    free((void *)c->levels);
    free((void *)c->byte_levels);
}

static void format_make(tqai_page_format *f) {
    static const int dims[] = {16, 32, 64, 80, 96, 128, 160, 256}, bits[] = {2, 3, 4, 8};
    codec_make(&f->key, dims[below(8)], bits[below(4)]);
    codec_make(&f->value, dims[below(8)], bits[below(4)]);
    if (below(2)) trellis_make(&f->key, 1 + below(4));
    if (below(2)) trellis_make(&f->value, 1 + below(4));
    const int bytes = below(3) == 0, scales = bytes ? 64 : 128; /* scales of one byte, or bfloat16 */
    f->key_scales_at = 8 * f->key.head_dim * f->key.bits;
    f->value_codes_at = f->key_scales_at + scales;
    f->value_scales_at = f->value_codes_at + 8 * f->value.head_dim * f->value.bits;
    f->page_bytes = f->value_scales_at + scales + (bytes ? 16 : 0);
    f->bases_at = bytes ? f->value_scales_at + scales : 0;
    f->scale_levels = f->scale_thresholds = NULL;
    if (!bytes) return;
    float *levels = room(sizeof(float) * 256), *thresholds = room(sizeof(float) * 254);
    for (int i = 0; i < 254; i++) {
        levels[i] = exp2f((float)-i / 16.0f);
        thresholds[i] = exp2f((float)(-i - 0.5) / 16.0f);
    }
    levels[254] = 0.0f;
    levels[255] = NAN;
    f->scale_levels = levels;
    f->scale_thresholds = thresholds;
}

static int width(int dtype) { return dtype == TQAI_FLOAT32 ? 4 : 2; }

static double number(const void *p, int dtype, int64_t i) {
    if (dtype == TQAI_FLOAT32) return (double)((const float *)p)[i];
    const uint16_t half = ((const uint16_t *)p)[i];
    if (dtype == TQAI_BFLOAT16) {
        const uint32_t bits = (uint32_t)half << 16;
        float value;
        memcpy(&value, &bits, 4);
        return (double)value;
    }
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double sign = half >> 15 ? -1.0 : 1.0;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return exponent ? sign * ldexp(1024 + mantissa, exponent - 25) : sign * ldexp(mantissa, -24);
}

/* Rows of ordinary numbers; where `special`, any bits at all among them. */
static void fill(void *p, int dtype, int64_t n, int special) {
    for (int64_t i = 0; i < n; i++) {
        const int odd = special && below(200) == 0;
        if (dtype == TQAI_FLOAT32) {
            const float value = gaussian();
            const uint32_t bits = draw();
            memcpy((float *)p + i, odd ? (const void *)&bits : (const void *)&value, 4);
        } else if (odd) {
            ((uint16_t *)p)[i] = (uint16_t)draw();
        } else if (dtype == TQAI_BFLOAT16) {
            const float value = gaussian();
            uint32_t bits;
            memcpy(&bits, &value, 4);
            ((uint16_t *)p)[i] = (uint16_t)(bits >> 16);
        } else {
            ((uint16_t *)p)[i] = (uint16_t)((draw() & 0x83FF) | (uint32_t)(10 + below(6)) << 10);
        }
    }
}

static const char *names[] = {"scalar", "avx2", "avx512", "neon"};

static int fail(const char *what, const char *isa, const tqai_page_format *f) {
    printf("%s differs: %s, %sK%d dim %d, %sV%d dim %d\n", what, isa, f->key.kind ? "trellis " : "", f->key.bits,
           f->key.head_dim, f->value.kind ? "trellis " : "", f->value.bits, f->value.head_dim);
    return 1;
}

static int check_codes(const tqai_page_format *f, uint8_t *raw, int pages, int special) {
    const int dtype = below(3), out_dtype = below(3);
    const int64_t key_stride = f->key.head_dim + 3 * below(2), value_stride = f->value.head_dim + below(2);
    const int64_t kn = key_stride * (64 * pages - 1) + f->key.head_dim, vn = value_stride * (64 * pages - 1) + f->value.head_dim;
    void *keys = room((size_t)(kn * width(dtype))), *values = room((size_t)(vn * width(dtype)));
    fill(keys, dtype, kn, special);
    fill(values, dtype, vn, special);
    const tqai_source ks = {keys, {64 * key_stride, 0, key_stride}, dtype}, vs = {values, {64 * value_stride, 0, value_stride}, dtype};
    const size_t key_bytes = (size_t)(pages * 64 * f->key.head_dim * width(out_dtype));
    const size_t value_bytes = (size_t)(pages * 64 * f->value.head_dim * width(out_dtype));
    void *first[2] = {room(key_bytes), room(value_bytes)};
    uint8_t *again = room((size_t)(pages * f->page_bytes));
    int wrong = 0;
    for (int i = 0; i < 4 && !wrong; i++) {
        if (tqai_set_isa(names[i]) != TQAI_OK) continue;
        uint8_t *to = i == 0 ? raw : again;
        void *out[2] = {room(key_bytes), room(value_bytes)};
        if (tqai_encode(f, &ks, &vs, to, pages, 1, 1 + below(3)) != TQAI_OK) wrong = fail("encode refused", names[i], f);
        else if (memcmp(raw, to, (size_t)(pages * f->page_bytes))) wrong = fail("encode", names[i], f);
        tqai_decode(f, raw, out[0], out[1], out_dtype, pages, 1 + below(3));
        if (i == 0) {
            memcpy(first[0], out[0], key_bytes);
            memcpy(first[1], out[1], value_bytes);
        }
        for (int64_t k = 0; k < pages * 64 * (int64_t)f->key.head_dim && !wrong; k++) {
            const double a = number(first[0], out_dtype, k), b = number(out[0], out_dtype, k);
            if (a != b && !(a != a && b != b)) wrong = fail("decode", names[i], f);
        }
        if (!wrong && memcmp(first[1], out[1], value_bytes) && !special) wrong = fail("decode", names[i], f);
        free(out[0]);
        free(out[1]);
    }
    free(first[0]);
    free(first[1]);
    free(again);
    free(keys);
    free(values);
    return wrong;
}

/* Attention of one sequence over decoded pages and recent tokens, in double; worst error of a query. */
static double reference(const tqai_attend_args *a, const float *keys, const float *values, const float *out) {
    const int dk = a->format->key.head_dim, dv = a->format->value.head_dim, history = a->pages * 64 - a->first_token;
    const int tokens = a->exact[0].tokens + history + a->exact[1].tokens;
    double worst = 0.0, *weight = room(sizeof(double) * (size_t)tokens), *sum = room(sizeof(double) * (size_t)dv);
    for (int head = 0; head < a->kv_heads * a->group; head++)
        for (int i = 0; i < a->new_tokens; i++) {
            const int kv = head / a->group;
            double most = -INFINITY, total = 0.0, error = 0.0, size = 0.0;
            for (int pass = 0; pass < 2; pass++) {
                if (pass) memset(sum, 0, sizeof(double) * (size_t)dv);
                for (int t = 0; t < tokens; t++) {
                    const tqai_exact *e = t < a->exact[0].tokens ? &a->exact[0] : &a->exact[1];
                    const int inside = t - a->exact[0].tokens, late = inside - history;
                    const int of_history = inside >= 0 && late < 0, row = late < 0 ? t : late;
                    const int64_t h = (((int64_t)(inside + a->first_token) / 64 * a->kv_heads + kv) * 64 + (inside + a->first_token) % 64);
                    if (a->mask ? !a->mask[(head * a->new_tokens + i) * tokens + t]
                                : late > a->exact[1].tokens - a->new_tokens + i)
                        weight[t] = -INFINITY;
                    else if (!pass) {
                        double dot = 0.0;
                        for (int d = 0; d < dk; d++)
                            dot += number(a->query, a->query_dtype, ((int64_t)head * a->new_tokens + i) * dk + d) *
                                   (of_history ? (double)keys[h * dk + d]
                                               : number(e->keys, e->key_dtype, kv * e->key_strides[1] + row * e->key_strides[2] + d));
                        dot *= (double)a->scaling;
                        weight[t] = a->softcap > 0.0f ? (double)a->softcap * tanh(dot / (double)a->softcap) : dot;
                        if (weight[t] > most) most = weight[t];
                    }
                    if (!pass || weight[t] == -INFINITY) continue;
                    const double p = exp(weight[t] - most);
                    total += p;
                    for (int d = 0; d < dv; d++)
                        sum[d] += p * (of_history ? (double)values[h * dv + d]
                                                  : number(e->values, e->value_dtype, kv * e->value_strides[1] + row * e->value_strides[2] + d));
                }
            }
            for (int d = 0; d < dv; d++) {
                const double want = total > 0.0 ? sum[d] / total : 0.0, got = (double)out[((int64_t)head * a->new_tokens + i) * dv + d];
                error += (want - got) * (want - got);
                size += want * want;
            }
            if (!(sqrt(error) <= worst * sqrt(size))) worst = sqrt(error) / (sqrt(size) + 1e-30);
        }
    free(weight);
    free(sum);
    return worst;
}

/* Any bytes are trellis codes, or codes of a power of two of levels; scales are of numbers from 1/2 to 2. */
static void random_pages(const tqai_page_format *f, uint8_t *raw, int pages) {
    for (int64_t i = 0; i < pages * f->page_bytes; i++) raw[i] = (uint8_t)draw();
    for (int i = 0; i < 2 * pages; i++) {
        uint8_t *page = raw + i / 2 * f->page_bytes, *scales = page + (i % 2 ? f->value_scales_at : f->key_scales_at);
        const uint16_t two = 0x4000;
        for (int t = 0; t < 64; t++) {
            const uint16_t scale = (uint16_t)(0x3F00 + below(256));
            if (f->bases_at) scales[t] = (uint8_t)below(32);
            else memcpy(scales + 2 * t, &scale, 2);
        }
        if (f->bases_at) memcpy(page + f->bases_at + 2 * (i % 2), &two, 2);
    }
}

static int check_attention(const tqai_page_format *f) {
    tqai_attend_args a = {.format = f, .batch = 1, .kv_heads = 1 + below(3), .group = 1 + below(9), .new_tokens = 1 + below(4),
                          .pages = below(12), .threads = 1 + below(3), .scaling = 1.0f / sqrtf((float)f->key.head_dim),
                          .softcap = below(4) ? 0.0f : 5.0f, .causal = 1};
    a.first_token = a.pages ? below(64) : 0;
    const int pages = a.pages * a.kv_heads, dk = f->key.head_dim, dv = f->value.head_dim;
    uint8_t *raw = room((size_t)(pages * f->page_bytes));
    const int trellis = f->key.kind == TQAI_TRELLIS || f->value.kind == TQAI_TRELLIS;
    int wrong = pages && !trellis ? check_codes(f, raw, pages, 0) : 0;
    if (trellis) random_pages(f, raw, pages); /* the search in plain C takes long */
    float *keys = room(sizeof(float) * (size_t)(pages * 64 * dk)), *values = room(sizeof(float) * (size_t)(pages * 64 * dv));
    tqai_decode(f, raw, keys, values, TQAI_FLOAT32, pages, 1);
    int64_t *addresses = room(sizeof(int64_t) * (size_t)a.pages);
    for (int p = 0; p < a.pages; p++) addresses[p] = (int64_t)(intptr_t)raw + p * a.kv_heads * f->page_bytes;
    const int64_t rows = (int64_t)a.kv_heads * a.group * a.new_tokens;
    float *query = room(sizeof(float) * (size_t)(rows * dk)), *lse = room(sizeof(float) * (size_t)rows);
    fill(query, TQAI_FLOAT32, rows * dk, 0);
    a.query = query;
    a.query_strides[1] = a.new_tokens * dk;
    a.query_strides[2] = dk;
    a.lse = lse;
    a.addresses = addresses;
    void *exact[4];
    for (int i = 0; i < 2; i++) {
        tqai_exact *e = &a.exact[i];
        e->tokens = i ? a.new_tokens + below(130) : below(3) * below(40);
        e->key_dtype = below(3);
        e->value_dtype = below(3);
        const int64_t gap = below(2);
        e->key_strides[2] = dk + gap;
        e->key_strides[1] = e->tokens * (dk + gap);
        e->value_strides[2] = dv;
        e->value_strides[1] = (int64_t)e->tokens * dv;
        exact[2 * i] = room((size_t)(a.kv_heads * e->key_strides[1] * width(e->key_dtype)));
        exact[2 * i + 1] = room((size_t)(a.kv_heads * e->value_strides[1] * width(e->value_dtype)));
        fill(exact[2 * i], e->key_dtype, a.kv_heads * e->key_strides[1], 0);
        fill(exact[2 * i + 1], e->value_dtype, a.kv_heads * e->value_strides[1], 0);
        e->keys = exact[2 * i];
        e->values = exact[2 * i + 1];
    }
    const int history = a.pages * 64 - a.first_token, tokens = a.exact[0].tokens + history + a.exact[1].tokens;
    a.exact[1].first_column = a.exact[0].tokens + history;
    uint8_t *mask = room((size_t)(rows * tokens));
    if (below(2)) {
        for (int64_t i = 0; i < rows * tokens; i++) mask[i] = below(3) > 0;
        a.mask = mask;
        a.mask_strides[1] = (int64_t)a.new_tokens * tokens;
        a.mask_strides[2] = tokens;
        a.mask_strides[3] = 1;
    }
    for (int i = 0; i < 4 && !wrong; i++) {
        if (tqai_set_isa(names[i]) != TQAI_OK) continue;
        float *out = room(sizeof(float) * (size_t)(rows * dv));
        a.out = out;
        if (tqai_attend(&a) != TQAI_OK) wrong = fail("attend refused", names[i], f);
        const double error = wrong ? 0.0 : reference(&a, keys, values, out);
        if (!(error < 4e-3)) {
            printf("relative error %.2e: ", error);
            wrong = fail("attend", names[i], f);
        }
        free(out);
    }
    for (int i = 0; i < 4; i++) free(exact[i]);
    free(mask);
    free(query);
    free(lse);
    free(addresses);
    free(keys);
    free(values);
    free(raw);
    return wrong;
}

int main(int argc, char **argv) {
    state = argc > 1 ? strtoull(argv[1], NULL, 10) * 2 + 1 : 1;
    const double seconds = argc > 2 ? atof(argv[2]) : 1.0;
    const time_t begin = time(NULL);
    int rounds = 0;
    for (; rounds < 3 || difftime(time(NULL), begin) < seconds; rounds++) {
        tqai_page_format f;
        format_make(&f);
        const int pages = f.key.kind || f.value.kind ? 1 : 1 + below(3);
        uint8_t *raw = room((size_t)(pages * f.page_bytes));
        const int wrong = check_codes(&f, raw, pages, 1) || check_attention(&f);
        free(raw);
        free((void *)f.scale_levels);
        free((void *)f.scale_thresholds);
        codec_free(&f.key);
        codec_free(&f.value);
        if (wrong) return 1;
    }
    printf("%d rounds without a difference\n", rounds);
    return 0;
}
