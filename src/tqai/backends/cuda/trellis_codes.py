"""Encodes and decodes pages of trellis codes."""

from __future__ import annotations

import logging
from functools import lru_cache

import numpy as np
import torch

from tqai.backends.cuda.code_params import DTYPE_NAMES, OUT_CODES, CodeParams
from tqai.backends.cuda.driver import kernel
from tqai.backends.cuda.plan import codec_macros, rotation_plan
from tqai.backends.cuda.trellis_encode import encode_macros, launch_encoder
from tqai.backends.cuda.trellis_layout import bit_places
from tqai.backends.torch_ops.codes import torch_codec
from tqai.core.page import PAGE_TOKENS, PageFormat
from tqai.errors import BackendError

__all__ = ["decode_trellis_pages", "encode_trellis_pages", "prepare_trellis_codes"]

logger = logging.getLogger("tqai")

DECODE_THREADS = 256
PAGES_AT_ONCE = 256
MOST_WORSE = 0.02
"""So much more error than torch's codes have on a page of random vectors refutes the kernel."""


class _Prepared:
    """Tables on the device for one page format."""

    def __init__(self, page_format: PageFormat, device: torch.device) -> None:
        self.decode_params = CodeParams()
        self._kept = []
        codecs = (page_format.key, page_format.value)
        for side, codec in zip(self.decode_params.side, codecs, strict=True):
            tables = [
                torch.from_numpy(array.copy()).to(device)
                for array in (rotation_plan(codec), codec.tables()["windows"])
            ]
            self._kept += tables
            side.plan, side.levels = (tensor.data_ptr() for tensor in tables)
        self.decode_shared = max(4 * PAGE_TOKENS * (codec.spec.head_dim + 1) for codec in codecs)


@lru_cache(maxsize=64)
def _prepared(page_format: PageFormat, device: torch.device) -> _Prepared:
    return _Prepared(page_format, device)


def prepare_trellis_codes(page_format: PageFormat, dtype: torch.dtype, device: torch.device) -> None:
    """Compile and load the kernels of one dtype, so that a failure shows early (BackendError)."""
    macros = codec_macros(page_format, "float32")
    kernel("trellis_decode.cu", "tqai_decode", macros, device, _prepared(page_format, device).decode_shared)
    _kernel_encodes(page_format, dtype, device)


