// What the kernels of the encoding with tensor cores are told, and what they have in common. ENCODE_WARPS is defined
// by each.

#define STEPS 4           // of a page
#define STEP_ROWS 16
#define ROWS_OF_LANE 2

struct EncodeParams {
    u8* pages;
    const void* in;
    const u32* table;     // `encode_plan.py`
    i64 strides[3];       // page, head, token, in elements
    float per_unit;       // takes a coordinate of a unit vector into the range of the boundaries
    float boundary, inner, outer;  // for 2 bits
    int heads, units, least_squares;

    // Where the vectors of a page and head begin; beyond the last, the last's.
    __device__ __forceinline__ const u8* vectors(int unit) const {
        unit = unit < units ? unit : units - 1;
        const int page = unit / heads, head = unit - page * heads;
        return (const u8*)in + 2 * (page * strides[0] + head * strides[1]);
    }
};
