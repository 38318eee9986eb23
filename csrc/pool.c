/* pool.c: threads that wait for work, first spinning for some microseconds, then asleep.
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

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
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
    workers = 0;
    job_number++;
    atomic_store(&ticket, job_number << 40);
    atomic_store(&sleepers, 0);
    atomic_flag_clear(&busy);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wake, NULL);
}

static void prepare(void) { pthread_atfork(NULL, NULL, after_fork); }

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
