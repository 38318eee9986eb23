// Attention of one new token over the pages of one slab, on the codes: a threadgroup of 128 threads per
// (split of the pages, KV head, sequence). All ROWS query heads of the KV head share each unpacked code.
//
//     query          float [batch, heads, ROWS, HEAD_DIM_K]       rotated and scaled
//     pages          uint8 [batch, heads, slab pages, PAGE_BYTES]
//     key_centroids, value_centroids    float [256], padded
//     ranges         int [batch, 2]      first token of the slab in sight, and one past the last
//     sizes          int [3]             KV heads, pages of the slab, pages per split
//     out            float [batch, heads, splits, ROWS, HEAD_DIM_V]   sum of weights times values, rotated
//     stats          float [batch, heads, splits, ROWS, 2]            largest logit, sum of weights
//
// For each page: (1) thread = token + 64 * half of the coordinates: partial scores of all rows;
// (2) simdgroup = row, lane = tokens lane and lane + 32: online softmax; (3) thread = coordinate of the
// values: weighted sums of all rows.
const uint thread = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint group = simdgroup_index_in_threadgroup;
const uint split = threadgroup_position_in_grid.x;
const uint head = threadgroup_position_in_grid.y;
const uint sequence = threadgroup_position_in_grid.z;
const uint heads = uint(sizes[0]);
const uint slab_pages = uint(sizes[1]);
const uint pages_per_split = uint(sizes[2]);
const uint splits = (slab_pages + pages_per_split - 1) / pages_per_split;
const int first = ranges[2 * sequence];
const int last = ranges[2 * sequence + 1];

threadgroup float rows[ROWS * HEAD_DIM_K];
threadgroup float key_levels[1 << BITS_K];
threadgroup float value_levels[1 << BITS_V];
threadgroup float partial[2 * ROWS * 64];
threadgroup float weights[ROWS * 64];
threadgroup float shrink[ROWS];
threadgroup float top[ROWS];
threadgroup float total[ROWS];

const size_t sequence_head = size_t(sequence) * heads + head;
for (uint i = thread; i < ROWS * HEAD_DIM_K; i += 128) {
    rows[i] = query[sequence_head * ROWS * HEAD_DIM_K + i];
}
for (uint i = thread; i < (1u << BITS_K); i += 128) {
    key_levels[i] = key_centroids[i];
}
for (uint i = thread; i < (1u << BITS_V); i += 128) {
    value_levels[i] = value_centroids[i];
}
for (uint i = thread; i < ROWS; i += 128) {
    top[i] = -INFINITY;
    total[i] = 0.0f;
}
float sums[ROWS * ((HEAD_DIM_V + 127) / 128)];
for (uint i = 0; i < ROWS * ((HEAD_DIM_V + 127) / 128); i++) {
    sums[i] = 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const uint begin = split * pages_per_split;
const uint end = begin + pages_per_split < slab_pages ? begin + pages_per_split : slab_pages;
for (uint number = begin; number < end; number++) {
    const int column = int(number) * 64;
    if (column + 64 <= first || column >= last) {
        continue;
    }
    const device uint8_t* page = pages + (sequence_head * slab_pages + number) * PAGE_BYTES;
    {
        const uint token = thread % 64;
        const uint half = thread / 64;
        const uint middle = (HEAD_DIM_K + 1) / 2;
        const device uint8_t* row = page + token * ROW_BYTES_K;
        float scores[ROWS];
        for (uint g = 0; g < ROWS; g++) {
            scores[g] = 0.0f;
        }
        const uint stop = half == 0 ? middle : uint(HEAD_DIM_K);
        for (uint j = half * middle; j < stop; j++) {
            const float level = key_levels[tqai_code<BITS_K>(row, j)];
            for (uint g = 0; g < ROWS; g++) {
                scores[g] += rows[g * HEAD_DIM_K + j] * level;
            }
        }
        for (uint g = 0; g < ROWS; g++) {
            partial[(half * ROWS + g) * 64 + token] = scores[g];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint g = group; g < ROWS; g += 4) {
        float logits[2];
        bool seen[2];
        for (uint i = 0; i < 2; i++) {
            const uint token = lane + 32 * i;
            seen[i] = column + int(token) >= first && column + int(token) < last;
            const float score = partial[g * 64 + token] + partial[(ROWS + g) * 64 + token];
            // a token out of sight may carry a NaN scale: select, do not multiply
            logits[i] = seen[i] ? score * tqai_scale(page, KEY_SCALES_AT, token) : -INFINITY;
        }
        const float before = top[g];
        float highest = simd_max(logits[0] > logits[1] ? logits[0] : logits[1]);
        highest = highest > before ? highest : before;
        const float anchor = highest == -INFINITY ? 0.0f : highest;
        const float first_weight = exp(logits[0] - anchor);
        const float second_weight = exp(logits[1] - anchor);
        const float sum = simd_sum(first_weight + second_weight);
        weights[g * 64 + lane] = seen[0] ? first_weight * tqai_scale(page, VALUE_SCALES_AT, lane) : 0.0f;
        weights[g * 64 + lane + 32] =
            seen[1] ? second_weight * tqai_scale(page, VALUE_SCALES_AT, lane + 32) : 0.0f;
        if (lane == 0) {
            shrink[g] = exp(before - anchor);
            total[g] = total[g] * shrink[g] + sum;
            top[g] = highest;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint slot = 0;
    for (uint d = thread; d < HEAD_DIM_V; d += 128) {
        for (uint g = 0; g < ROWS; g++) {
            sums[slot + g] *= shrink[g];
        }
        for (uint token = 0; token < 64; token++) {
            const device uint8_t* row = page + VALUE_CODES_AT + token * ROW_BYTES_V;
            const float level = value_levels[tqai_code<BITS_V>(row, d)];
            for (uint g = 0; g < ROWS; g++) {
                sums[slot + g] += weights[g * 64 + token] * level;
            }
        }
        slot += ROWS;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

const size_t at = (sequence_head * splits + split) * ROWS;
uint filled = 0;
for (uint d = thread; d < HEAD_DIM_V; d += 128) {
    for (uint g = 0; g < ROWS; g++) {
        out[(at + g) * HEAD_DIM_V + d] = sums[filled + g];
    }
    filled += ROWS;
}
for (uint g = thread; g < ROWS; g += 128) {
    stats[2 * (at + g)] = top[g];
    stats[2 * (at + g) + 1] = total[g];
}
