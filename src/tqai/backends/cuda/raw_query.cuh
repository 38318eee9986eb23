// One query column as the model gives it, in one warp; for scalar and for trellis codes.

struct RawQuery {
    float x[(DK + 31) / 32];  // elements lane, lane + 32, ...

    __device__ __forceinline__ void load(const Params& p, const Place& at, int j, int lane) {
        int head, token;
        at.column(p, j, head, token);
        const bool real = j < at.columns(p);
        const i64 from = at.b * p.query_strides[0] + head * p.query_strides[1] + token * p.query_strides[2];
#pragma unroll
        for (int i = 0; i < (DK + 31) / 32; ++i) {
            const int d = lane + 32 * i;
            // The address is one of the query's in any case: with a branch around it each load would wait for
            // the one before.
            const bool inside = DK % 32 == 0 || d < DK;
            const float y = load_one(p.query, from + (inside ? d : 0));
            x[i] = real && inside ? y : 0.0f;
        }
    }
};
