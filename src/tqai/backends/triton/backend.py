"""`TritonBackend`: the `Backend` contract served by Triton kernels."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens, History
from tqai.backends.cuda.prefill import attend_tiles
from tqai.backends.torch_ops.attention import within_counts
from tqai.backends.triton import code_kernels
from tqai.backends.triton.attention import attend_pages
from tqai.backends.triton.order import ordered_pages, plain_pages
from tqai.backends.triton.slices import SLICES, is_sliced
from tqai.backends.triton.tables import padded, precision, tables
from tqai.backends.triton.whole_levels import MOST_BITS, whole_levels
from tqai.core.codec import Codec
from tqai.core.page import PAGE_TOKENS, CanonicalPages, PageFormat
from tqai.errors import BackendError

__all__ = ["TritonBackend"]

MAX_NEW_TOKENS = 16
MAX_HEAD_DIM = 128
"""Beyond, a rotation matrix does not fit shared memory, and Triton 3.6 compiles no loop over parts of it."""
UNIT_DIMS = 16
DTYPES = ("float16", "bfloat16")
ENCODE_TOKENS = 32
MATRIX_BYTES = 65536
"""Of a rotation matrix in shared memory at once."""


class TritonBackend:
    """Pages in slices or bit planes (`slices`, `planes`), kernels by Triton. Holds no state of a cache.

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
            if spec.bits <= MOST_BITS and whole_levels(codec.tables()["centroids"]) is None:
                return f"the levels of {what} are no whole numbers of a byte"
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
            ready = tables(codec.spec, vectors.device)
            code_kernels.encode_rows[(pages * heads, PAGE_TOKENS // ENCODE_TOKENS)](
                vectors, out, ready.forward, ready.boundaries, ready.centroids, heads,
                page_format.page_bytes, codes_at, scales_at, *vectors.stride()[:3],
                NORM_SCALE=codec.spec.scale == "norm", **_shape(page_format, codec, codes_at > 0),
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
        if query.shape[2] > MAX_NEW_TOKENS:
            return attend_tiles(query, history, sinks, recent, mask, scaling, softcap, self._decoded)
        return attend_pages(query, history, sinks, recent, mask, scaling, softcap)

    def to_canonical(self, raw: Tensor, page_format: PageFormat) -> CanonicalPages:
        """See `Backend.to_canonical`."""
        return plain_pages(raw.cpu().numpy(), page_format)

    def from_canonical(self, pages: CanonicalPages, page_format: PageFormat) -> NDArray[np.uint8]:
        """See `Backend.from_canonical`."""
        return ordered_pages(pages, page_format)

    def _decoded(self, raw: Tensor, page_format: PageFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values `[pages, 64, head_dim]` of contiguous `[pages, page_bytes]`."""
        sides = (
            (page_format.key, 0, page_format.key_scales_at),
            (page_format.value, page_format.value_codes_at, page_format.value_scales_at),
        )
        found = []
        for codec, codes_at, scales_at in sides:
            ready = tables(codec.spec, raw.device)
            out = torch.empty(raw.shape[0], PAGE_TOKENS, codec.spec.head_dim, dtype=dtype, device=raw.device)
            if raw.shape[0]:
                code_kernels.decode_rows[(raw.shape[0], PAGE_TOKENS // ENCODE_TOKENS)](
                    raw, out, ready.back, ready.centroids, page_format.page_bytes, codes_at, scales_at,
                    torch.finfo(dtype).max, **_shape(page_format, codec, codes_at > 0),
                )  # fmt: skip
            found.append(out)
        return found[0], found[1]


def _shape(page_format: PageFormat, codec: Codec, values: bool) -> dict[str, Any]:
    """What encoding and decoding kernels are compiled for."""
    dim, bits = codec.spec.head_dim, codec.spec.bits
    width = padded(dim)
    return {
        "DIM": dim,
        "DIMP": width,
        "BITS": bits,
        "TOKENS": ENCODE_TOKENS,
        "SLICES": SLICES[bits] if is_sliced(page_format) else 0,
        "VALUES": values,
        "CHUNK": min(width, MATRIX_BYTES // (4 * width)),
        "PRECISION": precision(),
    }
