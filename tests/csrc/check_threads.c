/* check_threads.c: the kernels in several threads at once, built with ThreadSanitizer.
 *
 *     check_threads SEED SECONDS
 *
 * Encode, decode and attention are called by four threads at a time, each asking for 1 to 5 threads, on threads of
 * the library's own and on a team such as an OpenMP runtime has, while another thread changes from one to the
 * other. Checked: every call gives the bits that one thread alone gave; the sanitizer sees no race. Prints one
 * line and returns 0, or says what differed and returns 1.
 */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tqai.h"

enum { DIM = 16, KV_HEADS = 2, GROUP = 2, ROWS = KV_HEADS * GROUP, BATCH = 2, PAGES = 25, EXACT = 5, CALLERS = 4 };

static uint64_t state = 1;

static uint32_t draw(void) { /* xorshift64* */
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (uint32_t)((state * 2685821657736338717ull) >> 32);
}

static float uniform(void) { return (float)draw() / 4294967296.0f * 2.0f - 1.0f; }

static tqai_page_format format;
static float centroids[16], boundaries[15], signs[DIM], query[BATCH * ROWS * DIM];
static float exact[BATCH * KV_HEADS * EXACT * DIM], rows[PAGES * KV_HEADS * 64 * DIM];
static int16_t levels[16];
static uint8_t *pages;
static int64_t addresses[BATCH * PAGES];
static const int32_t counts[BATCH] = {PAGES, PAGES - 11};
static const tqai_source source = {rows, {KV_HEADS * 64 * DIM, 64 * DIM, DIM}, TQAI_FLOAT32};
static atomic_int stop, wrong, calls;

typedef struct {
    float out[BATCH * ROWS * DIM], lse[BATCH * ROWS], decoded[PAGES * KV_HEADS * 64 * DIM];
    uint8_t raw[];
} results;

static size_t raw_bytes(void) { return (size_t)(PAGES * KV_HEADS * format.page_bytes); }

static void prepare(void) {
    for (int i = 0; i < 16; i++) centroids[i] = ((float)i - 7.5f) * 0.06f;
    for (int i = 0; i < 15; i++) boundaries[i] = ((float)i - 7.0f) * 0.06f;
    for (int i = 0; i < 16; i++) levels[i] = (int16_t)(500 * (2 * i - 15));
    for (int i = 0; i < DIM; i++) signs[i] = draw() & 1 ? 1.0f : -1.0f;
    for (size_t i = 0; i < sizeof query / sizeof *query; i++) query[i] = uniform();
    for (size_t i = 0; i < sizeof exact / sizeof *exact; i++) exact[i] = uniform();
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) rows[i] = uniform();
    const tqai_codec codec = {.head_dim = DIM, .bits = 4, .rounds = 1, .signs = signs, .centroids = centroids,
                              .boundaries = boundaries, .levels = levels, .level_step = 0.06f / 1000.0f,
                              .largest_sum = 280000.0f, .normaliser = 1.0f / sqrtf((float)DIM)};
    const int64_t codes = 64 * DIM / 2;
    format = (tqai_page_format){.key = codec, .value = codec, .key_scales_at = codes, .value_codes_at = codes + 128,
                                .value_scales_at = 2 * codes + 128, .page_bytes = 2 * codes + 256};
}

static void call(results *to, int threads) {
    tqai_attend_args a = {.format = &format, .addresses = addresses, .address_stride = PAGES, .counts = counts,
                          .query = query, .query_strides = {ROWS * DIM, DIM, DIM}, .out = to->out, .lse = to->lse,
                          .batch = BATCH, .kv_heads = KV_HEADS, .group = GROUP, .new_tokens = 1, .pages = PAGES,
                          .threads = threads, .causal = 1, .scaling = 0.2f};
    const int64_t head = EXACT * DIM;
    a.exact[1] = (tqai_exact){exact, exact, {KV_HEADS * head, head, DIM}, {KV_HEADS * head, head, DIM}, EXACT,
                              TQAI_FLOAT32, TQAI_FLOAT32, PAGES * 64};
    if (tqai_attend(&a) || tqai_encode(&format, &source, &source, to->raw, PAGES, KV_HEADS, threads) ||
        tqai_decode(&format, pages, to->decoded, NULL, TQAI_FLOAT32, PAGES * KV_HEADS, threads))
        atomic_store(&wrong, 1);
}

static results *room(void) {
    results *r = malloc(sizeof *r + raw_bytes());
    if (!r) exit(2);
    memset(r, 0xFF, sizeof *r + raw_bytes());
    return r;
}

typedef struct {
    void (*function)(void *);
    void *data;
} member;

static void *member_main(void *argument) {
    const member *m = argument;
    m->function(m->data);
    return NULL;
}

/* As GOMP_parallel: all members run the function, the caller too, and end together. */
static void team(void (*function)(void *), void *data, unsigned threads, unsigned flags) {
    pthread_t other[8];
    member m = {function, data};
    unsigned started = 0;
    (void)flags;
    while (started + 1 < threads && started < 8 && !pthread_create(&other[started], NULL, member_main, &m)) started++;
    function(data);
    for (unsigned i = 0; i < started; i++) pthread_join(other[i], NULL);
}

static results *wanted;

static void *caller_main(void *argument) {
    uint32_t turn = (uint32_t)(intptr_t)argument;
    results *mine = room();
    while (!atomic_load(&stop) && !atomic_load(&wrong)) {
        call(mine, 1 + (int)(turn++ % 5));
        if (memcmp(mine, wanted, sizeof *mine + raw_bytes())) atomic_store(&wrong, 1);
        atomic_fetch_add(&calls, 1);
    }
    free(mine);
    return NULL;
}

int main(int argc, char **argv) {
    state = argc > 1 ? strtoull(argv[1], NULL, 10) * 2 + 1 : 1;
    const double seconds = argc > 2 ? atof(argv[2]) : 1.0;
    prepare();
    pages = malloc(raw_bytes() + 16);
    const int64_t first = ((int64_t)(intptr_t)pages + 15) / 16 * 16;
    pages += first - (int64_t)(intptr_t)pages;
    if (tqai_encode(&format, &source, &source, pages, PAGES, KV_HEADS, 1)) return 2;
    for (int i = 0; i < BATCH * PAGES; i++) addresses[i] = first + draw() % PAGES * KV_HEADS * format.page_bytes;
    wanted = room();
    call(wanted, 1);
    pthread_t callers[CALLERS];
    for (int i = 0; i < CALLERS; i++) pthread_create(&callers[i], NULL, caller_main, (void *)(intptr_t)i);
    const time_t begin = time(NULL);
    for (int i = 0; difftime(time(NULL), begin) < seconds || atomic_load(&calls) < 20; i++) {
        if (atomic_load(&wrong)) break;
        tqai_use_team(i % 2 ? (void *)team : NULL);
        nanosleep(&(struct timespec){0, 3000000}, NULL);
    }
    atomic_store(&stop, 1);
    for (int i = 0; i < CALLERS; i++) pthread_join(callers[i], NULL);
    if (atomic_load(&wrong)) {
        puts("a call in several threads gave other bits than one thread alone");
        return 1;
    }
    printf("%d calls without a difference\n", atomic_load(&calls));
    return 0;
}
