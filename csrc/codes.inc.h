/* codes.inc.h: whole pages from numbers to codes and back; included by each ISA's file.
 *
 * One side of a page at a time, 16 tokens at once with lanes = tokens (x is [head_dim][16]), through a
 * byte per code, `index` [head_dim][64], from and to the planes of layout.h.
 */

/* Where lane 0 of term 0 of a unit lies in `index`; the next lane is *lane and the next term *term further. */
static inline const uint8_t *unit_at(int is_value, int dim, int terms, int unit, const uint8_t *index, int *lane,
                                     int *term) {
    if (!is_value) {
        *lane = 1;
        *term = 64;
        return index + 64 * terms * (unit / 4) + 16 * (unit % 4);
    }
    const int whole = 256 / terms, chunk = unit / whole, groups = tqai_chunk_groups(dim, 64 * chunk);
    *lane = 64;
    *term = 1;
    return index + 64 * (64 * chunk + 16 * (unit % whole % groups)) + terms * (unit % whole / groups);
}

/* A plane of codes: 32 / terms bits of a line hold one code each of 32 / terms / bits units. */
static void plane_pack(int is_value, int dim, int terms, int bits, int shift, const uint8_t *restrict index,
                       uint8_t *restrict out) {
    const int per_line = 32 / terms / bits, lines = 64 / 16 * dim / terms / per_line;
    const unsigned keep = (1u << bits) - 1u;
    for (int line = 0; line < lines; line++) {
        uint16_t word[64] = {0};
        for (int k = 0; k < per_line; k++) {
            int lane, term;
            const uint8_t *restrict from = unit_at(is_value, dim, terms, line * per_line + k, index, &lane, &term);
            for (int j = 0; j < terms; j++)
                for (int t = 0; t < 16; t++)
                    word[terms * t + j] |= (uint16_t)(((unsigned)(from[lane * t + term * j] >> shift) & keep) << (k * bits));
        }
        if (terms == 4)
            for (int e = 0; e < 64; e++) out[LINE_BYTES * line + e] = (uint8_t)word[e];
        else
            for (int e = 0; e < 32; e++) {
                out[LINE_BYTES * line + 2 * e] = (uint8_t)word[e];
                out[LINE_BYTES * line + 2 * e + 1] = (uint8_t)(word[e] >> 8);
            }
    }
}

static void plane_unpack(int is_value, int dim, int terms, int bits, int shift, const uint8_t *restrict in,
                         uint8_t *restrict index) {
    const int per_line = 32 / terms / bits, units = 64 / 16 * dim / terms;
    const unsigned keep = (1u << bits) - 1u;
    for (int unit = 0; unit < units; unit++) {
        int lane, term;
        uint8_t *restrict to = (uint8_t *)unit_at(is_value, dim, terms, unit, index, &lane, &term);
        const uint8_t *line = in + LINE_BYTES * (unit / per_line);
        const int down = unit % per_line * bits;
        for (int j = 0; j < terms; j++)
            for (int t = 0; t < 16; t++) {
                const int e = terms * t + j;
                const unsigned word = terms == 4 ? line[e] : line[2 * e] | (unsigned)line[2 * e + 1] << 8;
                to[lane * t + term * j] |= (uint8_t)(((word >> down) & keep) << shift);
            }
    }
}

static void pack_page(const tqai_codec *codec, int is_value, const uint8_t *index, uint8_t *codes) {
    const int dim = codec->head_dim;
    if (codec->bits == 3) {
        plane_pack(is_value, dim, 4, 2, 0, index, codes);
        plane_pack(is_value, dim, 4, 1, 2, index, codes + tqai_high_plane_at(dim));
    } else {
        plane_pack(is_value, dim, tqai_terms(codec->bits), codec->bits, 0, index, codes);
    }
}

static void unpack_page(const tqai_codec *codec, int is_value, const uint8_t *codes, uint8_t *index) {
    const int dim = codec->head_dim;
    memset(index, 0, (size_t)64 * (size_t)dim);
    if (codec->bits == 3) {
        plane_unpack(is_value, dim, 4, 2, 0, codes, index);
        plane_unpack(is_value, dim, 4, 1, 2, codes + tqai_high_plane_at(dim), index);
    } else {
        plane_unpack(is_value, dim, tqai_terms(codec->bits), codec->bits, 0, codes, index);
    }
}

/* Codes of one coordinate of 16 rows: how many boundaries * norm are not above y. */
static inline void count_boundaries(const tqai_codec *codec, const float *restrict y, const float *restrict norm,
                                    uint8_t *restrict index) {
    int32_t count[16] = {0};
    if (codec->bits <= 4) {
        const int boundaries = (1 << codec->bits) - 1;
        for (int k = 0; k < boundaries; k++) {
            const float boundary = codec->boundaries[k];
            for (int l = 0; l < 16; l++) count[l] += y[l] >= boundary * norm[l];
        }
    } else { /* bisection: eight steps instead of 255 comparisons */
        for (int step = 1 << (codec->bits - 1); step > 0; step /= 2)
            for (int l = 0; l < 16; l++)
                count[l] += y[l] >= codec->boundaries[count[l] + step - 1] * norm[l] ? step : 0;
    }
    for (int l = 0; l < 16; l++) index[l] = (uint8_t)count[l];
}

