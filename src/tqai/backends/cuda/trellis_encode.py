"""Launches the Viterbi kernel (`trellis_encode.cu`): trellis codes, one block for a page side."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tqai.backends.cuda.code_params import DTYPE_NAMES
from tqai.backends.cuda.driver import kernel
from tqai.backends.cuda.plan import DTYPES, ROUNDS, rotation_plan
from tqai.core.codec import Codec, CodecSpec, make_codec
from tqai.core.page import PAGE_TOKENS, PageFormat
from tqai.core.trellis import STATES
from tqai.core.trellis_code import TrellisCode, trellis_code
from tqai.core.viterbi import SEAM_STEPS
from tqai.errors import BackendError

__all__ = [
    "decision_bytes",
    "encode_macros",
    "encode_params",
    "encode_shared_bytes",
    "encode_threads",
    "launch_encoder",
    "less_levels",
]

WARPS = {6: 4, 8: 8}
"""Of a block, which takes one side of a page; by bits of the state."""
BLOCKS = {6: 4, 8: 2}
"""On a multiprocessor, likewise."""
QUARTERS = {1: (1, 4), 2: (6, 8), 3: (1, 2), 4: (17, 34)}
"""By bits of a code: of which bits of a state the sums (exclusive or) are the two bits of its quarter in
`trellis_circles.cuh`."""


class Units(NamedTuple):
    """Of distances: UNIT (in sixteenths), MOST and BEYOND (levels) of the kernel."""

    sixteenths: int
    most: int
    beyond: int


UNITS = {
    6: {1: Units(1, 4080, 1000), 2: Units(8, 8160, 1000), 3: Units(40, 16000, 20), 4: Units(192, 32752, 10)},
    8: {1: Units(1, 4064, 1000), 2: Units(8, 8144, 1000), 3: Units(40, 16000, 20), 4: Units(192, 32752, 10)},
}
"""By bits of the state and of a code: as `trellis_distance.cuh` has room for. A larger unit is finer (4 bits:
256 has 0.02 % less error than 192), a smaller one leaves room for targets far from most levels."""


class Side(ctypes.Structure):
    """`TrellisSide`."""

    _fields_ = [
        ("source", ctypes.c_uint64),
        ("plan", ctypes.c_uint64),
        ("strides", ctypes.c_int64 * 3),
        ("codes_at", ctypes.c_int32),
        ("scales_at", ctypes.c_int32),
        ("values", ctypes.c_int32),
        ("least_squares", ctypes.c_int32),
    ]


@lru_cache(maxsize=4)
def encode_params(levels: int) -> type[ctypes.Structure]:
    """`TrellisParams` for so many levels."""

    class Params(ctypes.Structure):
        _fields_ = [
            ("pages", ctypes.c_uint64),
            ("decisions", ctypes.c_uint64),
            ("window_levels", ctypes.c_uint64),
            ("page_bytes", ctypes.c_int64),
            ("heads", ctypes.c_int32),
            ("items", ctypes.c_int32),
            ("sides", ctypes.c_int32),
            ("per_deviation", ctypes.c_float),
            ("side", Side * 2),
            ("levels", ctypes.c_uint32 * levels),
        ]

    return Params


def _code(codec: Codec) -> TrellisCode:
    return trellis_code(STATES[codec.spec.name], codec.spec.bits)


@lru_cache(maxsize=16)
def _apart(code: TrellisCode) -> tuple[int, int]:
    """APART0 and APART1 of the kernel: of which bits of a level's index the sums (exclusive or) are 0 for all
    windows of quarter 0.

    Raises:
        BackendError: quarters have levels in common.
    """
    windows = np.arange(1 << code.window_bits)
    first, second = (_odd(windows >> code.bits & mask) for mask in QUARTERS[code.bits])
    index = np.unique(np.asarray(code.mixed(windows))[~(first | second)])
    masks = [mask for mask in range(1, len(code.levels)) if not _odd(index & mask).any()]
    if len(masks) != 3:
        raise BackendError(f"trellis codes of {code.bits} bits: quarters of the states have levels in common")
    return masks[0], masks[1]


def _odd(numbers: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Whether so many bits are set."""
    return np.array([number.bit_count() % 2 == 1 for number in numbers.tolist()])


def less_levels(codec: Codec) -> list[int]:
    """`levels` of the kernel's parameters."""
    code = _code(codec)
    units = UNITS[code.state_bits][code.bits]
    halves = (-code.levels * np.sqrt(units.sixteenths / 16 / units.most)).astype(np.float16)
    return (halves.view(np.uint16).astype(np.uint32) * np.uint32(0x10001)).tolist()


