"""Launches the encoding with tensor cores (`encode_mma.cu`, `encode_wgmma.cu`), keys, then values.

It is used where, on the device at hand, it makes the pages that the general kernel makes, of a case drawn at
first use.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import lru_cache

import torch

from tqai.backends.cuda.code_params import DTYPE_NAMES
from tqai.backends.cuda.driver import kernel
from tqai.backends.cuda.encode_plan import (
    WARPS,
    encode_words,
    has_tensor_encoding,
    level_cells,
    tables_bytes,
)
from tqai.backends.cuda.plan import codec_macros
from tqai.core.codec import Codec
from tqai.core.page import PAGE_TOKENS, PageFormat
from tqai.errors import BackendError

__all__ = ["encode_with_tensor_cores", "tensor_encoding_is_right", "tensor_form"]

logger = logging.getLogger("tqai")

BLOCKS_PER_MULTIPROCESSOR = {"mma": 3, "wgmma": 2}
"""As many as registers and shared memory leave room for."""
ENTRIES = ("tqai_encode_keys", "tqai_encode_values")
CHECKED_PAGES, CHECKED_HEADS = 3, 3
MAX_DIFFERENT_BYTES = 1e-3
"""Share of a page's bytes: a coordinate within rounding of a boundary may fall to either side."""


class _Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("pages", "source", "table")),
        ("strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_float) for name in ("per_unit", "boundary", "inner", "outer")),
        *((name, ctypes.c_int32) for name in ("heads", "units", "least_squares")),
    ]


class _Side:
    """One side's parameters but for pages and vectors, and its tables on the device."""

    def __init__(self, codec: Codec, dtype: str, values: bool, form: str, device: torch.device) -> None:
        words = encode_words(codec, dtype, values, form)
        self._words = torch.from_numpy(words.view("int32").copy()).to(device)
        arrays = codec.tables()
        half = len(arrays["centroids"]) // 2
        self.params = _Params()
        self.params.table = self._words.data_ptr()
        self.params.per_unit = level_cells(codec)[2]
        self.params.boundary = float(arrays["boundaries"][half])
        self.params.inner, self.params.outer = (float(c) for c in arrays["centroids"][half : half + 2])
        self.params.least_squares = int(codec.spec.scale == "least_squares")
        self.shared = tables_bytes(codec.spec.head_dim, form)


@lru_cache(maxsize=64)
def _sides(page_format: PageFormat, dtype: str, form: str, device: torch.device) -> tuple[_Side, _Side]:
    return (
        _Side(page_format.key, dtype, False, form, device),
        _Side(page_format.value, dtype, True, form, device),
    )


def tensor_form(device: torch.device) -> str:
    """Which of `encode_plan.FORMS` a device is served by."""
    return "wgmma" if torch.cuda.get_device_capability(device)[0] == 9 else "mma"


def encode_with_tensor_cores(
    keys: torch.Tensor,
    values: torch.Tensor,
    page_format: PageFormat,
    out: torch.Tensor,
    form: str | None = None,
) -> None:
    """As `codes.encode_pages`, for what `encode_plan.has_tensor_encoding` says; by `tensor_form` if None."""
    name, device = DTYPE_NAMES[keys.dtype], keys.device
    units = keys.shape[0] * keys.shape[1]
    if units == 0:
        return
    macros = codec_macros(page_format, name)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    form = form or tensor_form(device)
    warps = WARPS[form]
    blocks = min(-(-units // warps), multiprocessors * BLOCKS_PER_MULTIPROCESSOR[form])
    stream = torch.cuda.current_stream(device).cuda_stream
    for entry, side, array in zip(
        ENTRIES, _sides(page_format, name, form, device), (keys, values), strict=True
    ):
        params = _Params.from_buffer_copy(side.params)
        params.pages, params.source = out.data_ptr(), array.data_ptr()
        params.strides[:] = array.stride()[:3]
        params.heads, params.units = keys.shape[1], units
        found = kernel(f"encode_{form}.cu", entry, macros, device, side.shared)
        found.launch(params, (blocks, 1), 32 * warps, side.shared, stream)


_RIGHT: dict[tuple[PageFormat, torch.dtype, torch.device], bool] = {}


def tensor_encoding_is_right(
    page_format: PageFormat,
    dtype: torch.dtype,
    device: torch.device,
    general: Callable[[torch.Tensor, torch.Tensor, PageFormat, torch.Tensor], None],
) -> bool:
    """Whether this format and dtype are to be encoded with tensor cores on this device.

    At first use the kernels are compiled and their pages compared with those of `general`, of random vectors
    and some of zeros, tiny, huge and not finite. What differs, or does not compile, is said once as a warning
    and never used. While a stream is captured nothing can be compared: then False, until the next call.
    """
    if not has_tensor_encoding(page_format, DTYPE_NAMES[dtype]):
        return False
    key = (page_format, dtype, device)
    if key not in _RIGHT:
        if torch.cuda.is_current_stream_capturing():
            return False
        why = _difference(page_format, dtype, device, general)
        if why is not None:
            logger.warning("encoding with tensor cores is turned off: %s", why)
        _RIGHT[key] = why is None
    return _RIGHT[key]


def _difference(
    page_format: PageFormat,
    dtype: torch.dtype,
    device: torch.device,
    general: Callable[[torch.Tensor, torch.Tensor, PageFormat, torch.Tensor], None],
) -> str | None:
    """What is wrong with the pages of a case, or None."""
    generator = torch.Generator().manual_seed(0)
    sides = []
    for codec in (page_format.key, page_format.value):
        shape = (CHECKED_PAGES, CHECKED_HEADS, PAGE_TOKENS, codec.spec.head_dim)
        side = torch.randn(shape, generator=generator)
        side[0, 0, 0] = 0.0
        side[0, 0, 17] *= 1e-30
        side[0, 1, 34] *= 1e30
        side[0, 1, 51, 3] = torch.nan
        side[0, 2, 7, -1] = torch.inf
        sides.append(side.to(dtype).to(device))
    size = (CHECKED_PAGES, CHECKED_HEADS, page_format.page_bytes)
    found, wanted = (torch.full(size, fill, dtype=torch.uint8, device=device) for fill in (0xA5, 0x5A))
    try:
        encode_with_tensor_cores(sides[0], sides[1], page_format, found)
        general(sides[0], sides[1], page_format, wanted)
        torch.cuda.synchronize(device)
    except BackendError as error:
        return str(error)
    share = float((found != wanted).float().mean())
    if share > MAX_DIFFERENT_BYTES:
        return f"{share:.1%} of the bytes of a drawn case differ from the general kernel's"
    for at in (page_format.key_scales_at, page_format.value_scales_at):
        part = slice(at, at + 2 * PAGE_TOKENS)
        both = (raw[..., part].contiguous().view(torch.int16).int() for raw in (found, wanted))
        apart = int((next(both) - next(both)).abs().max())
        if apart > 1:
            return f"scales are {apart} steps of bfloat16 apart from the general kernel's"
    return None