/* Rows are first multiplied by a power of two that brings their largest coordinate near 1, so that
 * neither their norm nor a product overflows, and nothing else changes. */
static void encode16(const tqai_codec *codec, const void *rows, int64_t row_stride, int dtype,
                     uint8_t *restrict index, uint16_t *restrict scales) {
    const int dim = codec->head_dim;
    float x[16 * TQAI_MAX_HEAD_DIM], row[TQAI_MAX_HEAD_DIM];
    float norm[16] = {0}, product[16] = {0}, square[16] = {0};
    int exponent[16], usable[16], finite[16];
    for (int l = 0; l < 16; l++) {
        to_float(at(rows, dtype, l * row_stride), dtype, dim, row);
        uint32_t largest = 0;
        for (int i = 0; i < dim; i++) {
            const uint32_t magnitude = float_to_bits(row[i]) & 0x7FFFFFFFu;
            largest = magnitude > largest ? magnitude : largest;
        }
        finite[l] = largest < 0x7F800000u;
        usable[l] = finite[l] && largest >= 0x00800000u;
        exponent[l] = usable[l] ? (int)(largest >> 23) - 127 : 0;
        /* 2^-exponent in two factors: 2^-127 alone would be subnormal */
        const float down = bits_to_float((uint32_t)(127 - exponent[l] / 2) << 23);
        const float rest = bits_to_float((uint32_t)(127 - (exponent[l] - exponent[l] / 2)) << 23);
        for (int i = 0; i < dim; i++) x[16 * i + l] = usable[l] ? row[i] * down * rest : 0.0f;
    }
    rotate16(codec, x, 0);
    for (int i = 0; i < dim; i++)
        for (int l = 0; l < 16; l++) norm[l] += x[16 * i + l] * x[16 * i + l];
    for (int l = 0; l < 16; l++) norm[l] = norm[l] > 0.0f ? sqrtf(norm[l]) : 1.0f;
    for (int i = 0; i < dim; i++) {
        count_boundaries(codec, x + 16 * i, norm, index + 64 * i);
        for (int l = 0; l < 16; l++) {
            const float chosen = codec->centroids[index[64 * i + l]];
            product[l] += x[16 * i + l] * chosen;
            square[l] += chosen * chosen;
        }
    }
    for (int l = 0; l < 16; l++) {
        double scale = codec->scale_norm ? (double)norm[l] : (double)product[l] / (double)square[l];
        scale = ldexp(scale, exponent[l]);
        if (scale > 0x1.fep127) scale = 0x1.fep127;
        scales[l] = !finite[l] ? 0x7FC0 : usable[l] ? to_bf16((float)scale) : 0;
        if (!finite[l])
            for (int i = 0; i < dim; i++) index[64 * i + l] = 0;
    }
}

static void encode_side(const tqai_codec *codec, int is_value, const void *rows, int64_t row_stride, int dtype,
                        uint8_t *codes, uint16_t *scales) {
    uint8_t index[64 * TQAI_MAX_HEAD_DIM];
    for (int t = 0; t < TQAI_PAGE_TOKENS; t += 16)
        encode16(codec, at(rows, dtype, t * row_stride), row_stride, dtype, index + t, scales + t);
    pack_page(codec, is_value, index, codes);
}

static void decode_side(const tqai_codec *codec, int is_value, const uint8_t *codes, const float *scales,
                        int dtype, void *out) {
    const int dim = codec->head_dim;
    const float largest = dtype == TQAI_FLOAT16 ? 65504.0f : dtype == TQAI_BFLOAT16 ? 0x1.fep127f : FLT_MAX;
    uint8_t index[64 * TQAI_MAX_HEAD_DIM];
    float x[16 * TQAI_MAX_HEAD_DIM], row[TQAI_MAX_HEAD_DIM];
    unpack_page(codec, is_value, codes, index);
    for (int t = 0; t < TQAI_PAGE_TOKENS; t += 16) {
        for (int i = 0; i < dim; i++)
            for (int l = 0; l < 16; l++) x[16 * i + l] = codec->centroids[index[64 * i + t + l]];
        rotate16(codec, x, 1); /* the scale comes last: the rotation of a huge vector could overflow */
        for (int l = 0; l < 16; l++) {
            const float scale = scales[t + l];
            for (int i = 0; i < dim; i++) {
                float value = x[16 * i + l] * scale;
                value = value > largest ? largest : value;
                row[i] = value < -largest ? -largest : value;
            }
            from_float(row, dtype, dim, (char *)out + (size_t)(t + l) * (size_t)dim * (dtype == TQAI_FLOAT32 ? 4 : 2));
        }
    }
}
