/* dispatch.c: which instruction set this process computes with, decided once from what the CPU has and
 * from TQAI_CPU_ISA. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "isa.h"
#include "layout.h"

static const tqai_kernels *_Atomic chosen;

static const tqai_kernels *find(const char *name) {
    if (!strcmp(name, "scalar")) return &tqai_kernels_scalar;
#ifdef TQAI_X86
    __builtin_cpu_init();
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!strcmp(name, "avx2") && avx2) return &tqai_kernels_avx2;
    if (!strcmp(name, "avx512") && avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
        return &tqai_kernels_avx512;
#endif
#ifdef TQAI_NEON
    if (!strcmp(name, "neon")) return &tqai_kernels_neon;
#endif
    return NULL;
}

const tqai_kernels *tqai_chosen(void) {
    const tqai_kernels *kernels = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (kernels) return kernels;
    const char *wanted = getenv("TQAI_CPU_ISA"), *best[] = {wanted ? wanted : "", "avx512", "avx2", "neon", "scalar"};
    for (size_t i = 0; !kernels && i < sizeof best / sizeof *best; i++) kernels = find(best[i]);
    atomic_store(&chosen, kernels);
    return kernels;
}

int tqai_serves(const tqai_codec *codec) {
    if (!tqai_served_dim(codec->head_dim) || codec->kind < 0 || codec->kind >= TQAI_KINDS) return 0;
    return codec->kind == TQAI_SCALAR ? tqai_served_bits(codec->bits) : tqai_chosen()->steps[codec->kind] != NULL;
}

int32_t tqai_abi(void) { return TQAI_ABI; }

const char *tqai_isa(void) { return tqai_chosen()->name; }

int32_t tqai_set_isa(const char *name) {
    const tqai_kernels *kernels = name ? find(name) : NULL;
    if (!kernels) return TQAI_BAD_SIZE;
    atomic_store(&chosen, kernels);
    return TQAI_OK;
}
