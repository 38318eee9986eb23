/* attend.c: one attention step over packed history and exact tokens (flash decoding).
 *
 * For every sequence and KV head the pages are split into parts, and the exact tokens are one part more.
 * A task computes one part for all query rows of the head's group:
 *
 *   row r = query head in group * new_tokens + new token
 *   part:  acc [rows][value_dim] | state [rows]         un-normalised, values times 2^-24
 *
 * and whoever finishes the last part of a head merges them: history parts add up in the rotated space,
 * are rotated back once, joined with the exact part, normalised and written in the query's dtype.
 */
#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "isa.h"
#include "layout.h"
#include "pool.h"

#define PARTS_PER_THREAD 6

typedef struct {
    const tqai_attend_args *args;
    const tqai_kernels *kernels;
    int rows, parts, history_parts; /* parts: of one head, the exact one included */
    float *acc;                     /* [batch * kv_heads][parts][rows][value_dim] */
    row_state *state;               /* [batch * kv_heads][parts][rows] */
    int16_t *q;                     /* [batch * kv_heads][parts][rows][key_dim] */
    float *factor;                  /* [batch * kv_heads][parts][rows] */
    atomic_int *finished;           /* [batch * kv_heads] */
} job;

typedef struct {
    int batch, head, part; /* of one task */
    size_t first_row;      /* index of its row 0 in the arrays of the job */
} place;

static inline const char *element(const void *base, int dtype, int64_t elements) {
    return (const char *)base + elements * (dtype == TQAI_FLOAT32 ? 4 : 2);
}

