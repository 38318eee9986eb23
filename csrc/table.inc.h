/* table.inc.h: the last lines of each ISA's file. */
#include "trellis_encode.inc.h"
#include "trellis_levels.inc.h"

const tqai_kernels KERNELS = {
    .name = KERNELS_NAME,
    .of_bytes = of_bytes,
    .key_dots = KEY_DOTS,
    .value_sums = VALUE_SUMS,
    .softmax_block = softmax_block,
    .exact_block = exact_block,
    .rotate = rotate,
    .to_float = to_float,
    .from_float = from_float,
    .encode_side = encode_side,
    .decode_side = decode_side,
    .steps = {[TQAI_SCALAR] = NULL, [TQAI_TRELLIS] = &trellis_steps},
};
