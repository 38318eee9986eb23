// What attention on trellis codes has in shared memory in place of the scalar codes' tables and pages.
//
// More macros: TRELLIS 1; SK, SV bits of the state; PAIRK, PAIRV, COPIESK, COPIESV the form of the tables (see
// `trellis_lookup.cuh`); SPLITK, SPLITV 1 for levels in two candidates; PARTSK, PARTSV 1 for `trellis_parts.cuh`, which
// needs no table, COPIESK or COPIESV 0; SAME 1 where keys and values have one table.

#define SUMSK (SPLITK && SK == 8)  // `trellis_sums.cuh`
#define SUMSV (SPLITV && SV == 8)
#define TWOV (SPLITV && BV == 2)   // `trellis_split_two.cuh`
#define WINDOW_K (SPLITK ? 10 : BK + SK + PAIRK * BK)  // bits of an entry's number
#define WINDOW_V (TWOV ? 8 : SPLITV ? 10 : BV + SV + PAIRV * BV)
#define K_TABLE_WORDS ((1 << WINDOW_K) * COPIESK)
#define V_TABLE_WORDS ((1 << WINDOW_V) * COPIESV)
#define BYTESK (SPLITK || PARTSK || PAIRK)  // levels are bytes, to be multiplied by bytes
#define BYTESV (SPLITV || PARTSV || PAIRV)
#define MINUS_BYTES(n) ((u32)(-(n) & 0xff) * 0x01010101u)  // -n four times, as int8
#define LUT_WORDS (K_TABLE_WORDS + (SAME ? 0 : V_TABLE_WORDS))
#define WEIGHT_PITCH (PAGE_TOKENS + 4)
#define SCRATCH_BYTES (16 * WEIGHT_PITCH > 4 * (DK > DV ? DK : DV) ? 16 * WEIGHT_PITCH : 4 * (DK > DV ? DK : DV))
#define BUFFER_BYTES (4 * SLOT)  // pages come into registers (`trellis_held.cuh`)
#define BUFFERS 1
#define BARS 0
