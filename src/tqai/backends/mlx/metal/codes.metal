// What both kernels share. Metal Shading Language that is C++17 as well, given tests/backends/mlx/shim.h.
//
// Macros set by sources.py: HEAD_DIM_K, HEAD_DIM_V, BITS_K, BITS_V, ROW_BYTES_K, ROW_BYTES_V, KEY_SCALES_AT,
// VALUE_CODES_AT, VALUE_SCALES_AT, PAGE_BYTES, NORM_SCALE_K, NORM_SCALE_V, and ROWS (query heads per KV head).

// Code number `index` of a row that starts at `row`: bits index*BITS and up, least significant first.
//
//     byte      1                0
//     3 bits    5 4 4 4 3 3 3 2  2 2 1 1 1 0 0 0
template <int BITS>
inline uint tqai_code(const device uint8_t* row, uint index) {
    const uint bit = index * BITS;
    uint word = row[bit >> 3];
    if (8 % BITS != 0 && (bit & 7u) + BITS > 8u) {
        word |= uint(row[(bit >> 3) + 1]) << 8;
    }
    return (word >> (bit & 7u)) & ((1u << BITS) - 1u);
}

// The 16-bit scale number `index` of a page, at byte `at`.
inline float tqai_scale(const device uint8_t* page, uint at, uint index) {
    const device uint8_t* octets = page + at + 2 * index;
    return as_type<float>((uint(octets[0]) | (uint(octets[1]) << 8)) << 16);
}

inline bool tqai_finite(float x) {
    return (as_type<uint>(x) & 0x7f800000u) != 0x7f800000u;
}

// Codes and scale of one rotated vector `y` of DIM coordinates, divided by its largest coordinate before.
template <int DIM, int BITS, bool NORM_SCALE>
inline void tqai_encode_row(
    const device float* y,
    float largest,
    const device float* boundaries,
    const device float* centroids,
    device uint8_t* codes,
    device uint8_t* scale_octets
) {
    const bool finite = tqai_finite(largest);
    const bool usable = finite && largest >= 1.17549435e-38f;
    float square = 0.0f;
    for (uint j = 0; j < uint(DIM); j++) {
        square += y[j] * y[j];
    }
    const float norm = sqrt(square);
    const float divisor = usable ? norm : 1.0f;
    float dot = 0.0f;
    float power = 0.0f;
    uint held = 0;
    uint buffer = 0;
    for (uint j = 0; j < uint(DIM); j++) {
        const float x = y[j] / divisor;
        uint code = 0;
        for (uint step = 1u << (BITS - 1); step > 0; step >>= 1) {
            code += x >= boundaries[code + step - 1] ? step : 0u;
        }
        code = finite ? code : 0u;
        const float c = centroids[code];
        dot += y[j] * c;
        power += c * c;
        buffer |= code << held;
        held += BITS;
        while (held >= 8) {
            *codes++ = uint8_t(buffer & 255u);
            buffer >>= 8;
            held -= 8;
        }
    }
    if (held > 0) {
        *codes = uint8_t(buffer & 255u);
    }
    float scale = (NORM_SCALE ? norm : dot / power) * (usable ? largest : 0.0f);
    scale = scale > 3.38953139e38f ? 3.38953139e38f : scale;
    uint bits = as_type<uint>(scale);
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    bits = finite ? bits : 0x7fc0u;
    scale_octets[0] = uint8_t(bits & 255u);
    scale_octets[1] = uint8_t(bits >> 8);
}