static inline int block_rows(int left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

static void load_query(const job *j, const place *at, int row, float *to) {
    const tqai_attend_args *a = j->args;
    const int64_t head = (int64_t)at->head * a->group + row / a->new_tokens;
    const int64_t offset = at->batch * a->query_strides[0] + head * a->query_strides[1] +
                           row % a->new_tokens * a->query_strides[2];
    const int dim = a->format->key.head_dim;
    j->kernels->to_float(element(a->query, a->query_dtype, offset), a->query_dtype, dim, to);
    for (int d = 0; d < dim; d++) to[d] *= a->scaling;
}

/* Mask bytes of `row` at column `column`, or null. */
static const uint8_t *mask_at(const job *j, const place *at, int row, int64_t column) {
    const tqai_attend_args *a = j->args;
    if (!a->mask) return NULL;
    const int64_t head = (int64_t)at->head * a->group + row / a->new_tokens;
    return a->mask + (at->batch * a->mask_strides[0] + head * a->mask_strides[1] +
                      row % a->new_tokens * a->mask_strides[2] + column * a->mask_strides[3]);
}

/* Rotate the queries and round them to int16, so finely that an int32 holds every dot product. */
static void rotate_queries(const job *j, const place *at) {
    const tqai_codec *key = &j->args->format->key;
    const int dim = key->head_dim;
    float x[16 * TQAI_MAX_HEAD_DIM], row[TQAI_MAX_HEAD_DIM];
    const int lanes = j->rows <= 4 ? 4 : 16;
    for (int first = 0; first < j->rows; first += lanes) {
        const int count = j->rows - first < lanes ? j->rows - first : lanes;
        memset(x, 0, sizeof(float) * (size_t)(lanes * dim));
        for (int l = 0; l < count; l++) {
            load_query(j, at, first + l, row);
            for (int d = 0; d < dim; d++) x[lanes * d + l] = row[d];
        }
        j->kernels->rotate(key, x, lanes, 0);
        for (int l = 0; l < count; l++) {
            float most = 0.0f, total = 0.0f;
            for (int d = 0; d < dim; d++) {
                const float magnitude = fabsf(x[lanes * d + l]);
                most = magnitude > most ? magnitude : most;
                total += magnitude;
            }
            int16_t *q = j->q + (at->first_row + (size_t)(first + l)) * (size_t)dim;
            float *factor = j->factor + at->first_row + first + l;
            if (!(total < INFINITY) || most < 0x1p-100f) {
                memset(q, 0, sizeof *q * (size_t)dim);
                *factor = total < INFINITY ? 0.0f : NAN;
                continue;
            }
            const float up = fminf(32767.0f / most, key->largest_sum / total);
            for (int d = 0; d < dim; d++) q[d] = (int16_t)lrintf(x[lanes * d + l] * up);
            *factor = key->level_step / up;
        }
    }
}

static void history_part(const job *j, const place *at) {
    const tqai_attend_args *a = j->args;
    const tqai_page_format *f = a->format;
    const int key_dim = f->key.head_dim, value_dim = f->value.head_dim;
    const int begin = (int)((int64_t)a->pages * at->part / j->history_parts);
    const int end = (int)((int64_t)a->pages * (at->part + 1) / j->history_parts);
    const int64_t *addresses = a->addresses + at->batch * a->address_stride;
    _Alignas(64) int32_t dots[MAX_ROWS * BLOCK_TOKENS];
    _Alignas(64) int16_t w[MAX_ROWS * BLOCK_TOKENS];
    float key_scale[BLOCK_TOKENS], value_scale[BLOCK_TOKENS], step[MAX_ROWS];
    rotate_queries(j, at);
    for (int block = begin; block < end; block += BLOCK_PAGES) {
        const int pages = end - block < BLOCK_PAGES ? end - block : BLOCK_PAGES;
        const uint8_t *page[BLOCK_PAGES], *values[BLOCK_PAGES + 1];
        for (int p = 0; p < pages; p++) {
            page[p] = (const uint8_t *)(intptr_t)addresses[block + p] + at->head * f->page_bytes;
            values[p] = page[p] + f->value_codes_at;
            const uint16_t *ks = (const uint16_t *)(page[p] + f->key_scales_at);
            const uint16_t *vs = (const uint16_t *)(page[p] + f->value_scales_at);
            for (int t = 0; t < TQAI_PAGE_TOKENS; t++) {
                key_scale[TQAI_PAGE_TOKENS * p + t] = bits_to_float((uint32_t)ks[t] << 16);
                value_scale[TQAI_PAGE_TOKENS * p + t] = bits_to_float((uint32_t)vs[t] << 16) * VALUE_DOWN;
            }
        }
        const int64_t after = block + pages < end ? addresses[block + pages] : addresses[block];
        values[pages] = (const uint8_t *)(intptr_t)after + at->head * f->page_bytes;
        const int first = block == 0 ? a->first_token : 0;
        const int64_t column = a->exact[0].tokens + (int64_t)block * TQAI_PAGE_TOKENS - a->first_token;
        for (int r = 0, rows; r < j->rows; r += rows) {
            rows = block_rows(j->rows - r);
            const size_t row = at->first_row + (size_t)r;
            const int16_t *q = j->q + row * (size_t)key_dim;
            for (int p = 0; p < pages; p++)
                j->kernels->key_dots(&f->key, page[p], p + 1 < pages ? page[p + 1] : values[0], q, rows,
                                     dots + TQAI_PAGE_TOKENS * p);
            block_mask mask = {.stride = a->mask_strides[3], .first = first};
            for (int i = 0; i < rows; i++) mask.row[i] = mask_at(j, at, r + i, column);
            float *acc = j->acc + row * (size_t)value_dim;
            j->kernels->softmax_block(dots, j->factor + row, key_scale, value_scale,
                                      &f->value, a->mask || first ? &mask : NULL, a->softcap, TQAI_PAGE_TOKENS * pages,
                                      rows, j->state + row, acc, w, step);
            j->kernels->value_sums(&f->value, values, pages, w, step, rows, acc);
        }
    }
}

static void exact_part(const job *j, const place *at) {
    const tqai_attend_args *a = j->args;
    const int key_dim = a->format->key.head_dim, value_dim = a->format->value.head_dim;
    float q[MAX_ROWS * TQAI_MAX_HEAD_DIM];
    uint8_t causal[MAX_ROWS][TQAI_PAGE_TOKENS];
    for (int r = 0, rows; r < j->rows; r += rows) {
        rows = block_rows(j->rows - r);
        const size_t row = at->first_row + (size_t)r;
        for (int i = 0; i < rows; i++) load_query(j, at, r + i, q + i * key_dim);
        for (int which = 0; which < 2; which++) {
            const tqai_exact *e = &a->exact[which];
            for (int t = 0; t < e->tokens; t += TQAI_PAGE_TOKENS) {
                const int tokens = e->tokens - t < TQAI_PAGE_TOKENS ? e->tokens - t : TQAI_PAGE_TOKENS;
                block_mask mask = {.stride = a->mask_strides[3], .first = 0};
                int masked = a->mask != NULL;
                for (int i = 0; i < rows; i++) mask.row[i] = mask_at(j, at, r + i, e->first_column + t);
                if (!a->mask && a->causal && which == 1 && t + tokens > e->tokens - a->new_tokens + 1) {
                    for (int i = 0; i < rows; i++) {
                        const int last = e->tokens - a->new_tokens + (r + i) % a->new_tokens;
                        for (int s = 0; s < tokens; s++) causal[i][s] = t + s <= last;
                        mask.row[i] = causal[i];
                    }
                    mask.stride = 1;
                    masked = 1;
                }
                const int64_t ks = at->batch * e->key_strides[0] + at->head * e->key_strides[1] + t * e->key_strides[2];
                const int64_t vs = at->batch * e->value_strides[0] + at->head * e->value_strides[1] + t * e->value_strides[2];
                j->kernels->exact_block(q, rows, key_dim, value_dim, element(e->keys, e->key_dtype, ks),
                                        e->key_strides[2], e->key_dtype, element(e->values, e->value_dtype, vs),
                                        e->value_strides[2], e->value_dtype, masked ? &mask : NULL, a->softcap,
                                        tokens, j->state + row, j->acc + row * (size_t)value_dim);
            }
        }
    }
}

static void merge(const job *j, const place *at) {
    const tqai_attend_args *a = j->args;
    const tqai_codec *value = &a->format->value;
    const int dim = value->head_dim;
    const size_t first = at->first_row - (size_t)at->part * (size_t)j->rows, rows = (size_t)j->rows;
    const float limit = a->query_dtype == TQAI_FLOAT16 ? 65504.0f : a->query_dtype == TQAI_BFLOAT16 ? 0x1.fep127f : FLT_MAX;
    float x[16 * TQAI_MAX_HEAD_DIM], row[TQAI_MAX_HEAD_DIM];
    const int lanes = j->rows <= 4 ? 4 : 16;
    for (int start = 0; start < j->rows; start += lanes) {
        const int count = j->rows - start < lanes ? j->rows - start : lanes;
        float largest[16], total[16], exact_weight[16] = {0};
        memset(x, 0, sizeof(float) * (size_t)(lanes * dim));
        for (int l = 0; l < count; l++) {
            const size_t r = first + (size_t)(start + l);
            largest[l] = -INFINITY;
            total[l] = 0.0f;
            for (int p = 0; p < j->parts; p++) largest[l] = fmaxf(largest[l], j->state[r + (size_t)p * rows].max);
            for (int p = 0; p < j->parts; p++) {
                const row_state *s = &j->state[r + (size_t)p * rows];
                const float *acc = j->acc + (r + (size_t)p * rows) * (size_t)dim;
                const float weight = s->max == -INFINITY ? 0.0f : expf(s->max - largest[l]);
                total[l] += s->max == -INFINITY ? s->sum : s->sum * weight; /* 0 or NaN where nothing was seen */
                if (p == j->history_parts) exact_weight[l] = weight;
                else if (weight != 0.0f)
                    for (int d = 0; d < dim; d++) x[lanes * d + l] += weight * acc[d];
            }
        }
        j->kernels->rotate(value, x, lanes, 1);
        for (int l = 0; l < count; l++) {
            const int r = start + l;
            const float *acc = j->acc + (first + (size_t)r + (size_t)j->history_parts * rows) * (size_t)dim;
            const float divide = total[l] == 0.0f ? 0.0f : 1.0f / total[l];
            const int with_exact = j->parts > j->history_parts && exact_weight[l] != 0.0f;
            for (int d = 0; d < dim; d++) {
                const float sum = x[lanes * d + l] + (with_exact ? exact_weight[l] * acc[d] : 0.0f);
                const float mean = sum * divide * VALUE_UP;
                row[d] = mean > limit ? limit : mean < -limit ? -limit : mean;
            }
            const int64_t head = (int64_t)at->head * a->group + r / a->new_tokens;
            const int64_t query = ((int64_t)at->batch * a->kv_heads * a->group + head) * a->new_tokens + r % a->new_tokens;
            j->kernels->from_float(row, a->query_dtype, dim, (char *)element(a->out, a->query_dtype, query * dim));
            a->lse[query] = total[l] == 0.0f ? -INFINITY : largest[l] + logf(total[l]);
        }
    }
}

static void run_task(void *context, int task) {
    job *j = context;
    const int heads = j->args->batch * j->args->kv_heads, pair = task % heads;
    place at = {.batch = pair / j->args->kv_heads, .head = pair % j->args->kv_heads, .part = task / heads};
    at.first_row = ((size_t)pair * (size_t)j->parts + (size_t)at.part) * (size_t)j->rows;
    const size_t dim = (size_t)j->args->format->value.head_dim;
    memset(j->acc + at.first_row * dim, 0, sizeof(float) * (size_t)j->rows * dim);
    for (int r = 0; r < j->rows; r++) j->state[at.first_row + (size_t)r] = (row_state){-INFINITY, 0.0f};
    if (at.part < j->history_parts) history_part(j, &at);
    else exact_part(j, &at);
    if (atomic_fetch_add(&j->finished[pair], 1) + 1 == j->parts) merge(j, &at);
}

static int32_t check(const tqai_attend_args *a) {
    if (!a || !a->format || !a->query || !a->out || !a->lse) return TQAI_NULL;
    if (!tqai_served_dim(a->format->key.head_dim) || !tqai_served_dim(a->format->value.head_dim)) return TQAI_BAD_SIZE;
    if (!tqai_served_bits(a->format->key.bits) || !tqai_served_bits(a->format->value.bits)) return TQAI_BAD_SIZE;
    if (a->batch < 1 || a->kv_heads < 1 || a->group < 1 || a->new_tokens < 1 || a->pages < 0) return TQAI_BAD_SIZE;
    if (a->first_token < 0 || a->first_token >= TQAI_PAGE_TOKENS) return TQAI_BAD_SIZE;
    if (a->query_dtype < 0 || a->query_dtype > 2) return TQAI_BAD_SIZE;
    for (int which = 0; which < 2; which++) {
        const tqai_exact *e = &a->exact[which];
        if (e->tokens < 0) return TQAI_BAD_SIZE;
        if (e->tokens > 0 && (!e->keys || !e->values)) return TQAI_NULL;
        if (e->key_dtype < 0 || e->key_dtype > 2 || e->value_dtype < 0 || e->value_dtype > 2) return TQAI_BAD_SIZE;
    }
    if (a->pages > 0 && !a->addresses) return TQAI_NULL;
    for (int64_t b = 0; b < a->batch; b++)
        for (int64_t p = 0; p < a->pages; p++) {
            const int64_t address = a->addresses[b * a->address_stride + p];
            if (address == 0) return TQAI_NULL;
            if (address % 16 != 0) return TQAI_UNALIGNED;
        }
    return TQAI_OK;
}

int32_t tqai_attend(const tqai_attend_args *a) {
    const int32_t refused = check(a);
    if (refused) return refused;
    const int heads = a->batch * a->kv_heads, threads = a->threads > 1 ? a->threads : 1;
    job j = {.args = a, .kernels = tqai_chosen(), .rows = a->group * a->new_tokens};
    int parts = threads == 1 ? 1 : (PARTS_PER_THREAD * threads + heads - 1) / heads;
    const int most = (a->pages + BLOCK_PAGES - 1) / BLOCK_PAGES;
    j.history_parts = parts < most ? parts : most;
    j.parts = j.history_parts + (a->exact[0].tokens + a->exact[1].tokens > 0 || j.history_parts == 0);
    const size_t rows = (size_t)heads * (size_t)j.parts * (size_t)j.rows;
    const size_t acc = rows * (size_t)a->format->value.head_dim * sizeof(float), q = rows * (size_t)a->format->key.head_dim * sizeof(int16_t);
    char *memory = malloc(acc + q + rows * (sizeof(row_state) + sizeof(float)) + (size_t)heads * sizeof(atomic_int));
    if (!memory) return TQAI_NO_MEMORY;
    j.acc = (float *)memory;
    j.q = (int16_t *)(memory + acc);
    j.state = (row_state *)(memory + acc + q);
    j.factor = (float *)(j.state + rows);
    j.finished = (atomic_int *)(j.factor + rows);
    for (int i = 0; i < heads; i++) atomic_init(&j.finished[i], 0);
    tqai_parallel(threads, heads * j.parts, run_task, &j);
    free(memory);
    return TQAI_OK;
}
