/* job.h: one call of tqai_attend while it runs; shared by attend.c, query.c and history.c.
 *
 * A pair is one KV head of one sequence; its rows are the query rows that read it:
 *
 *   row r = query head in group * new_tokens + new token
 *   part  acc [rows][value_dim] | state [rows]         un-normalised, values times 2^-24
 */
#ifndef TQAI_JOB_H
#define TQAI_JOB_H

#include <stdatomic.h>

#include "isa.h"

#define MOST_PARTS 16

typedef struct {
    const tqai_attend_args *args;
    const tqai_kernels *kernels;
    int rows, parts, history_parts; /* parts of one pair: those of the history, then the exact tokens if any */
    int head_groups;                /* a history task computes one part of every head of a group */
    float *acc;                     /* [pairs][parts][rows][value_dim] */
    row_state *state;               /* [pairs][parts][rows] */
    int16_t *q;                     /* [pairs][rows][key_dim], rotated */
    tqai_query_bytes *query_bytes;  /* [pairs][tqai_row_blocks(rows)], or null where the kernels want none */
    float *factor;                  /* [pairs][rows]: what a dot product with q is to be multiplied by */
    float *length;                  /* [pairs][rows]: of the scaled query over sqrt(key_dim) */
    atomic_int *rotated;            /* [pairs]: 0 not yet, 1 somebody is at it, 2 q and factor are there */
    atomic_int *finished;           /* [pairs]: history parts that are done */
} job;

typedef struct {
    int batch, head, pair, part;
    size_t first_row; /* index of row 0 of this part in acc and state */
} place;

place tqai_place_of(const job *j, int batch, int head, int part);

/* Query row `row` of a pair, scaled, as floats. */
void tqai_load_query(const job *j, const place *at, int row, float *to);

/* Rotate those queries of some heads that nobody is at, from the start'th on: threads begin at different heads. */
void tqai_rotate_ahead(const job *j, int batch, int first_head, int last_head, int start);

/* See to it that q and factor of the pair are there. */
void tqai_rotate_queries(const job *j, const place *at);

/* Mask bytes of `row` at column `column`, or null. */
const uint8_t *tqai_mask_at(const job *j, const place *at, int row, int64_t column);

static inline int tqai_pages_of(const job *j, int batch) { return j->args->counts ? j->args->counts[batch] : j->args->pages; }

/* Pages of each part of a history: whole blocks, and at most MOST_PARTS parts. */
static inline int tqai_part_pages(int pages) {
    int size = BLOCK_PAGES;
    while (pages > MOST_PARTS * size) size *= 2;
    return size;
}

static inline int tqai_parts(int pages) {
    const int size = tqai_part_pages(pages);
    return (pages + size - 1) / size;
}

/* One part of the history for heads first_head .. last_head - 1 of a sequence. */
void tqai_history_part(const job *j, int batch, int first_head, int last_head, int part);

static inline const char *tqai_element(const void *base, int dtype, int64_t elements) {
    return (const char *)base + elements * (dtype == TQAI_FLOAT32 ? 4 : 2);
}

/* How many of `left` rows the next kernel call takes. */
static inline int tqai_block_rows(int left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

/* So many kernel calls take all rows, at most; row r, where one begins, belongs to call number r / 4 + r % 4 / 2. */
static inline int tqai_row_blocks(int rows) { return rows / 4 + 2; }

static inline tqai_query_bytes *tqai_bytes_of_row(const job *j, int pair, int row) {
    return j->query_bytes + (size_t)pair * (size_t)tqai_row_blocks(j->rows) + row / 4 + row % 4 / 2;
}

#endif
