/* pool.c: threads that wait for work, first spinning for some microseconds, then asleep; or those of the host's
 * OpenMP runtime (tqai_use_team), which wait for work between the host's own operations anyway: threads of our
 * own would have to take the cores from them each time.
 *
 * Of our own threads:
 *
 * A job is published in one 64-bit word, so that a worker that comes late can only ever claim a task of
 * the job whose fields it has read:
 *
 *   bit 63 ........ 40 | 39 ..... 20 | 19 ...... 0
 *       job number     | tasks       | next task        claimed by compare-and-swap of the whole word
 *
 * The fields of a job (function, context) are written while the word says "none left", and no task of
 * the former job is unfinished then. Workers that sleep through a job are not waited for.
 * After fork the child has no workers: it starts its own on first use.
 */
#define _GNU_SOURCE
#include "pool.h"
#include "tqai.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#define relax() _mm_pause()
#else
#define relax() __asm__ volatile("" ::: "memory")
#endif

#define MAX_WORKERS 255
#define MAX_TASKS ((1 << 20) - 1)
#define SPINS 2000

static _Atomic uint64_t ticket;
static _Atomic(tqai_task) job_task;
static void *_Atomic job_context;
static atomic_int job_workers, done, sleepers;
static atomic_flag busy = ATOMIC_FLAG_INIT;
static int workers; /* started; only touched by the holder of `busy` */
static uint64_t job_number;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;

typedef void (*team_function)(void (*)(void *), void *, unsigned, unsigned);
static _Atomic(team_function) team;

static int left(uint64_t word) { return (word & 0xFFFFF) < ((word >> 20) & 0xFFFFF); }

/* Do one task if there is one for this worker. */
static int work(int worker) {
    uint64_t word = atomic_load(&ticket);
    while (left(word)) {
        tqai_task task = atomic_load(&job_task);
        void *context = atomic_load(&job_context);
        if (worker >= atomic_load(&job_workers)) return 0;
        if (atomic_compare_exchange_weak(&ticket, &word, word + 1)) {
            task(context, (int)(word & 0xFFFFF));
            atomic_fetch_add(&done, 1);
            return 1;
        }
    }
    return 0;
}

static void *worker_main(void *argument) {
    const int worker = (int)(intptr_t)argument;
    for (;;) {
        int idle = 0;
        while (idle < SPINS) {
            if (work(worker)) idle = 0;
            else {
                relax();
                idle++;
            }
        }
        pthread_mutex_lock(&lock);
        atomic_fetch_add(&sleepers, 1);
        uint64_t seen = atomic_load(&ticket);
        if (!(left(seen) && worker < atomic_load(&job_workers))) {
            while (atomic_load(&ticket) >> 40 == seen >> 40) pthread_cond_wait(&wake, &lock);
        }
        atomic_fetch_sub(&sleepers, 1);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

static void after_fork(void) {
    atomic_store(&team, (team_function)NULL); /* its threads are not in the child, and it may not know */
    workers = 0;
    job_number++;
    atomic_store(&ticket, job_number << 40);
    atomic_store(&sleepers, 0);
    atomic_flag_clear(&busy);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wake, NULL);
}

static void prepare(void) { pthread_atfork(NULL, NULL, after_fork); }

/* A team ends together: where other programs want the cores too, a call waits for a thread that has yet to be
 * given one, some milliseconds, long after all tasks are done. Our own threads are not waited for, so after such a
 * call they do the next few. Only touched by the holder of `busy`. */
#define LONG_WAIT_NS 500000
#define MOST_CALLS_WITHOUT_TEAM 256
static int without_team, next_without_team = 8; /* calls; twice as many each time it happens again */

void tqai_use_team(void *gomp_parallel) {
    pthread_once(&once, prepare);
    while (atomic_flag_test_and_set(&busy)) sched_yield();
    atomic_store(&team, (team_function)(uintptr_t)gomp_parallel);
    without_team = 0;
    next_without_team = 8;
    atomic_flag_clear(&busy);
}

typedef struct {
    atomic_int next;
    _Atomic int64_t ran_out_ns; /* when a thread first found no task left */
    int tasks;
    tqai_task task;
    void *context;
} team_job;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void team_main(void *context) {
    team_job *j = context;
    for (int i; (i = atomic_fetch_add(&j->next, 1)) < j->tasks;) j->task(j->context, i);
    if (atomic_load(&j->ran_out_ns) == 0) atomic_store(&j->ran_out_ns, now_ns());
}

/* 0: not on the host's threads this time. */
static int on_team(int threads, int tasks, tqai_task task, void *context) {
    const team_function host = atomic_load(&team);
    if (!host || (without_team > 0 && without_team--)) return 0;
    team_job j = {.tasks = tasks, .task = task, .context = context};
    atomic_init(&j.next, 0);
    atomic_init(&j.ran_out_ns, 0);
    const int64_t begin = now_ns();
    host(team_main, &j, (unsigned)threads, 0); /* a smaller team than the host's own would end threads */
    const int64_t end = now_ns(), waited = end - atomic_load(&j.ran_out_ns);
    const int long_wait = waited > LONG_WAIT_NS && 2 * waited > end - begin;
    without_team = long_wait ? next_without_team : 0;
    next_without_team = !long_wait ? 8 : next_without_team < MOST_CALLS_WITHOUT_TEAM ? 2 * next_without_team : next_without_team;
    return 1;
}

static void start_workers(int wanted) {
    pthread_once(&once, prepare);
    while (workers < wanted && workers < MAX_WORKERS) {
        pthread_t thread;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attributes, 1 << 20);
        int failed = pthread_create(&thread, &attributes, worker_main, (void *)(intptr_t)workers);
        pthread_attr_destroy(&attributes);
        if (failed) break; /* fewer threads, same result */
        workers++;
    }
}

void tqai_parallel(int threads, int tasks, tqai_task task, void *context) {
    if (threads <= 1 || tasks <= 1 || tasks > MAX_TASKS || atomic_flag_test_and_set(&busy)) {
        for (int i = 0; i < tasks; i++) task(context, i);
        return;
    }
    if (on_team(threads, tasks, task, context)) {
        atomic_flag_clear(&busy);
        return;
    }
    const int helpers = (threads < tasks ? threads : tasks) - 1;
    start_workers(helpers);
    atomic_store(&job_task, task);
    atomic_store(&job_context, context);
    atomic_store(&job_workers, helpers);
    atomic_store(&done, 0);
    job_number = (job_number + 1) & 0xFFFFFF;
    atomic_store(&ticket, job_number << 40 | (uint64_t)tasks << 20);
    if (atomic_load(&sleepers) > 0) {
        pthread_mutex_lock(&lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&lock);
    }
    while (work(-1)) {
    }
    for (int spins = 0; atomic_load(&done) < tasks; spins++) {
        if (spins < 10 * SPINS) relax();
        else sched_yield(); /* more threads than cores: let the worker finish */
    }
    atomic_flag_clear(&busy);
}
