// Codes in fragment order to int8 levels. A "unit" is 16 head dimensions by 64 tokens: per lane 32 codes in
// BITS 32-bit words, which become 8 registers of 4 int8 levels (registers of A fragments of
// mma.m16n8k32). `layout.py` has the picture; the two are tested against each other.
//
// Levels are integers times a unit, of int8 in one table for 1, 2 and 3 bits. 4 and 8 bits use two tables, `a` and
// `b`: level = (a + b * coef_b) * unit, where coef_b is not 1 for 8 bits alone.

struct Levels {
    u32 a0, a1, b0, b1;        // tables of 8 bytes, for byte permutes
    float coef_b, unit;
};

// Bytes of a unit: word planes of 16, 8 or 4 bytes per lane, one after the other.
template <int BITS>
__device__ __forceinline__ void load_unit(const u8* unit, int lane, u32 (&w)[BITS]) {
    if constexpr (BITS == 8) {
        uint4 a = *(const uint4*)(unit + lane * 16), b = *(const uint4*)(unit + 512 + lane * 16);
        w[0] = a.x; w[1] = a.y; w[2] = a.z; w[3] = a.w;
        w[4] = b.x; w[5] = b.y; w[6] = b.z; w[7] = b.w;
    } else if constexpr (BITS == 4) {
        uint4 a = *(const uint4*)(unit + lane * 16);
        w[0] = a.x; w[1] = a.y; w[2] = a.z; w[3] = a.w;
    } else if constexpr (BITS == 3) {
        uint2 a = *(const uint2*)(unit + lane * 8);
        w[0] = a.x; w[1] = a.y;
        w[2] = *(const u32*)(unit + 256 + lane * 4);
    } else if constexpr (BITS == 2) {
        uint2 a = *(const uint2*)(unit + lane * 8);
        w[0] = a.x; w[1] = a.y;
    } else {
        w[0] = *(const u32*)(unit + lane * 4);
    }
}

// The hardware's permute as it is; `__byte_perm` would mask the selectors' top bits away.
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
    return d;
}

#define HAS_TWO_TABLES(bits) ((bits) == 4 || (bits) == 8)
#define HAS_TWO_WEIGHTS(bits) ((bits) == 8)

// A lane's entries of a table in shared memory, [code][lane] (8 bits alone): byte 0 for table a, byte 1 for b. The
// compiler must not see how the address of the first is made, or it computes the others' in three steps, not one.
__device__ __forceinline__ u32 own_entries(const u32* lut, int lane) {
    u32 first = shared_address(lut) + 4 * lane;
    asm("" : "+r"(first));
    return first;
}
__device__ __forceinline__ u32 entry_at(u32 first, u32 code) {
    u32 entry;
    asm("ld.shared.u32 %0, [%1];" : "=r"(entry) : "r"(first + code * 128));
    return entry;
}

// `own`: see `own_entries`. `minus` is -1, which the compiler must not know: it would take the products to the
// busier unit.
template <int BITS>
__device__ __forceinline__ void unpack_unit(const u32 (&w)[BITS], const Levels& t, [[maybe_unused]] u32 own, [[maybe_unused]] u32 minus, u32 (&a)[8], u32 (&b)[8]) {
    if constexpr (BITS == 8) {
#pragma unroll
        for (int r = 0; r < 8; ++r) {
            const u32 e0 = entry_at(own, w[r] & 0xff), e1 = entry_at(own, __byte_perm(w[r], 0, 0x4441));
            const u32 e2 = entry_at(own, __byte_perm(w[r], 0, 0x4442)), e3 = entry_at(own, w[r] >> 24);
            u32 x = __byte_perm(e0, e1, 0x5410), y = __byte_perm(e2, e3, 0x5410);
            a[r] = __byte_perm(x, y, 0x6420);
            b[r] = __byte_perm(x, y, 0x7531);
        }
    } else if constexpr (BITS == 4) {
        // A nibble's top bit says which table holds its level. The permute returns the sign of an entry
        // where a selector's top bit is set, so each table gives its levels and, elsewhere, 0 or -1; the
        // tables are made with that in mind, and no masking is needed. The second table's selectors are
        // inverted, all bits of them, and so is the order of its entries.
        const u32 b0 = __byte_perm(t.b1, 0, 0x0123), b1 = __byte_perm(t.b0, 0, 0x0123);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const u32 v = w[j] >> 16;
            a[2 * j] = permute(t.a0, t.a1, w[j]);
            b[2 * j] = permute(b0, b1, w[j] * minus + minus);
            a[2 * j + 1] = permute(t.a0, t.a1, v);
            b[2 * j + 1] = permute(b0, b1, v * minus + minus);
        }
    } else if constexpr (BITS == 3) {
        u32 rest = ((w[0] >> 3) & 0x11111111u) | ((w[1] >> 2) & 0x22222222u) | ((w[2] >> 1) & 0x44444444u);
        u32 s[4] = {w[0] & 0x77777777u, w[1] & 0x77777777u, w[2] & 0x77777777u, rest};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            a[2 * j] = permute(t.a0, t.a1, s[j]);
            a[2 * j + 1] = permute(t.a0, t.a1, s[j] >> 16);
        }
    } else if constexpr (BITS == 2) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            u32 s0 = w[j] & 0x33333333u, s1 = (w[j] >> 2) & 0x33333333u;
            a[4 * j] = permute(t.a0, t.a1, s0);
            a[4 * j + 1] = permute(t.a0, t.a1, s0 >> 16);
            a[4 * j + 2] = permute(t.a0, t.a1, s1);
            a[4 * j + 3] = permute(t.a0, t.a1, s1 >> 16);
        }
    } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            u32 s = (w[0] >> j) & 0x11111111u;
            a[2 * j] = permute(t.a0, t.a1, s);
            a[2 * j + 1] = permute(t.a0, t.a1, s >> 16);
        }
    }
}

// Products of 16 x 32 levels with 32 x 8 parts of queries (int8) or of weights (uint8), summed in int32.
__device__ __forceinline__ void mma_s8s8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_s8s8_half(int (&d)[4], u32 a0, u32 a1, u32 b0) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(a0), "r"(a1), "r"(b0));
}

__device__ __forceinline__ void mma_s8u8(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
