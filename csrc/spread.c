/* spread.c: each thread has a range of the tasks, which it takes from the front and others from the end.
 *
 *   tasks   0 1 2 3 4 5 | 6 7 8 9 10 11        two threads
 *           ->       <- | ->         <-        owner, and a thread that has nothing left of its own
 *
 * A range is one 64-bit word, so that front and end change together:
 *
 *   bit 63 ..... 32 | 31 ..... 0
 *       end         | next
 */
#include "spread.h"

#include <stdatomic.h>
#include <stdint.h>

#define MAX_SEATS 256

typedef struct {
    _Alignas(64) _Atomic uint64_t word; /* a cache line each */
} range;

typedef struct {
    range ranges[MAX_SEATS];
    atomic_int next_last;
    int seats, tasks, last;
    tqai_task task;
    void *context;
} spread;

/* A task of a range, or -1. */
static int claim(range *r, int from_end) {
    uint64_t word = atomic_load(&r->word);
    for (;;) {
        const uint32_t next = (uint32_t)word, end = (uint32_t)(word >> 32);
        if (next >= end) return -1;
        const uint64_t after = from_end ? (uint64_t)(end - 1) << 32 | next : (uint64_t)end << 32 | (next + 1);
        if (atomic_compare_exchange_weak(&r->word, &word, after)) return (int)(from_end ? end - 1 : next);
    }
}

static void run_seat(void *context, int seat) {
    spread *s = context;
    for (int i = 0; i < s->seats; i++) {
        range *r = &s->ranges[(seat + i) % s->seats];
        for (int task; (task = claim(r, i > 0)) >= 0;) s->task(s->context, task);
    }
    for (int i; (i = atomic_fetch_add(&s->next_last, 1)) < s->last;) s->task(s->context, s->tasks + i);
}

void tqai_spread(int threads, int tasks, int last, tqai_task task, void *context) {
    spread s = {.tasks = tasks, .last = last, .task = task, .context = context};
    s.seats = threads < 1 ? 1 : threads > MAX_SEATS ? MAX_SEATS : threads;
    if (s.seats > tasks + last) s.seats = tasks + last;
    for (int i = 0; i < s.seats; i++) {
        const uint64_t next = (uint64_t)((int64_t)tasks * i / s.seats), end = (uint64_t)((int64_t)tasks * (i + 1) / s.seats);
        atomic_init(&s.ranges[i].word, end << 32 | next);
    }
    atomic_init(&s.next_last, 0);
    tqai_parallel(threads, s.seats, run_seat, &s);
}
