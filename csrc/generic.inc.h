/* generic.inc.h: the integer sums for instruction sets without a 16-bit table lookup across a register.
 * A page side is first unpacked to int16 levels in a buffer that stays in the first-level cache, once
 * for all query rows. The includer defines:
 *   load_levels(codec, is_value, codes, level)            level [2 * head_dim units][32] of a page side
 *   keys_group(level, q, rows, dim, group, dots)          dots of the 16 tokens of a group
 *   values_column(units, stride, w, rows, dim, out)       out [rows][16 dims] += sums over 32 units
 */

/* Levels of a page side, by the codec's own steps or as scalar codes. */
static void unpack_levels(const tqai_codec *codec, int is_value, const uint8_t *codes, int16_t *level) {
    if (codec->kind == TQAI_SCALAR) load_levels(codec, is_value, codes, level);
    else KERNELS.steps[codec->kind]->unpack(codec, is_value, codes, level);
}

/* Lines of part `part` of `parts` of a page side: few at a time, so that they do not queue up. */
static inline void prefetch(const tqai_codec *codec, const uint8_t *codes, int part, int parts) {
    const int lines = 8 * codec->head_dim * codec->bits / LINE_BYTES;
    for (int i = lines * part / parts; i < lines * (part + 1) / parts; i++) __builtin_prefetch(codes + LINE_BYTES * i, 0, 2);
}

static void key_dots_unpacked(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next,
                              int pages, const int16_t *q, int rows, int fine, int32_t *dots) {
    (void)fine;
    _Alignas(64) int16_t level[2 * TQAI_MAX_HEAD_DIM * UNIT];
    for (int page = 0; page < pages; page++, dots += TQAI_PAGE_TOKENS) {
        unpack_levels(codec, 0, codes[page], level);
        for (int group = 0; group < 4; group++) {
            prefetch(codec, next[page], group, 4);
            if (rows == 1) keys_group(level, q, 1, codec->head_dim, group, dots);
            else if (rows == 2) keys_group(level, q, 2, codec->head_dim, group, dots);
            else keys_group(level, q, 4, codec->head_dim, group, dots);
        }
    }
}

static void value_sums_unpacked(const tqai_codec *codec, const uint8_t *const *codes, const uint8_t *const *next,
                                int pages, const int16_t *w, const float *step, int rows, float *acc) {
    const int dim = codec->head_dim;
    _Alignas(64) int16_t level[2 * TQAI_MAX_HEAD_DIM * UNIT];
    _Alignas(64) int32_t sums[MAX_ROWS * TQAI_MAX_HEAD_DIM];
    memset(sums, 0, sizeof(int32_t) * (size_t)rows * (size_t)dim);
    for (int page = 0; page < pages; page++) {
        unpack_levels(codec, 1, codes[page], level);
        const int16_t *weight = w + TQAI_PAGE_TOKENS * page;
        for (int column = 0; column < dim / 16; column++) {
            prefetch(codec, next[page], column, dim / 16);
            const int chunk = column / 4, groups = tqai_chunk_groups(dim, 64 * chunk);
            const int16_t *units = level + (128 * chunk + column % 4) * UNIT;
            int32_t *out = sums + 16 * column;
            if (rows == 1) values_column(units, groups * UNIT, weight, 1, dim, out);
            else if (rows == 2) values_column(units, groups * UNIT, weight, 2, dim, out);
            else values_column(units, groups * UNIT, weight, 4, dim, out);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int d = 0; d < dim; d++) acc[r * dim + d] += (float)sums[r * dim + d] * step[r];
}
