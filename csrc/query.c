/* query.c: query rows as the kernels want them. */
#include <math.h>
#include <sched.h>
#include <string.h>

#include "job.h"

place tqai_place_of(const job *j, int batch, int head, int part) {
    const int pair = batch * j->args->kv_heads + head;
    return (place){batch, head, pair, part, ((size_t)pair * (size_t)j->parts + (size_t)part) * (size_t)j->rows};
}

void tqai_load_query(const job *j, const place *at, int row, float *to) {
    const tqai_attend_args *a = j->args;
    const int64_t head = (int64_t)at->head * a->group + row / a->new_tokens;
    const int64_t offset = at->batch * a->query_strides[0] + head * a->query_strides[1] +
                           row % a->new_tokens * a->query_strides[2];
    const int dim = a->format->key.head_dim;
    j->kernels->to_float(tqai_element(a->query, a->query_dtype, offset), a->query_dtype, dim, to);
    for (int d = 0; d < dim; d++) to[d] *= a->scaling;
}

const uint8_t *tqai_mask_at(const job *j, const place *at, int row, int64_t column) {
    const tqai_attend_args *a = j->args;
    if (!a->mask) return NULL;
    const int64_t head = (int64_t)at->head * a->group + row / a->new_tokens;
    return a->mask + (at->batch * a->mask_strides[0] + head * a->mask_strides[1] +
                      row % a->new_tokens * a->mask_strides[2] + column * a->mask_strides[3]);
}

typedef float four __attribute__((vector_size(16)));
typedef int32_t four_bits __attribute__((vector_size(16)));

/* Largest and sum of the magnitudes, and sum of the squares, of 4 of the `lanes` rows of x [dim][lanes]. */
static void magnitudes(const float *x, int dim, int lanes, float *most, float *total, float *square) {
    four largest = {0}, sum = {0}, squares = {0};
    for (int d = 0; d < dim; d++) {
        four_bits bits;
        memcpy(&bits, x + lanes * d, sizeof bits);
        bits &= 0x7FFFFFFF;
        const four magnitude = (four)bits;
        const four_bits above = magnitude > largest; /* no NaN is */
        largest = (four)((bits & above) | ((four_bits)largest & ~above));
        sum += magnitude;
        squares += magnitude * magnitude;
    }
    memcpy(most, &largest, sizeof largest);
    memcpy(total, &sum, sizeof sum);
    memcpy(square, &squares, sizeof squares);
}

/* Rotate the queries and round them to whole numbers, so finely that an int32 holds every dot product. */
static void rotate(const job *j, const place *at) {
    const tqai_codec *key = &j->args->format->key;
    const int dim = key->head_dim;
    float x[16 * TQAI_MAX_HEAD_DIM], row[TQAI_MAX_HEAD_DIM];
    const int lanes = j->rows <= 4 ? 4 : 16;
    for (int first = 0; first < j->rows; first += lanes) {
        const int count = j->rows - first < lanes ? j->rows - first : lanes;
        memset(x, 0, sizeof(float) * (size_t)(lanes * dim));
        for (int l = 0; l < count; l++) {
            tqai_load_query(j, at, first + l, row);
            for (int d = 0; d < dim; d++) x[lanes * d + l] = row[d];
        }
        j->kernels->rotate(key, x, lanes, 0);
        float most_of[16] = {0}, total_of[16] = {0}, square_of[16] = {0}, up_of[16] = {0};
        for (int part = 0; part < lanes; part += 4) magnitudes(x + part, dim, lanes, most_of + part, total_of + part, square_of + part);
        for (int l = 0; l < count; l++) {
            const float most = most_of[l], total = total_of[l];
            const size_t index = (size_t)at->pair * (size_t)j->rows + (size_t)(first + l);
            float *factor = j->factor + index;
            j->length[index] = sqrtf(square_of[l] / (float)dim);
            if (!(total < INFINITY) || most < 0x1p-100f) { /* all numbers become 0 */
                for (int d = 0; d < dim; d++) x[lanes * d + l] = 0.0f;
                *factor = total < INFINITY ? 0.0f : NAN;
                continue;
            }
            const int of_bytes = j->kernels->of_bytes(key);
            const float up = of_bytes ? KEY_FACTOR_OF_BYTES / most : fminf(32767.0f / most, key->largest_sum / total);
            up_of[l] = up;
            *factor = key->level_step * (of_bytes ? (float)FACTOR_PARTS : 1.0f) / up;
        }
        /* + 1.5 * 2^23 rounds, and leaves the whole number in the low bits */
        uint32_t whole[16 * TQAI_MAX_HEAD_DIM];
        for (int part = 0; part < lanes; part += 4)
            for (int d = 0; d < dim; d++)
                for (int l = part; l < part + 4; l++) whole[lanes * d + l] = float_to_bits(x[lanes * d + l] * up_of[l] + 12582912.0f);
        for (int l = 0; l < count; l++) {
            int16_t *q = j->q + ((size_t)at->pair * (size_t)j->rows + (size_t)(first + l)) * (size_t)dim;
            for (int d = 0; d < dim; d++) q[d] = (int16_t)whole[lanes * d + l];
        }
    }
    if (!j->query_bytes) return;
    for (int r = 0, rows; r < j->rows; r += rows) {
        rows = tqai_block_rows(j->rows - r);
        const int16_t *q = j->q + ((size_t)at->pair * (size_t)j->rows + (size_t)r) * (size_t)dim;
        j->kernels->split_queries(key, q, rows, tqai_bytes_of_row(j, at->pair, r));
    }
}

void tqai_rotate_ahead(const job *j, int batch, int first_head, int last_head, int start) {
    for (int i = 0; i < last_head - first_head; i++) {
        const place at = tqai_place_of(j, batch, first_head + (i + start) % (last_head - first_head), 0);
        int none = 0;
        if (!atomic_compare_exchange_strong(&j->rotated[at.pair], &none, 1)) continue;
        rotate(j, &at);
        atomic_store_explicit(&j->rotated[at.pair], 2, memory_order_release);
    }
}

void tqai_rotate_queries(const job *j, const place *at) {
    atomic_int *state = &j->rotated[at->pair];
    if (atomic_load_explicit(state, memory_order_acquire) == 2) return;
    int none = 0;
    if (atomic_compare_exchange_strong(state, &none, 1)) {
        rotate(j, at);
        atomic_store_explicit(state, 2, memory_order_release);
        return;
    }
    while (atomic_load_explicit(state, memory_order_acquire) != 2) sched_yield(); /* a microsecond or two */
}
