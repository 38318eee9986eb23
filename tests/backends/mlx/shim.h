// As much of the Metal Shading Language as C++17 needs to compile the kernels and run them on a CPU.
//
// The threads of a threadgroup are fibers on one CPU thread. A fiber runs until it waits at a barrier or
// inside a simdgroup function; then the next one runs, in an order that the caller chooses, so that a result
// which depends on a missing barrier changes with the order. Threadgroup memory is static and holds what the
// threadgroup before left there. A barrier that not all threads reach ends the process.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define device
#define threadgroup static
typedef unsigned int uint;
struct uint3 {
    uint x, y, z;
};
enum class mem_flags { mem_threadgroup };
using std::exp;
using std::sqrt;

template <class To, class From>
inline To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

namespace shim {
enum Wait { RUNS, AT_BARRIER, IN_SIMDGROUP, DONE };
constexpr size_t STACK_BYTES = 1 << 16;
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
    Wait wait;
};
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline uint me;
inline float slots[1024];
inline std::function<void(uint)> work;

inline void wait(Wait kind) {
    fibers[me].wait = kind;
    swapcontext(&fibers[me].context, &scheduler);
}

inline void start() {
    work(me);
    fibers[me].wait = DONE;
    swapcontext(&fibers[me].context, &scheduler);
}

// All fibers first..last-1 wait for `kind` (those that are done do not count): let them go on.
inline bool release(uint first, uint last, Wait kind) {
    bool some = false;
    for (uint i = first; i < last; i++) {
        if (fibers[i].wait == kind) {
            some = true;
        } else if (fibers[i].wait != DONE || kind == AT_BARRIER) {
            return false;
        }
    }
    for (uint i = first; some && i < last; i++) {
        if (fibers[i].wait == kind) fibers[i].wait = RUNS;
    }
    return some;
}

// One threadgroup. `order` 0: threads run from the first to the last; 1: from the last to the first.
inline void run(uint threads, int order, std::function<void(uint)> body) {
    work = body;
    fibers.resize(threads);
    for (uint i = 0; i < threads; i++) {
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack.ss_sp = fibers[i].stack.data();
        fibers[i].context.uc_stack.ss_size = STACK_BYTES;
        fibers[i].context.uc_link = nullptr;
        fibers[i].wait = RUNS;
        makecontext(&fibers[i].context, start, 0);
    }
    for (;;) {
        uint ran = 0, done = 0;
        for (uint i = 0; i < threads; i++) {
            me = order ? threads - 1 - i : i;
            if (fibers[me].wait == RUNS) {
                swapcontext(&scheduler, &fibers[me].context);
                ran++;
            }
            done += fibers[me].wait == DONE;
        }
        if (done == threads) return;
        bool released = false;
        for (uint first = 0; first < threads; first += 32) {
            released |= release(first, first + 32 < threads ? first + 32 : threads, IN_SIMDGROUP);
        }
        if (!released) released = release(0, threads, AT_BARRIER);
        if (!released && ran == 0) {
            std::fprintf(stderr, "a barrier was not reached by all threads\n");
            std::abort();
        }
    }
}

template <class Join>
inline float over_simdgroup(float x, Join join) {
    slots[me] = x;
    wait(IN_SIMDGROUP);
    const uint first = me / 32 * 32;
    float all = slots[first];
    for (uint i = 1; i < 32; i++) all = join(all, slots[first + i]);
    wait(IN_SIMDGROUP);
    return all;
}
}  // namespace shim

inline void threadgroup_barrier(mem_flags) { shim::wait(shim::AT_BARRIER); }
inline float simd_sum(float x) {
    return shim::over_simdgroup(x, [](float a, float b) { return a + b; });
}
inline float simd_max(float x) {
    return shim::over_simdgroup(x, [](float a, float b) { return a > b ? a : b; });
}
