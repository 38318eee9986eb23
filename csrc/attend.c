/* attend.c: one attention step over packed history and exact tokens (flash decoding).
 *
 * The pages of a sequence are split into parts by their number alone, so that its result has the same bits
 * whatever the number of threads and whatever else is in the batch. Tasks, in this order:
 *
 *   history   one part of the pages, for a group of heads (all of them where there are tasks enough); a thread
 *             goes from part to part of the same heads (spread.c)
 *   last      one per sequence and head: the exact tokens, then, when all parts of the history are done,
 *             the merge: parts add up in the rotated space, are rotated back once, joined with the exact
 *             part, normalised and written in the query's dtype
 */
#include <float.h>
#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "job.h"
#include "layout.h"
#include "spread.h"

#define TASKS_PER_THREAD 32

static void exact_part(const job *j, const place *at) {
    const tqai_attend_args *a = j->args;
    const int key_dim = a->format->key.head_dim, value_dim = a->format->value.head_dim;
    float q[MAX_ROWS * TQAI_MAX_HEAD_DIM];
    uint8_t causal[MAX_ROWS][TQAI_PAGE_TOKENS];
    for (int r = 0, rows; r < j->rows; r += rows) {
        rows = tqai_block_rows(j->rows - r);
        const size_t row = at->first_row + (size_t)r;
        for (int i = 0; i < rows; i++) tqai_load_query(j, at, r + i, q + i * key_dim);
        for (int which = 0; which < 2; which++) {
            const tqai_exact *e = &a->exact[which];
            for (int t = 0; t < e->tokens; t += TQAI_PAGE_TOKENS) {
                const int tokens = e->tokens - t < TQAI_PAGE_TOKENS ? e->tokens - t : TQAI_PAGE_TOKENS;
                block_mask mask = {.stride = a->mask_strides[3], .first = 0};
                int masked = a->mask != NULL;
                for (int i = 0; i < rows; i++) mask.row[i] = tqai_mask_at(j, at, r + i, e->first_column + t);
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
                j->kernels->exact_block(q, rows, key_dim, value_dim, tqai_element(e->keys, e->key_dtype, ks),
                                        e->key_strides[2], e->key_dtype, tqai_element(e->values, e->value_dtype, vs),
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
    _Alignas(64) float x[16 * TQAI_MAX_HEAD_DIM], row[TQAI_MAX_HEAD_DIM];
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
            memset(row, 0, sizeof(float) * (size_t)dim);
            for (int p = 0; p < j->parts; p++) {
                const row_state *s = &j->state[r + (size_t)p * rows];
                const float *acc = j->acc + (r + (size_t)p * rows) * (size_t)dim;
                const float weight = s->max == -INFINITY ? 0.0f : expf(s->max - largest[l]);
                total[l] += s->max == -INFINITY ? s->sum : s->sum * weight; /* 0 or NaN where nothing was seen */
                if (p == j->history_parts) exact_weight[l] = weight;
                else if (weight != 0.0f) j->kernels->add_row(acc, weight, dim, row);
            }
            for (int d = 0; d < dim; d++) x[lanes * d + l] = row[d];
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
            j->kernels->from_float(row, a->query_dtype, dim, (char *)tqai_element(a->out, a->query_dtype, query * dim));
            a->lse[query] = total[l] == 0.0f ? -INFINITY : largest[l] + logf(total[l]);
        }
    }
}

static void clear(const job *j, const place *at) {
    const size_t dim = (size_t)j->args->format->value.head_dim;
    memset(j->acc + at->first_row * dim, 0, sizeof(float) * (size_t)j->rows * dim);
    for (int r = 0; r < j->rows; r++) j->state[at->first_row + (size_t)r] = (row_state){-INFINITY, 0.0f};
}

static void history_task(const job *j, int task) {
    const int heads = j->args->kv_heads, part = task % j->history_parts, group = task / j->history_parts % j->head_groups;
    const int batch = task / j->history_parts / j->head_groups;
    const int first = heads * group / j->head_groups, last = heads * (group + 1) / j->head_groups;
    for (int head = first; head < last; head++) {
        const place at = tqai_place_of(j, batch, head, part);
        clear(j, &at);
    }
    tqai_rotate_ahead(j, batch, first, last, (last - first) * part / j->history_parts);
    tqai_history_part(j, batch, first, last, part);
    for (int head = first; head < last; head++)
        atomic_fetch_add_explicit(&j->finished[batch * heads + head], 1, memory_order_release);
}

static void last_task(const job *j, int pair) {
    const place at = tqai_place_of(j, pair / j->args->kv_heads, pair % j->args->kv_heads, j->history_parts);
    if (j->parts > j->history_parts) {
        clear(j, &at);
        exact_part(j, &at);
    }
    /* every task of the history has been claimed before this one, so somebody is at work on it */
    while (atomic_load_explicit(&j->finished[pair], memory_order_acquire) < j->history_parts) sched_yield();
    merge(j, &at);
}

static void run_task(void *context, int task) {
    const job *j = context;
    const int history = j->history_parts * j->head_groups * j->args->batch;
    if (task < history) history_task(j, task);
    else last_task(j, task - history);
}

static int32_t check(const tqai_attend_args *a) {
    if (!a || !a->format || !a->query || !a->out || !a->lse) return TQAI_NULL;
    if (!tqai_serves(&a->format->key) || !tqai_serves(&a->format->value)) return TQAI_BAD_SIZE;
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
    for (int64_t b = 0; b < a->batch; b++) {
        const int64_t pages = a->counts ? a->counts[b] : a->pages;
        if (pages < 0 || pages > a->pages) return TQAI_BAD_SIZE;
        for (int64_t p = 0; p < pages; p++) {
            const int64_t address = a->addresses[b * a->address_stride + p];
            if (address == 0) return TQAI_NULL;
            if (address % 16 != 0) return TQAI_UNALIGNED;
        }
    }
    return TQAI_OK;
}

/* Parts of the history, and groups of heads: tasks so small that threads end together, of some 10 us, and no more
 * heads apart than that takes, as all heads of a page lie side by side. */
static void divide(job *j, int threads) {
    const tqai_attend_args *a = j->args;
    j->history_parts = 0;
    for (int b = 0; b < a->batch; b++) {
        const int parts = tqai_parts(tqai_pages_of(j, b));
        if (parts > j->history_parts) j->history_parts = parts; /* those that a sequence lacks stay empty */
    }
    j->head_groups = 1;
    if (j->history_parts > 0 && threads > 1) {
        const int tasks = j->history_parts * a->batch;
        j->head_groups = (TASKS_PER_THREAD * threads + tasks - 1) / tasks;
        if (j->head_groups > a->kv_heads) j->head_groups = a->kv_heads;
    }
    j->parts = j->history_parts + (a->exact[0].tokens + a->exact[1].tokens > 0 || j->history_parts == 0);
}

int32_t tqai_attend(const tqai_attend_args *a) {
    const int32_t refused = check(a);
    if (refused) return refused;
    const int pairs = a->batch * a->kv_heads, threads = a->threads > 1 ? a->threads : 1;
    job j = {.args = a, .kernels = tqai_chosen(), .rows = a->group * a->new_tokens};
    divide(&j, threads);
    const size_t queries = (size_t)pairs * (size_t)j.rows, rows = queries * (size_t)j.parts;
    const size_t acc = rows * (size_t)a->format->value.head_dim * sizeof(float);
    const size_t q = queries * (size_t)a->format->key.head_dim * sizeof(int16_t);
    const tqai_codec *key = &a->format->key;
    const int as_bytes = j.kernels->split_queries && key->kind == TQAI_SCALAR && j.kernels->of_bytes(key);
    const size_t bytes = as_bytes ? (size_t)pairs * (size_t)tqai_row_blocks(j.rows) * sizeof(tqai_query_bytes) : 0;
    char *memory = malloc(acc + q + rows * sizeof(row_state) + 2 * queries * sizeof(float) + 2 * (size_t)pairs * sizeof(atomic_int) + bytes);
    if (!memory) return TQAI_NO_MEMORY;
    j.acc = (float *)memory;
    j.q = (int16_t *)(memory + acc);
    j.state = (row_state *)(memory + acc + q);
    j.factor = (float *)(j.state + rows);
    j.length = j.factor + queries;
    j.rotated = (atomic_int *)(j.length + queries);
    j.finished = j.rotated + pairs;
    j.query_bytes = as_bytes ? (tqai_query_bytes *)(j.finished + pairs) : NULL;
    for (int i = 0; i < 2 * pairs; i++) atomic_init(&j.rotated[i], 0);
    tqai_spread(threads, j.history_parts * j.head_groups * a->batch, pairs, run_task, &j);
    free(memory);
    return TQAI_OK;
}
