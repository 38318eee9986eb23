/* history.c: the page loop. One task attends to some pages of some heads of a sequence.
 *
 * Memory holds the records of all heads of a page side by side. A task takes blocks of pages in order and
 * within a block head after head, while it prefetches the next block in the order of memory:
 *
 *   block 0          head 0: page 0 1 .. 7   head 1: page 0 1 .. 7   ...         computed
 *   prefetched       page 8: head 0 1 2 ..   page 9: head 0 1 2 ..   ...         one record for one record
 *
 * so that what comes from memory comes as one stream, which is twice as fast as by heads.
 */
#include <math.h>

#include "job.h"

typedef struct {
    const uint8_t *page[BLOCK_PAGES]; /* of the first head of the task */
    int pages;
} block;

static block block_at(const job *j, int batch, int first_head, int start, int pages) {
    const int64_t *addresses = j->args->addresses + batch * j->args->address_stride;
    block b = {.pages = pages - start < BLOCK_PAGES ? pages - start : BLOCK_PAGES};
    for (int p = 0; p < b.pages; p++)
        b.page[p] = (const uint8_t *)(intptr_t)addresses[start + p] + first_head * j->args->format->page_bytes;
    return b;
}

static inline void prefetch_scales(const tqai_page_format *f, const uint8_t *page) {
    __builtin_prefetch(page + f->key_scales_at, 0, 2);
    __builtin_prefetch(page + f->key_scales_at + 64, 0, 2);
    __builtin_prefetch(page + f->value_scales_at, 0, 2);
    __builtin_prefetch(page + f->value_scales_at + 64, 0, 2);
}

/* Whether the logits of some rows are so far apart that byte factors of the queries would show: by the length of the
 * longest query and of the longest key. The same for every thread and batch. */
static int needs_fine(const job *j, size_t query, int rows, float largest_scale) {
    const tqai_codec *key = &j->args->format->key;
    if (key->kind != TQAI_SCALAR || !j->kernels->of_bytes(key)) return 0;
    float longest = 0.0f;
    for (int r = 0; r < rows; r++) longest = j->length[query + (size_t)r] > longest ? j->length[query + (size_t)r] : longest;
    return longest * largest_scale > DEVIATION_OF_BYTES;
}

/* One head of a block. `next` has `pages` addresses of records to prefetch. */
static void head_block(const job *j, const place *at, const uint8_t *const *page, const uint8_t *const *next, int pages,
                       int first, int64_t column) {
    const tqai_attend_args *a = j->args;
    const tqai_page_format *f = a->format;
    _Alignas(64) float logit[MAX_ROWS * BLOCK_TOKENS];
    _Alignas(64) float key_scale[BLOCK_TOKENS], value_scale[BLOCK_TOKENS];
    const uint8_t *values[BLOCK_PAGES], *next_values[BLOCK_PAGES];
    for (int p = 0; p < pages; p++) {
        values[p] = page[p] + f->value_codes_at;
        next_values[p] = next[p] + f->value_codes_at;
        j->kernels->scales(f, page[p], 0, 1.0f, key_scale + TQAI_PAGE_TOKENS * p);
        j->kernels->scales(f, page[p], 1, VALUE_DOWN, value_scale + TQAI_PAGE_TOKENS * p);
    }
    /* few scales are prefetched at a time: for more lines than a core can keep track of it would wait */
    const int step_pages = 4;
    uint32_t key_least, key_most;
    j->kernels->range(key_scale, TQAI_PAGE_TOKENS * pages, &key_least, &key_most);
    const float largest_scale = key_most <= 0x7F800000u ? bits_to_float(key_most) : j->kernels->largest(key_scale, TQAI_PAGE_TOKENS * pages);
    for (int r = 0, rows; r < j->rows; r += rows) {
        rows = tqai_block_rows(j->rows - r);
        const size_t query = (size_t)at->pair * (size_t)j->rows + (size_t)r, row = at->first_row + (size_t)r;
        const int16_t *q = j->q + query * (size_t)f->key.head_dim;
        const int fine = needs_fine(j, query, rows, largest_scale);
        float factor[MAX_ROWS];
        const tqai_query_bytes *bytes = j->query_bytes ? tqai_bytes_of_row(j, at->pair, r) : NULL;
        float largest[MAX_ROWS * LARGEST_LANES];
        for (int i = 0; i < rows * LARGEST_LANES; i++) largest[i] = -INFINITY;
        for (int i = 0; i < rows; i++) factor[i] = j->factor[query + (size_t)i] * (fine ? 1.0f / FACTOR_PARTS : 1.0f);
        for (int p = 0; p < pages; p += step_pages) {
            const int count = pages - p < step_pages ? pages - p : step_pages;
            j->kernels->key_logits(&f->key, page + p, next + p, count, q, bytes, rows, fine, key_scale + TQAI_PAGE_TOKENS * p,
                                   logit + TQAI_PAGE_TOKENS * p, largest);
            for (int i = p; i < p + count && r == 0; i++) prefetch_scales(f, next[i]);
        }
        block_mask mask = {.stride = a->mask_strides[3], .first = first};
        for (int i = 0; i < rows; i++) mask.row[i] = tqai_mask_at(j, at, r + i, column);
        float *acc = j->acc + row * (size_t)f->value.head_dim;
        j->kernels->values_block(logit, largest, key_most, factor, value_scale, &f->value, values, next_values, pages,
                                 a->mask || first ? &mask : NULL, a->softcap, rows, j->state + row, acc);
    }
}

void tqai_history_part(const job *j, int batch, int first_head, int last_head, int part) {
    const tqai_attend_args *a = j->args;
    const int64_t record = a->format->page_bytes;
    const int heads = last_head - first_head, pages = tqai_pages_of(j, batch), size = tqai_part_pages(pages);
    const int begin = part * size < pages ? part * size : pages;
    const int end = pages - begin < size ? pages : begin + size;
    block now = block_at(j, batch, first_head, begin, pages);
    for (int start = begin; start < end; start += BLOCK_PAGES) {
        /* beyond this part lies the next one, which the same thread takes as a rule (spread.c) */
        const block next = start + BLOCK_PAGES < pages ? block_at(j, batch, first_head, start + BLOCK_PAGES, pages) : now;
        const int64_t column = a->exact[0].tokens + (int64_t)start * TQAI_PAGE_TOKENS - a->first_token;
        int to_page = 0, to_head = 0; /* the record to prefetch next */
        for (int h = 0; h < heads; h++) {
            const uint8_t *page[BLOCK_PAGES], *ahead[BLOCK_PAGES];
            for (int p = 0; p < now.pages; p++) {
                page[p] = now.page[p] + h * record;
                ahead[p] = next.page[to_page] + to_head * record;
                if (++to_head == heads) {
                    to_head = 0;
                    if (to_page + 1 < next.pages) to_page++;
                }
            }
            const place at = tqai_place_of(j, batch, first_head + h, part);
            tqai_rotate_queries(j, &at);
            head_block(j, &at, page, ahead, now.pages, start == 0 ? a->first_token : 0, column);
        }
        now = next;
    }
}
