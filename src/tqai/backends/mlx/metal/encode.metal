// Encode: one thread per token of one page of one KV head and one side; a launch of
// (64 tokens, pages * KV heads, 2 sides). Rotated vectors come in, whole page records go out.
//
//     rotated_keys    float [pages, 64, HEAD_DIM_K]     largest_keys    float [pages, 64]
//     rotated_values  float [pages, 64, HEAD_DIM_V]     largest_values  float [pages, 64]
//     *_boundaries, *_centroids    float [256], padded
//     out             uint8 [pages, PAGE_BYTES]:
//         | key codes, 64 rows | 64 scales | value codes, 64 rows | 64 scales |
const uint token = thread_position_in_threadgroup.x;
const uint page = threadgroup_position_in_grid.y;
device uint8_t* record = out + size_t(page) * PAGE_BYTES;
const size_t vector = size_t(page) * 64 + token;
if (threadgroup_position_in_grid.z == 0) {
    tqai_encode_row<HEAD_DIM_K, BITS_K, NORM_SCALE_K>(
        rotated_keys + vector * HEAD_DIM_K, largest_keys[vector], key_boundaries, key_centroids,
        record + token * ROW_BYTES_K, record + KEY_SCALES_AT + 2 * token
    );
} else {
    tqai_encode_row<HEAD_DIM_V, BITS_V, NORM_SCALE_V>(
        rotated_values + vector * HEAD_DIM_V, largest_values[vector], value_boundaries, value_centroids,
        record + VALUE_CODES_AT + token * ROW_BYTES_V, record + VALUE_SCALES_AT + 2 * token
    );
}