def encode_macros(codec: Codec, dtype: str) -> dict[str, int]:
    """Macros of the kernel for one codec and dtype of vectors."""
    code, spec = _code(codec), codec.spec
    rows = (*code.rows, 0)[:7]
    units = UNITS[code.state_bits][code.bits]
    apart = _apart(code) if code.state_bits == 6 else (0, 0)
    return {
        "HEAD_DIM": spec.head_dim,
        "CODE_BITS": spec.bits,
        "BITS_OF_STATE": code.state_bits,
        "UNIT_SIXTEENTHS": units.sixteenths,
        "MOST": units.most,
        "BEYOND": units.beyond,
        "HADAMARD_ROUNDS": ROUNDS[spec.rotation],
        "DTYPE": DTYPES[dtype],
        "INDEX_BITS": len(code.rows),
        "WARPS": WARPS[code.state_bits],
        "BLOCKS": BLOCKS[code.state_bits],
        "APART0": apart[0],
        "APART1": apart[1],
        **{f"ROW{j}": row for j, row in enumerate(rows)},
        # device.cuh wants a page format; the kernel is told places instead
        "DK": spec.head_dim,
        "DV": spec.head_dim,
        "BK": spec.bits,
        "BV": spec.bits,
    }


def encode_threads(codec: Codec) -> int:
    """Of a block."""
    return 32 * WARPS[_code(codec).state_bits]


def decision_bytes(codec: Codec) -> int:
    """Of the decisions of one block."""
    return max(codec.spec.head_dim, SEAM_STEPS) * 2048


def encode_shared_bytes(codec: Codec) -> int:
    """Dynamic shared memory of a block."""
    code = _code(codec)
    words = 2 * 8 * (64 + 4) if code.state_bits == 6 else 16 * 64 + 2 * (256 + len(code.levels))
    return codec.spec.head_dim * 128 + WARPS[code.state_bits] * 4 * words + 2 * 4 * PAGE_TOKENS


@lru_cache(maxsize=64)
def _tables(spec: CodecSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotation and levels of all windows, on the device."""
    codec = make_codec(spec)
    arrays = (rotation_plan(codec), _code(codec).window_levels.astype(np.float32))
    plan, levels = (torch.from_numpy(array).to(device) for array in arrays)
    return plan, levels


def launch_encoder(
    sides: list[tuple[Codec, torch.Tensor, bool]], page_format: PageFormat, out: torch.Tensor
) -> None:
    """Encode one side of all pages, or both in one launch if their codecs want the same kernel.

    Args:
        sides: codec, vectors `[pages, kv_heads, 64, head_dim]` with dense rows, whether they are values.
        out: uint8 `[pages, kv_heads, page_bytes]`, contiguous.

    Raises:
        BackendError: the kernel does not compile or launch.
    """
    codec, first, _ = sides[0]
    pages, heads = first.shape[:2]
    if pages * heads == 0:
        return
    device = out.device
    code = _code(codec)
    params = encode_params(len(code.levels))()
    params.pages, params.page_bytes = out.data_ptr(), page_format.page_bytes
    params.heads, params.sides, params.items = heads, len(sides), pages * heads * len(sides)
    params.per_deviation = float(np.sqrt(codec.spec.head_dim) / code.step)
    params.levels[:] = less_levels(codec)
    for side, (its_codec, array, values) in zip(params.side, sides, strict=False):
        plan, levels = _tables(its_codec.spec, device)
        params.window_levels = levels.data_ptr()
        side.source, side.plan = array.data_ptr(), plan.data_ptr()
        side.strides[:] = array.stride()[:3]
        side.codes_at = page_format.value_codes_at if values else 0
        side.scales_at = page_format.value_scales_at if values else page_format.key_scales_at
        side.values = int(values)
        side.least_squares = int(its_codec.spec.scale == "least_squares")
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    blocks = min(params.items, BLOCKS[code.state_bits] * multiprocessors)
    # freed in stream order
    decisions = torch.empty(blocks * decision_bytes(codec), dtype=torch.uint8, device=device)
    params.decisions = decisions.data_ptr()
    shared = encode_shared_bytes(codec)
    macros = encode_macros(codec, DTYPE_NAMES[first.dtype])
    function = kernel("trellis_encode.cu", "tqai_encode", macros, device, shared)
    stream = torch.cuda.current_stream(device).cuda_stream
    function.launch(params, (blocks, 1), encode_threads(codec), shared, stream)
