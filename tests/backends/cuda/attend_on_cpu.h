// A GPU small enough for a test: a whole grid of blocks whose lanes take turns, each until it has to wait for
// others. Stands in for transport.cuh and for what the attention kernels have of PTX (`attend_on_cpu.py`).
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { int x, y, z; };
static Index threadIdx, blockIdx, gridDim;

static float __uint_as_float(unsigned b) { float f; memcpy(&f, &b, 4); return f; }
static float __int_as_float(int b) { return __uint_as_float((unsigned)b); }
static unsigned __float_as_uint(float f) { unsigned b; memcpy(&b, &f, 4); return b; }
static int __float2int_rn(float f) { return f != f ? 0 : f >= 2147483648.0f ? 2147483647 : f < -2147483648.0f ? -2147483647 - 1 : (int)lrintf(f); }
static unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
static void __trap() { abort(); }
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
template <class T> static T __ldcg(const T* p) { return *p; }
static unsigned permuted(unsigned a, unsigned b, unsigned selector, bool signs) {
    const unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned s = selector >> (4 * i) & 15, byte = both >> (8 * (s & 7)) & 255;
        out |= (s & 8 && signs ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
    }
    return out;
}
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) { return permuted(a, b, selector, false); }

// ---- Lanes.
struct Given { unsigned word[6]; };
struct Warp { Given given[2][32]; long arrived; };
struct Block { unsigned char* shared; long met; std::vector<Warp> warps; };
struct Lane { ucontext_t context; std::vector<char> stack; Index block, thread; int number; long turns, meetings, cluster_turns; bool ended; };
static std::vector<Block> blocks;
static std::vector<long> clusters;
static std::vector<Lane> lanes;
static ucontext_t scheduler;
static int current, threads, cluster_blocks;
static long moves;  // what others may be waiting for
static Lane& me() { return lanes[current]; }
static int block_number() { return me().block.y * gridDim.x + me().block.x; }
static void pass() { swapcontext(&lanes[current].context, &scheduler); }
template <class Condition> static void wait_until(const Condition& there) { while (!there()) pass(); ++moves; }

