/* table.inc.h: the last lines of each ISA's file. */
#include "scales.h"
#include "trellis_encode.inc.h"
#include "trellis_levels.inc.h"

static void page_scales(const tqai_page_format *f, const uint8_t *page, int is_value, float by, float *to) {
    tqai_scales(f, page, is_value, by, to);
}

static void add_row(const float *restrict from, float weight, int n, float *restrict to) {
    for (int i = 0; i < n; i++) to[i] += weight * from[i];
}

const tqai_kernels KERNELS = {
    .name = KERNELS_NAME,
    .of_bytes = of_bytes,
    .key_dots = KEY_DOTS,
    .value_sums = VALUE_SUMS,
    .softmax_block = softmax_block,
    .exact_block = exact_block,
    .largest = largest_logit,
    .scales = page_scales,
    .add_row = add_row,
    .rotate = rotate,
    .to_float = to_float,
    .from_float = from_float,
    .encode_side = encode_side,
    .decode_side = decode_side,
    .steps = {[TQAI_SCALAR] = NULL, [TQAI_TRELLIS] = &trellis_steps},
};
