"""`CudaBackend`: the `Backend` contract served by CUDA C++ kernels."""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens, History
from tqai.backends.cuda.attention import Exact, attend_pages
from tqai.backends.cuda.calls import prepare
from tqai.backends.cuda.codes import decode_pages, encode_pages, prepare_codes
from tqai.backends.cuda.layout import fragment_pages, plain_pages
from tqai.backends.cuda.plan import refuse_format
from tqai.backends.cuda.prefill import attend_tiles
from tqai.backends.torch_ops.attention import within_counts
from tqai.core.page import PAGE_TOKENS, CanonicalPages, PageFormat
from tqai.errors import BackendError

__all__ = ["MAX_NEW_TOKENS", "CudaBackend"]

logger = logging.getLogger("tqai")

MAX_NEW_TOKENS = 16
"""So many new tokens go through the kernel that reads the codes; more through tiles (`prefill`)."""

LEAST_CAPABILITY = (8, 0)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class CudaBackend:
    """Pages in fragment order (`layout`), kernels by NVRTC (`compile`). Holds no state of a cache.

    Raises:
        BackendError: no NVIDIA GPU of compute capability 8.0 or more, or no cuda-core to compile with.
    """

    name = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available() or torch.version.cuda is None:
            raise BackendError("torch sees no NVIDIA GPU")
        capability = torch.cuda.get_device_capability()
        if capability < LEAST_CAPABILITY:
            raise BackendError(f"compute capability {capability[0]}.{capability[1]}: the kernels need 8.0")
        if find_spec("cuda") is None or find_spec("cuda.bindings") is None or find_spec("cuda.core") is None:
            raise BackendError("cuda-core is not installed (pip install 'tqai[cuda]')")

    def refuses(self, page_format: PageFormat, device_type: str, dtype: str) -> str | None:
        """See `Backend.refuses`. Compiles the kernels; a failure is a refusal, with a warning in the log."""
        if device_type != "cuda":
            return "serves CUDA devices only"
        if dtype not in DTYPES:
            return f"{dtype} queries: the kernels take float16 and bfloat16"
        reason = refuse_format(page_format)
        return reason if reason is not None else _build_failure(page_format, dtype)

    def encode(self, keys: Tensor, values: Tensor, page_format: PageFormat, out: Tensor) -> None:
        """See `Backend.encode`."""
        with torch.cuda.device(out.device):
            encode_pages(_aligned(keys), _aligned(values), page_format, out)

    def decode(self, raw: Tensor, page_format: PageFormat, dtype: torch.dtype) -> ExactTokens:
        """See `Backend.decode`."""
        lead = raw.shape[:-1]
        flat = raw.reshape(-1, page_format.page_bytes).contiguous()
        with torch.cuda.device(raw.device):
            keys, values = decode_pages(flat, page_format, dtype)
        return ExactTokens(keys.reshape(*lead, *keys.shape[1:]), values.reshape(*lead, *values.shape[1:]))

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

        Accuracy: relative L2 error at most 2e-3 against float64 attention to the exactly decoded tokens,
        before the result is rounded to the query's dtype, for logits of standard deviation 1
        (tests/backends/cuda/test_attend_gpu.py); the error of a logit is about 8e-4 of its deviation.
        """
        if query.device.index != torch.cuda.current_device():
            with torch.cuda.device(query.device):
                return self.attend(query, history, sinks, recent, mask, scaling, softcap)
        if query.shape[2] > MAX_NEW_TOKENS:
            if history.counts is not None:
                first = 0 if sinks is None else sinks.keys.shape[2]
                mask = within_counts(history, mask, first, query.shape[2], recent.keys.shape[2])
            return attend_tiles(query, history, sinks, recent, mask, scaling, softcap, decode_pages)
        out, lse = attend_pages(
            query if query.stride(-1) == 1 else query.contiguous(),
            history.page_format,
            history.addresses,
            history.table.shape[1],
            scaling,
            page_counts=history.counts,
            first_token=history.first_token,
            sinks=None if sinks is None or sinks.keys.shape[2] == 0 else _exact(sinks, query.dtype),
            recent=_exact(recent, query.dtype),
            mask=mask,
            softcap=softcap,
            early=_seen_before(history),
        )
        return Attended(out, lse)

    def to_canonical(self, raw: Tensor, page_format: PageFormat) -> CanonicalPages:
        """See `Backend.to_canonical`."""
        return plain_pages(raw.cpu().numpy(), page_format)

    def from_canonical(self, pages: CanonicalPages, page_format: PageFormat) -> NDArray[np.uint8]:
        """See `Backend.from_canonical`."""
        return fragment_pages(pages, page_format)


@lru_cache(maxsize=256)
def _build_failure(page_format: PageFormat, dtype: str) -> str | None:
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        prepare(page_format, DTYPES[dtype], device)
        prepare_codes(page_format, DTYPES[dtype], device)
        torch.cuda.synchronize(device)
    except BackendError as error:
        logger.warning("the CUDA kernels cannot be used: %s", error)
        return str(error)
    return None


def _seen_before(history: History) -> bool:
    """Whether this very history has been attended to already. Its pages and addresses, which never change,
    were then written before that launch and so before whatever precedes this one on the stream."""
    at = history.addresses.data_ptr()
    if history.__dict__.get(_SEEN) == at:
        return True
    history.__dict__[_SEEN] = at  # a frozen dataclass refuses setattr; a copy has other addresses
    return False


_SEEN = "_seen_by_cuda_at"


def _exact(tokens: ExactTokens, dtype: torch.dtype) -> Exact:
    keys, values = tokens
    if keys.dtype != dtype or values.dtype != dtype:
        keys, values = keys.to(dtype), values.to(dtype)
    return Exact(_aligned(keys), _aligned(values))


def _aligned(array: Tensor) -> Tensor:
    """`array`, or a contiguous copy if a row does not begin at a multiple of 16 bytes or is not dense."""
    size = array.element_size()
    strides = array.stride()
    fits = strides[-1] == 1 and array.data_ptr() % 16 == 0
    if fits and (strides[0] | strides[1] | strides[2]) * size % 16:
        for length, stride in zip(array.shape[:-1], strides[:-1], strict=True):
            fits = fits and (length <= 1 or stride * size % 16 == 0)
    return array if fits else array.contiguous()


assert PAGE_TOKENS == 64  # the kernels are written for it
