"""`TorchBackend`: the `Backend` contract served by torch operations."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens, History
from tqai.backends.torch_ops.attention import attend, split_page
from tqai.backends.torch_ops.codes import torch_codec
from tqai.backends.torch_ops.log_scale import to_steps
from tqai.core.page import (
    BASE_BYTES,
    PAGE_TOKENS,
    CanonicalPages,
    PageFormat,
    pages_from_bytes,
    pages_to_bytes,
)
from tqai.errors import UnsupportedError

__all__ = ["TorchBackend"]


class TorchBackend:
    """Canonical pages, computed on by torch operations on any device. Holds no state."""

    name = "torch"

    def refuses(self, page_format: PageFormat, device_type: str, dtype: str) -> str | None:
        """See `Backend.refuses`: only a codec without a torch form is refused."""
        try:
            torch_codec(page_format.key, torch.device("cpu"))
            torch_codec(page_format.value, torch.device("cpu"))
        except UnsupportedError as error:
            return str(error)
        return None

    def encode(self, keys: Tensor, values: Tensor, page_format: PageFormat, out: Tensor) -> None:
        """See `Backend.encode`."""
        parts = (
            (keys, page_format.key, 0, page_format.key_scales_at, page_format.bases_at),
            (
                values,
                page_format.value,
                page_format.value_codes_at,
                page_format.value_scales_at,
                page_format.bases_at + BASE_BYTES,
            ),
        )
        if page_format.bases_bytes:
            out[..., page_format.bases_at :] = 0
        for vectors, codec, codes_at, scales_at, base_at in parts:
            codes, scales = torch_codec(codec, vectors.device).encode(vectors)
            size = PAGE_TOKENS * codec.row_bytes
            out[..., codes_at : codes_at + size] = codes.flatten(-2)
            if page_format.scale_format == "bfloat16":
                scale_octets = scales.contiguous().view(torch.uint8)
            else:
                scale_octets, out[..., base_at : base_at + BASE_BYTES] = to_steps(scales)
            out[..., scales_at : scales_at + page_format.part_scales_bytes] = scale_octets

    def decode(self, raw: Tensor, page_format: PageFormat, dtype: torch.dtype) -> ExactTokens:
        """See `Backend.decode`."""
        key_codes, key_scales, value_codes, value_scales = split_page(raw, page_format)
        return ExactTokens(
            torch_codec(page_format.key, raw.device).decode(key_codes, key_scales, dtype),
            torch_codec(page_format.value, raw.device).decode(value_codes, value_scales, dtype),
        )

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
        """See `Backend.attend`."""
        return attend(query, history, sinks, recent, mask, scaling, softcap)

    def to_canonical(self, raw: Tensor, page_format: PageFormat) -> CanonicalPages:
        """See `Backend.to_canonical`; the order is the same, only the container changes."""
        return pages_from_bytes(raw.cpu().numpy(), page_format)

    def from_canonical(self, pages: CanonicalPages, page_format: PageFormat) -> NDArray[np.uint8]:
        """See `Backend.from_canonical`."""
        return pages_to_bytes(pages, page_format)