def decode_trellis_pages(
    raw: torch.Tensor, page_format: PageFormat, dtype: torch.dtype, rotated: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[pages, 64, head_dim]` of contiguous `raw` uint8 `[pages, page_bytes]`.

    `rotated` leaves them in the space of the codes.
    """
    ready = _prepared(page_format, raw.device)
    count = raw.shape[0]
    outs = [
        torch.empty(count, PAGE_TOKENS, codec.spec.head_dim, dtype=dtype, device=raw.device)
        for codec in (page_format.key, page_format.value)
    ]
    if count:
        params = CodeParams.from_buffer_copy(ready.decode_params)
        params.pages, params.heads, params.out_dtype = raw.data_ptr(), 1, OUT_CODES[dtype]
        params.back = int(not rotated)
        for side, array in zip(params.side, outs, strict=True):
            side.out = array.data_ptr()
        macros = codec_macros(page_format, "float32")
        found = kernel("trellis_decode.cu", "tqai_decode", macros, raw.device, ready.decode_shared)
        stream = torch.cuda.current_stream(raw.device).cuda_stream
        found.launch(params, (count, 2), DECODE_THREADS, ready.decode_shared, stream)
    return outs[0], outs[1]


def encode_trellis_pages(
    keys: torch.Tensor, values: torch.Tensor, page_format: PageFormat, out: torch.Tensor
) -> None:
    """Compress `[pages, kv_heads, 64, head_dim]` into contiguous `out`, uint8 `[pages, kv_heads,
    page_bytes]`.

    The last axis of the inputs is contiguous. Memory beside that: 128 to 512 KiB for each page side that
    is under way, at most 4 on a multiprocessor.
    """
    if _kernel_encodes(page_format, keys.dtype, keys.device):
        _encode_by_kernel(keys, values, page_format, out)
    else:
        _encode_by_torch(keys, values, page_format, out)


def _encode_by_kernel(
    keys: torch.Tensor, values: torch.Tensor, page_format: PageFormat, out: torch.Tensor
) -> None:
    sides = [(page_format.key, keys, False), (page_format.value, values, True)]
    first, second = (encode_macros(codec, DTYPE_NAMES[array.dtype]) for codec, array, _ in sides)
    for part in [sides] if first == second else [sides[:1], sides[1:]]:
        launch_encoder(part, page_format, out)


_GOOD: dict[tuple[PageFormat, torch.dtype, torch.device], bool] = {}


def _kernel_encodes(page_format: PageFormat, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel is used. At first use one page is encoded to see that its codes are as good as
    torch's; what does not compile or is worse is said once as a warning and not used. While a stream is
    captured nothing can be compared: then False, until the next call."""
    key = (page_format, dtype, device)
    if key not in _GOOD:
        if torch.cuda.is_current_stream_capturing():
            return False
        _GOOD[key] = _is_as_good(page_format, dtype, device)
    return _GOOD[key]


def _is_as_good(page_format: PageFormat, dtype: torch.dtype, device: torch.device) -> bool:
    codecs = (page_format.key, page_format.value)
    generator = torch.Generator(device).manual_seed(0)
    vectors = [
        torch.randn(1, 1, PAGE_TOKENS, codec.spec.head_dim, device=device, generator=generator).to(dtype)
        for codec in codecs
    ]
    raw = torch.empty(1, 1, page_format.page_bytes, dtype=torch.uint8, device=device)
    try:
        _encode_by_kernel(vectors[0], vectors[1], page_format, raw)
        decoded = decode_trellis_pages(raw.view(1, -1), page_format, torch.float32)
    except BackendError as error:
        logger.warning("trellis codes are made by torch, not by the CUDA kernel: %s", error)
        return False
    for codec, wanted, mine in zip(codecs, vectors, decoded, strict=True):
        form = torch_codec(codec, device)
        theirs = form.decode(*form.encode(wanted), torch.float32)
        found, right = ((part.view_as(theirs) - wanted.float()).square().sum() for part in (mine, theirs))
        if not bool(found <= (1.0 + MOST_WORSE) * right):
            logger.warning(
                "trellis codes are made by torch: the CUDA kernel's are of error %g, not %g",
                float(found),
                float(right),
            )
            return False
    return True


def _encode_by_torch(
    keys: torch.Tensor, values: torch.Tensor, page_format: PageFormat, out: torch.Tensor
) -> None:
    for start in range(0, len(out), PAGES_AT_ONCE):
        part = slice(start, start + PAGES_AT_ONCE)
        at = 0
        for codec, array in ((page_format.key, keys[part]), (page_format.value, values[part])):
            codes, scales = torch_codec(codec, array.device).encode(array)
            spec = codec.spec
            places = _sources(spec.bits, spec.head_dim, at > 0, array.device)
            shifts = torch.arange(8, dtype=torch.uint8, device=array.device)
            bits = ((codes.flatten(-2).unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., places]
            size = PAGE_TOKENS * codec.row_bytes
            out[part, :, at : at + size] = (bits.unflatten(-1, (-1, 8)) << shifts).sum(-1, dtype=torch.uint8)
            at += size
            out[part, :, at : at + 2 * PAGE_TOKENS] = scales.contiguous().view(torch.uint8)
            at += 2 * PAGE_TOKENS


@lru_cache(maxsize=16)
def _sources(bits: int, dim: int, values: bool, device: torch.device) -> torch.Tensor:
    """Where each bit of a code part comes from."""
    return torch.from_numpy(np.argsort(bit_places(bits, dim, values))).to(device)
