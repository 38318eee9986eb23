"""`TritonBackend`: the `Backend` contract served by Triton kernels."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens, History
from tqai.backends.cuda.prefill import attend_tiles
from tqai.backends.torch_ops.attention import within_counts
from tqai.backends.triton import attention_kernels, code_kernels
from tqai.backends.triton.planes import plain_rows, plane_rows
from tqai.backends.triton.polynomial import level_polynomial
from tqai.core.codec import Codec, CodecSpec, Encoded, make_codec
from tqai.core.page import PAGE_TOKENS, CanonicalPages, PageFormat, pages_from_bytes, pages_to_bytes
from tqai.errors import BackendError

__all__ = ["TritonBackend"]

MAX_NEW_TOKENS = 16
MAX_HEAD_DIM = 256
UNIT_DIMS = 16
DTYPES = ("float16", "bfloat16")
PROGRAMS_PER_MULTIPROCESSOR = 4
ENCODE_TOKENS = 32


class TritonBackend:
    """Pages in bit planes (`planes`), kernels by Triton. Holds no state of a cache.

    With TRITON_INTERPRET=1 it serves the CPU, slowly, for tests.

    Raises:
        BackendError: no GPU that torch sees, and no interpreter asked for.
    """

    name = "triton"

    def __init__(self) -> None:
        self._interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if not self._interpreted and not torch.cuda.is_available():
            raise BackendError("torch sees no GPU")

    def refuses(self, page_format: PageFormat, device_type: str, dtype: str) -> str | None:
        """See `Backend.refuses`."""
        if device_type != "cuda" and not self._interpreted:
            return "serves GPUs only"
        if dtype not in DTYPES:
            return f"{dtype} queries: the kernels take float16 and bfloat16"
        if page_format.scale_format != "bfloat16":
            return f"scale_format {page_format.scale_format!r}: the kernels read bfloat16 scales"
        for what, codec in (("keys", page_format.key), ("values", page_format.value)):
            spec = codec.spec
            if spec.name != "scalar":
                return f"codec {spec.name!r} of {what} has no Triton kernel"
            if spec.head_dim % UNIT_DIMS or spec.head_dim > MAX_HEAD_DIM:
                return (
                    f"head_dim {spec.head_dim} of {what} is no multiple of {UNIT_DIMS} up to {MAX_HEAD_DIM}"
                )
        return None

    def encode(self, keys: Tensor, values: Tensor, page_format: PageFormat, out: Tensor) -> None:
        """See `Backend.encode`."""
        sides = (
            (keys, page_format.key, 0, page_format.key_scales_at),
            (values, page_format.value, page_format.value_codes_at, page_format.value_scales_at),
        )
        pages, heads = keys.shape[:2]
        if not pages:
            return
        for vectors, codec, codes_at, scales_at in sides:
            vectors = vectors if vectors.stride(-1) == 1 else vectors.contiguous()
            tables = _tables(codec.spec, vectors.device)
            dim = codec.spec.head_dim
            code_kernels.encode_rows[(pages * heads, PAGE_TOKENS // ENCODE_TOKENS)](
                vectors, out, tables.forward, tables.boundaries, tables.centroids, heads,
                page_format.page_bytes, codes_at, scales_at, *vectors.stride()[:3],
                DIM=dim, DIMP=_padded(dim), BITS=codec.spec.bits, TOKENS=ENCODE_TOKENS,
                NORM_SCALE=codec.spec.scale == "norm", PRECISION=_precision(),
            )  # fmt: skip

    def decode(self, raw: Tensor, page_format: PageFormat, dtype: torch.dtype) -> ExactTokens:
        """See `Backend.decode`."""
        lead = raw.shape[:-1]
        sides = self._decoded(raw.reshape(-1, page_format.page_bytes).contiguous(), page_format, dtype)
        return ExactTokens(*(side.reshape(*lead, *side.shape[1:]) for side in sides))

    def attend(
        self,
        query: Tensor,
        history: History,
        sinks: ExactTokens | None,
        recent: ExactTokens,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
    ) -> Attended:
        """See `Backend.attend`.

        Accuracy: relative L2 error at most 1e-3 against float64 attention to the exactly decoded tokens,
        before rounding to the query's dtype, for logits of standard deviation 1.
        """
        if history.counts is not None:
            first = 0 if sinks is None else sinks.keys.shape[2]
            mask = within_counts(history, mask, first, query.shape[2], recent.keys.shape[2])
        batch, query_heads, new_tokens, dim = query.shape
        if new_tokens > MAX_NEW_TOKENS:
            return attend_tiles(query, history, sinks, recent, mask, scaling, softcap, self._decoded)
        query, *exact = (
            part if part.stride(-1) == 1 else part.contiguous()
            for part in (query, *(sinks or recent), *recent)
        )
        kv_heads = recent.keys.shape[1]
        group = query_heads // kv_heads
        rows = group * new_tokens
        row_tile = max(16, _padded(rows))
        page_format = history.page_format
        value_dim = page_format.value.spec.head_dim
        key, value = (
            _tables(page_format.key.spec, query.device),
            _tables(page_format.value.spec, query.device),
        )
        splits = _splits(query.device, batch * kv_heads, history.pages)
        shape = {
            "DK": dim, "DV": value_dim, "DKP": _padded(dim), "DVP": _padded(value_dim), "ROWS": row_tile,
            "MASKED": mask is not None, "SOFTCAP": softcap is not None, "num_stages": 1,
        }  # fmt: skip
        partial = torch.empty(
            batch * kv_heads * splits * row_tile, shape["DVP"], dtype=torch.float32, device=query.device
        )
        stats = torch.empty(batch * kv_heads * splits * row_tile, 2, dtype=torch.float32, device=query.device)
        out = torch.empty(batch, query_heads, new_tokens, value_dim, dtype=query.dtype, device=query.device)
        lse = torch.empty(batch, query_heads, new_tokens, dtype=torch.float32, device=query.device)
        masked = query if mask is None else mask.view(torch.uint8)
        mask_strides = (0, 0, 0, 0) if mask is None else _mask_strides(mask)
        sink_tokens = sinks.keys.shape[2] if sinks is not None else 0
        if splits:
            scaled = query.float() * scaling
            rotated = (scaled @ key.forward).view(batch, kv_heads, group, new_tokens, dim)
            rotated = rotated.transpose(2, 3).contiguous()
            attention_kernels.attend_split[(batch * kv_heads, splits)](
                history.addresses, history.addresses.stride(0), rotated, masked, partial, stats,
                key.centroids, value.centroids, page_format.page_bytes, page_format.key_scales_at,
                page_format.value_codes_at,
                page_format.value_scales_at, history.pages, history.first_token, sink_tokens, kv_heads, group,
                rows, splits, *mask_strides, softcap or 1.0, *key.polynomial, *value.polynomial,
                BITS_K=page_format.key.spec.bits, BITS_V=page_format.value.spec.bits, **shape,
            )  # fmt: skip
        attention_kernels.merge_splits[(batch * kv_heads,)](
            query, *exact, masked, partial, stats, value.back, out, lse, history.tokens, sink_tokens,
            recent.keys.shape[2], kv_heads, group, rows, new_tokens, splits, *query.stride()[:3],
            *(stride for part in exact for stride in part.stride()[:3]), *mask_strides, scaling,
            softcap or 1.0, PRECISION=_precision(), **shape,
        )  # fmt: skip
        return Attended(out, lse)

    def to_canonical(self, raw: Tensor, page_format: PageFormat) -> CanonicalPages:
        """See `Backend.to_canonical`."""
        return _changed(pages_from_bytes(raw.cpu().numpy(), page_format), page_format, plain_rows)

    def from_canonical(self, pages: CanonicalPages, page_format: PageFormat) -> NDArray[np.uint8]:
        """See `Backend.from_canonical`."""
        return pages_to_bytes(_changed(pages, page_format, plane_rows), page_format)

    def _decoded(self, raw: Tensor, page_format: PageFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values `[pages, 64, head_dim]` of contiguous `[pages, page_bytes]`."""
        sides = (
            (page_format.key, 0, page_format.key_scales_at),
            (page_format.value, page_format.value_codes_at, page_format.value_scales_at),
        )
        found = []
        for codec, codes_at, scales_at in sides:
            tables = _tables(codec.spec, raw.device)
            dim = codec.spec.head_dim
            out = torch.empty(raw.shape[0], PAGE_TOKENS, dim, dtype=dtype, device=raw.device)
            if raw.shape[0]:
                code_kernels.decode_rows[(raw.shape[0], PAGE_TOKENS // ENCODE_TOKENS)](
                    raw, out, tables.back, tables.centroids, page_format.page_bytes, codes_at, scales_at,
                    torch.finfo(dtype).max, DIM=dim, DIMP=_padded(dim), BITS=codec.spec.bits,
                    TOKENS=ENCODE_TOKENS, PRECISION=_precision(),
                )  # fmt: skip
            found.append(out)
        return found[0], found[1]


class _Tables:
    """A codec's arrays on a device: `forward` is R transposed, `back` is R, both for row vectors."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        matrix = torch.from_numpy(codec.rotation_matrix.copy()).float()
        self.forward, self.back = matrix.T.contiguous().to(device), matrix.to(device)
        tables = codec.tables()
        self.centroids = torch.from_numpy(tables["centroids"].copy()).to(device)
        self.boundaries = torch.from_numpy(tables["boundaries"].copy()).to(device)
        self.polynomial = level_polynomial(tables["centroids"])


@lru_cache(maxsize=64)
def _tables(spec: CodecSpec, device: torch.device) -> _Tables:
    return _Tables(make_codec(spec), device)


def _precision() -> str:
    """Of float32 products: three TF32 products on NVIDIA's tensor cores come close to float32's rounding."""
    return "ieee" if torch.version.cuda is None else "tf32x3"


def _padded(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _splits(device: torch.device, segments: int, pages: int) -> int:
    if device.type != "cuda":
        return min(pages, 3)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(pages, max(1, multiprocessors * PROGRAMS_PER_MULTIPROCESSOR // segments))


def _mask_strides(mask: Tensor) -> tuple[int, int, int, int]:
    batch, heads, rows, tokens = mask.stride()
    return batch if mask.shape[0] > 1 else 0, heads if mask.shape[1] > 1 else 0, rows, tokens


def _changed(pages: CanonicalPages, page_format: PageFormat, change: Any) -> CanonicalPages:
    sides = []
    for codec, part in zip((page_format.key, page_format.value), pages, strict=True):
        sides.append(Encoded(change(part.codes, codec.spec.bits, codec.spec.head_dim), part.scales))
    return CanonicalPages(sides[0], sides[1])
