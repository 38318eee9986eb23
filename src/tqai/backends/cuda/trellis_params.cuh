// What attention on trellis codes has in shared memory in place of the scalar codes' tables.
//
// More macros: TRELLIS 1; SK, SV bits of the state; PAIRK, PAIRV, COPIESK, COPIESV the form of the tables (see
// `trellis_lookup.cuh`); SPLITK, SPLITV 1 for those of `trellis_split.cuh`; PARTSK, PARTSV 1 for
// `trellis_parts.cuh`, which needs no table, COPIESK or COPIESV 0; SAME 1 where keys and values have one table.

#define WINDOW_K (BK + SK + PAIRK * BK + SPLITK)  // bits of an entry's number
#define WINDOW_V (BV + SV + PAIRV * BV + SPLITV)
#define K_TABLE_WORDS ((1 << WINDOW_K) * COPIESK)
#define V_TABLE_WORDS ((1 << WINDOW_V) * COPIESV)
#define BYTESK (SPLITK || PARTSK)  // levels are bytes, to be multiplied by bytes
#define BYTESV (SPLITV || PARTSV)
#define MINUS_BYTES(n) ((u32)(-(n) & 0xff) * 0x01010101u)  // -n four times, as int8
#define LUT_WORDS (K_TABLE_WORDS + (SAME ? 0 : V_TABLE_WORDS))
#define WEIGHT_PITCH (PAGE_TOKENS + 4)
#define SCRATCH_BYTES (16 * WEIGHT_PITCH > 4 * (DK > DV ? DK : DV) ? 16 * WEIGHT_PITCH : 4 * (DK > DV ? DK : DV))

// A table out of global memory, every entry in all its copies; by the whole block.
__device__ __forceinline__ void keep_table(u32* table, const u32* entries, int words, int copies, int tid) {
#pragma unroll 8
    for (int i = 4 * tid; i < words; i += 4 * THREADS) {
        const u32 e = __ldg(entries + i / copies);
        *(uint4*)(table + i) = make_uint4(e, e, e, e);
    }
}
