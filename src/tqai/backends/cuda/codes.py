"""Launches the encoding and decoding kernels."""

from __future__ import annotations

from functools import lru_cache

import torch

from tqai.backends.cuda.code_params import DTYPE_NAMES, OUT_CODES, CodeParams
from tqai.backends.cuda.driver import kernel
from tqai.backends.cuda.encode import encode_with_tensor_cores, tensor_encoding_is_right
from tqai.backends.cuda.plan import code_shared_bytes, codec_macros, quantizer_cells, rotation_plan
from tqai.backends.cuda.trellis_codes import (
    decode_trellis_pages,
    encode_trellis_pages,
    prepare_trellis_codes,
)
from tqai.backends.cuda.trellis_plan import is_trellis
from tqai.core.page import PAGE_TOKENS, PageFormat

__all__ = ["decode_pages", "encode_generally", "encode_pages", "prepare_codes"]

THREADS = 256


class _Prepared:
    """Tables on the device for one page format."""

    def __init__(self, page_format: PageFormat, device: torch.device) -> None:
        self.params = CodeParams()
        self.shared = 0
        self._kept = []
        for side, codec in zip(self.params.side, (page_format.key, page_format.value), strict=True):
            cells, scale = quantizer_cells(codec)
            tables = [
                torch.from_numpy(array.copy()).to(device)
                for array in (rotation_plan(codec), codec.tables()["centroids"], cells)
            ]
            self._kept += tables
            side.plan, side.levels, side.cells = (table.data_ptr() for table in tables)
            side.bucket_scale, side.buckets = scale, len(cells)
            side.least_squares = int(codec.spec.scale == "least_squares")
            self.shared = max(self.shared, code_shared_bytes(codec, len(cells)))


@lru_cache(maxsize=64)
def _prepared(page_format: PageFormat, device: torch.device) -> _Prepared:
    return _Prepared(page_format, device)


def prepare_codes(page_format: PageFormat, dtype: torch.dtype, device: torch.device) -> None:
    """Compile and load the kernels of one dtype, so that a failure shows early (BackendError)."""
    if is_trellis(page_format):
        return prepare_trellis_codes(page_format, dtype, device)
    shared = _prepared(page_format, device).shared
    kernel("encode.cu", "tqai_encode", codec_macros(page_format, DTYPE_NAMES[dtype]), device, shared)
    kernel("decode.cu", "tqai_decode", codec_macros(page_format, "float32"), device, shared)
    tensor_encoding_is_right(page_format, dtype, device, encode_generally)


def encode_pages(
    keys: torch.Tensor, values: torch.Tensor, page_format: PageFormat, out: torch.Tensor
) -> None:
    """Compress `[pages, kv_heads, 64, head_dim]` into contiguous `out`, uint8 `[pages, kv_heads,
    page_bytes]`.

    The last axis of the inputs is contiguous and their rows are aligned to 16 bytes.
    """
    if is_trellis(page_format):
        return encode_trellis_pages(keys, values, page_format, out)
    if tensor_encoding_is_right(page_format, keys.dtype, keys.device, encode_generally):
        encode_with_tensor_cores(keys, values, page_format, out)
    else:
        encode_generally(keys, values, page_format, out)


def encode_generally(
    keys: torch.Tensor, values: torch.Tensor, page_format: PageFormat, out: torch.Tensor
) -> None:
    """As `encode_pages`, by the kernel that takes every format and dtype (`encode.cu`)."""
    ready = _prepared(page_format, keys.device)
    params = CodeParams.from_buffer_copy(ready.params)
    params.pages = out.data_ptr()
    params.heads = keys.shape[1]
    for side, array in zip(params.side, (keys, values), strict=True):
        side.source = array.data_ptr()
        side.strides[:] = array.stride()[:3]
    _launch(
        "tqai_encode",
        page_format,
        keys.dtype,
        keys.device,
        params,
        ready.shared,
        keys.shape[0] * keys.shape[1],
    )


def decode_pages(
    raw: torch.Tensor, page_format: PageFormat, dtype: torch.dtype, rotated: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[pages, 64, head_dim]` of contiguous `raw` uint8 `[pages, page_bytes]`.

    `rotated` leaves them in the space of the codes.
    """
    if is_trellis(page_format):
        return decode_trellis_pages(raw, page_format, dtype, rotated)
    ready = _prepared(page_format, raw.device)
    count = raw.shape[0]
    outs = [
        torch.empty(count, PAGE_TOKENS, codec.spec.head_dim, dtype=dtype, device=raw.device)
        for codec in (page_format.key, page_format.value)
    ]
    params = CodeParams.from_buffer_copy(ready.params)
    params.pages, params.heads, params.out_dtype, params.back = (
        raw.data_ptr(),
        1,
        OUT_CODES[dtype],
        int(not rotated),
    )
    for side, array in zip(params.side, outs, strict=True):
        side.out = array.data_ptr()
    _launch("tqai_decode", page_format, torch.float32, raw.device, params, ready.shared, count)
    return outs[0], outs[1]


def _launch(
    entry: str,
    page_format: PageFormat,
    dtype: torch.dtype,
    device: torch.device,
    params: CodeParams,
    shared: int,
    blocks: int,
) -> None:
    if blocks == 0:
        return
    macros = codec_macros(page_format, DTYPE_NAMES[dtype])
    file = "encode.cu" if entry == "tqai_encode" else "decode.cu"
    found = kernel(file, entry, macros, device, shared)
    found.launch(params, (blocks, 2), THREADS, shared, torch.cuda.current_stream(device).cuda_stream)