static Given* meet(const Given& mine) {
    Lane& lane = me();
    Warp& warp = blocks[block_number()].warps[lane.thread.x / 32];
    const long turn = lane.turns++;
    warp.given[turn & 1][lane.thread.x % 32] = mine;
    ++warp.arrived;
    ++moves;
    wait_until([&] { return warp.arrived >= 32 * (turn + 1); });
    return warp.given[turn & 1];
}
static int own_lane() { return threadIdx.x & 31; }
static void __syncwarp() { meet({}); }
static void __syncthreads() {
    Lane& lane = me();
    Block& block = blocks[block_number()];
    const long turn = lane.meetings++;
    ++block.met;
    ++moves;
    wait_until([&] { return block.met >= threads * (turn + 1); });
}
static unsigned bits_of(float x) { return __float_as_uint(x); }
static unsigned bits_of(int x) { return (unsigned)x; }
static void from_bits(unsigned b, float& x) { x = __uint_as_float(b); }
static void from_bits(unsigned b, int& x) { x = (int)b; }
template <class T> static T taken_from(T x, int lane, const Given* all) { T out; from_bits(all[lane].word[0], out); return out; }
template <class T> static T __shfl_xor_sync(unsigned, T x, int with) { const int l = own_lane(); return taken_from(x, l ^ with, meet({{bits_of(x)}})); }
template <class T> static T __shfl_up_sync(unsigned, T x, int by) { const int l = own_lane(); return taken_from(x, l < by ? l : l - by, meet({{bits_of(x)}})); }
static int __shfl_sync(unsigned, int x, int from) { return taken_from(x, from & 31, meet({{(unsigned)x}})); }
static unsigned __shfl_sync(unsigned, unsigned x, int from) { return taken_from((int)x, from & 31, meet({{x}})); }
static unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) { return (unsigned)(((unsigned long long)high << 32 | low) >> (by & 31)); }
template <class T> static T __ldg(const T* p) { return *p; }
static long long __shfl_sync(unsigned, long long x, int from) {
    const Given& got = meet({{(unsigned)x, (unsigned)(x >> 32)}})[from & 31];
    return (long long)((unsigned long long)got.word[1] << 32 | got.word[0]);
}
static bool __any_sync(unsigned, bool x) {
    const Given* all = meet({{x}});
    for (int i = 0; i < 32; ++i) if (all[i].word[0]) return true;
    return false;
}
static float warp_maximum(unsigned x) {
    const Given* all = meet({{x}});
    unsigned most = 0;
    for (int i = 0; i < 32; ++i) most = all[i].word[0] > most ? all[i].word[0] : most;
    return __uint_as_float(most);
}
// m16n8k32 or, with WIDE 0, m16n8k16 of bytes: who holds what is in the PTX manual.
template <bool WIDE, bool UNSIGNED_B, bool UNSIGNED_A = false>
static void multiply(int (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    const int l = own_lane(), g = l / 4, c = l % 4;
    const Given* all = meet({{a0, a1, a2, a3, b0, b1}});
    for (int k = 0; k < 4; ++k) {
        const int row = k / 2, column = 2 * c + k % 2;
        for (int q = 0; q < 4; ++q)
            for (int part = 0; part < (WIDE ? 2 : 1); ++part) {
                const unsigned a = all[4 * g + q].word[row + 2 * part], b = all[4 * column + q].word[4 + part];
                for (int i = 0; i < 32; i += 8)
                    d[k] += (UNSIGNED_A ? (int)(uint8_t)(a >> i) : (int)(int8_t)(a >> i)) * (UNSIGNED_B ? (int)(uint8_t)(b >> i) : (int)(int8_t)(b >> i));
            }
    }
}

// m16n8k8 of tf32, whose 13 lowest bits are not read; a sum is rounded once.
static void multiply_floats(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    const int l = own_lane(), g = l / 4, c = l % 4;
    const Given* all = meet({{a0, a1, a2, a3, b0, b1}});
    const unsigned top = 0xffffe000u;
    for (int k = 0; k < 4; ++k) {
        const int row = k / 2, column = 2 * c + k % 2;
        double sum = d[k];
        for (int q = 0; q < 4; ++q)
            for (int part = 0; part < 2; ++part) {
                const unsigned a = all[4 * g + q].word[row + 2 * part], b = all[4 * column + q].word[4 + part];
                sum += (double)__uint_as_float(a & top) * __uint_as_float(b & top);
            }
        d[k] = (float)sum;
    }
}

// ---- transport.cuh. A barrier is count | waited for << 16 | phase << 32. A page arrives as late as it may, at
// the moment it is waited for, or, with `hasty`, as soon as it is asked for.
#define BULK 1
static bool hasty;
struct Copy { unsigned char* to; const unsigned char* from; int bytes; };
static std::map<void*, Copy> under_way;
static void make_barrier(unsigned long long* bar, int count) { *bar = count | (unsigned long long)count << 16; }
static void arrive(unsigned long long* bar) {
    const int count = *bar & 0xffff, left = (int)(*bar >> 16 & 0xffff) - 1;
    const unsigned long long phase = *bar >> 32 & 1;
    *bar = left == 0 ? count | (unsigned long long)count << 16 | (phase ^ 1) << 32 : count | (unsigned long long)left << 16 | phase << 32;
    ++moves;
}
static void await_barrier(unsigned long long* bar, unsigned parity) {
    wait_until([&] { return (*bar >> 32 & 1) != parity; });
}
static void land(unsigned long long* bar) {
    const Copy copy = under_way.at(bar);
    under_way.erase(bar);
    memcpy(copy.to, copy.from, copy.bytes);
    arrive(bar);
}
static void fetch_bytes(unsigned char* stage, const unsigned char* page, unsigned long long* bar, int lane, int bytes) {
    if (lane != 0) return;
    if (under_way.count(bar)) { fprintf(stderr, "a buffer is filled twice\n"); abort(); }
    memset(stage, 0xff, bytes);
    under_way[bar] = {stage, page, bytes};
    if (hasty) land(bar);
}
#define fetch_page(stage, page, bar, lane) fetch_bytes(stage, page, bar, lane, PAGE_BYTES)
#define fetch_keys(stage, page, bar, lane) fetch_bytes(stage, page, bar, lane, V_CODES_AT)
#define fetch_values(stage, page, bar, lane) fetch_bytes((stage) + V_CODES_AT, (page) + V_CODES_AT, bar, lane, PAGE_BYTES - V_CODES_AT)
static void no_fetch() {}
static unsigned long long read_once() { return 0; }
static uint4 stream_four(const unsigned char* from, unsigned long long) { return *(const uint4*)from; }
static uint2 stream_two(const unsigned char* from, unsigned long long) { return *(const uint2*)from; }
static unsigned stream_one(const unsigned char* from, unsigned long long) { return *(const unsigned*)from; }
static void release_buffer() {}
static void await_page(unsigned long long* bar, unsigned parity) {
    if (under_way.count(bar)) land(bar);
    await_barrier(bar, parity);
}
static void await_earlier_launches() {}
static void let_next_launch_begin() {}
static void cluster_arrive() { ++clusters[block_number() / cluster_blocks]; ++moves; }
static void cluster_wait() {
    const long turn = me().cluster_turns++;
    long& met = clusters[block_number() / cluster_blocks];
    wait_until([&] { return met >= (long)threads * cluster_blocks * (turn + 1); });
}
static unsigned address_in_block(const void* mine, int rank) {
    return (unsigned)((const unsigned char*)mine - blocks[block_number()].shared) | rank << 24;
}
static const unsigned char* in_block(unsigned at) {
    return blocks[block_number() / cluster_blocks * cluster_blocks + (at >> 24)].shared + (at & 0xffffff);
}
static float4 load4_from_block(unsigned at) { float4 v; memcpy(&v, in_block(at), 16); return v; }
static float2 load2_from_block(unsigned at) { float2 v; memcpy(&v, in_block(at), 8); return v; }
#define STAMP(k)

// ---- The grid.
template <class Body>
static int run_grid(Body body, int grid_x, int grid_y, int cluster, int block_threads, int shared_bytes) {
    gridDim = {grid_x, grid_y, 1};
    threads = block_threads;
    cluster_blocks = cluster;
    const int count = grid_x * grid_y;
    std::vector<unsigned char> memory(count * (size_t)(shared_bytes + 256), 0xff);
    blocks.assign(count, {});
    clusters.assign((count + cluster - 1) / cluster, 0);
    lanes = std::vector<Lane>(count * threads);
    under_way.clear();
    for (int b = 0; b < count; ++b) {
        unsigned char* at = memory.data() + b * (size_t)(shared_bytes + 256);
        blocks[b].shared = (unsigned char*)(((uintptr_t)at + 127) / 128 * 128);
        blocks[b].warps.assign(threads / 32, {});
    }
    for (int i = 0; i < count * threads; ++i) {
        Lane& lane = lanes[i];
        lane.block = {i / threads % grid_x, i / threads / grid_x, 0};
        lane.thread = {i % threads, 0, 0};
        lane.turns = lane.meetings = lane.cluster_turns = 0;
        lane.ended = false;
        lane.stack.resize(1 << 16);
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.data();
        lane.context.uc_stack.ss_size = lane.stack.size();
        lane.context.uc_link = &scheduler;
        makecontext(&lane.context, body, 0);
    }
    for (int ended = 0; ended < count * threads;) {
        const long before = moves;
        const int already = ended;
        ended = 0;
        for (current = 0; current < count * threads; ++current) {
            if (!lanes[current].ended) {
                threadIdx = lanes[current].thread;
                blockIdx = lanes[current].block;
                swapcontext(&scheduler, &lanes[current].context);
            }
            ended += lanes[current].ended;
        }
        if (moves == before && ended == already) return 1;  // all wait for each other
    }
    if (!under_way.empty()) return 2;  // a page that nobody has waited for
    for (int b = 0; b < count; ++b)
        for (int i = 0; i < 64; ++i)
            if (blocks[b].shared[shared_bytes + i] != 0xff) return 3;  // shared memory was left
    return 0;
}
