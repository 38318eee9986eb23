/* table.inc.h: the last lines of each ISA's file. */
const tqai_kernels KERNELS = {
    .name = KERNELS_NAME,
    .key_dots = key_dots,
    .value_sums = value_sums,
    .softmax_block = softmax_block,
    .exact_block = exact_block,
    .rotate = rotate,
    .to_float = to_float,
    .from_float = from_float,
    .encode_side = encode_side,
    .decode_side = decode_side,
    .steps = {[TQAI_SCALAR] = NULL},
};
