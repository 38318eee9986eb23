"""Launches the Viterbi kernel (`trellis_encode.cu`): trellis codes, one warp for a page side."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from tqai.backends.cuda.code_params import DTYPE_NAMES
from tqai.backends.cuda.driver import kernel
from tqai.backends.cuda.plan import DTYPES, ROUNDS, rotation_plan
from tqai.core.codec import Codec, CodecSpec, make_codec
from tqai.core.page import PAGE_TOKENS, PageFormat
from tqai.core.trellis import STATES
from tqai.core.trellis_code import TrellisCode, trellis_code
from tqai.core.viterbi import SEAM_STEPS

__all__ = [
    "decision_bytes",
    "encode_macros",
    "encode_params",
    "encode_shared_bytes",
    "launch_encoder",
    "less_levels",
]

BLOCKS_PER_MULTIPROCESSOR = 8
TILE_STEPS = {6: 4, 8: 16}
"""By bits of the state."""


class Units(NamedTuple):
    """Of distances: UNIT (eighths of it) and MOST of the kernel."""

    eighths: int
    most: int


UNITS = {
    6: {1: Units(1, 4080), 2: Units(8, 8160), 3: Units(40, 16000), 4: Units(128, 16000)},
    8: {1: Units(1, 4064), 2: Units(8, 8144), 3: Units(32, 10800), 4: Units(128, 16000)},
}
"""By bits of the state and of a code: as `trellis_distance.cuh` has room for."""


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
def _cover(code: TrellisCode) -> int:
    """COVER of the kernel: of the windows (P r + p) K + k of a group p, so many r have all of its levels; 0
    if a level is in several groups."""
    choices = 1 << code.bits
    groups = (1 << code.state_bits) // choices
    index = np.asarray(code.mixed(np.arange(1 << code.window_bits)))
    by_group = index.reshape(choices, groups, choices).transpose(1, 0, 2)  # [p, r, k]
    if sum(len(np.unique(group)) for group in by_group) > len(code.levels):
        return 0
    return next(
        n
        for n in range(1, choices + 1)
        if all(len(np.unique(group[:n])) == len(np.unique(group)) for group in by_group)
    )


def less_levels(codec: Codec) -> list[int]:
    """`levels` of the kernel's parameters."""
    code = _code(codec)
    units = UNITS[code.state_bits][code.bits]
    halves = (-code.levels * np.sqrt(units.eighths / 8 / units.most)).astype(np.float16)
    return (halves.view(np.uint16).astype(np.uint32) * np.uint32(0x10001)).tolist()


def encode_macros(codec: Codec, dtype: str) -> dict[str, int]:
    """Macros of the kernel for one codec and dtype of vectors."""
    code, spec = _code(codec), codec.spec
    rows = (*code.rows, 0)[:7]
    units = UNITS[code.state_bits][code.bits]
    return {
        "HEAD_DIM": spec.head_dim,
        "CODE_BITS": spec.bits,
        "BITS_OF_STATE": code.state_bits,
        "UNIT_EIGHTHS": units.eighths,
        "MOST": units.most,
        "HADAMARD_ROUNDS": ROUNDS[spec.rotation],
        "DTYPE": DTYPES[dtype],
        "INDEX_BITS": len(code.rows),
        "COVER": _cover(code) if code.state_bits == 6 else 0,
        **{f"ROW{j}": row for j, row in enumerate(rows)},
        # device.cuh wants a page format; the kernel is told places instead
        "DK": spec.head_dim,
        "DV": spec.head_dim,
        "BK": spec.bits,
        "BV": spec.bits,
    }


def _step_bytes(codec: Codec) -> int:
    """Of the decisions of a step."""
    if STATES[codec.spec.name] == 8:
        return 256
    bits = 4 if codec.spec.bits == 3 else codec.spec.bits
    return (64 * bits // 16) * 128


def decision_bytes(codec: Codec) -> int:
    """Of the decisions of one block."""
    return max(codec.spec.head_dim, SEAM_STEPS) * _step_bytes(codec)


def encode_shared_bytes(codec: Codec) -> int:
    """Dynamic shared memory of a block."""
    code = _code(codec)
    tile = TILE_STEPS[code.state_bits] * _step_bytes(codec)
    work = 2 * 4 * ((1 << code.state_bits) + len(code.levels)) if code.state_bits == 8 else 0
    return codec.spec.head_dim * 128 + tile + work + 2 * 4 * PAGE_TOKENS


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
    blocks = min(params.items, BLOCKS_PER_MULTIPROCESSOR * multiprocessors)
    # freed in stream order
    decisions = torch.empty(blocks * decision_bytes(codec), dtype=torch.uint8, device=device)
    params.decisions = decisions.data_ptr()
    shared = encode_shared_bytes(codec)
    macros = encode_macros(codec, DTYPE_NAMES[first.dtype])
    function = kernel("trellis_encode.cu", "tqai_encode", macros, device, shared)
    stream = torch.cuda.current_stream(device).cuda_stream
    function.launch(params, (blocks, 1), 32, shared, stream)
