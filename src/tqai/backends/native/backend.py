"""`NativeBackend`: the `Backend` contract served by the C kernels of `csrc/`."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqai.backends.base import Attended, ExactTokens, History
from tqai.backends.native.checks import (
    DTYPE_CODES,
    check_attend,
    check_pages,
    check_raw,
    known_history,
    raise_refusal,
)
from tqai.backends.native.library import load_library
from tqai.backends.native.order import from_row_codes, reordered, to_row_codes
from tqai.backends.native.structs import AttendArgs, Source, native_format, pack_attend_args, refusal
from tqai.backends.native.team import gomp_parallel
from tqai.backends.torch_ops.attention import within_counts
from tqai.core.page import CanonicalPages, PageFormat, pages_from_bytes, pages_to_bytes

__all__ = ["NativeBackend"]

MAX_NEW_TOKENS = 16
"""Longer queries attend to their own tokens through torch, whose matrix products are faster there."""

NO_EXACT = (0,) * 12
CPU = torch.device("cpu")


class NativeBackend:
    """Attention on packed codes in C, for the CPU. Holds no state of a cache; safe in several threads.

    Accuracy: integer products of the query and the weights with integer levels; relative L2 error at most
    2e-3 against float64 attention to the exactly decoded tokens for every pair of bits (measured 1e-4 to
    5e-4, with codes of 2 to 4 bits on AVX-512 to 1.1e-3: tests/backends/native/test_attend.py).

    Raises:
        BackendError: the library is not there or cannot be loaded.
    """

    name = "native"

    def __init__(self) -> None:
        self._library = load_library()
        self._attend = self._library.tqai_attend
        self._local = threading.local()
        self.use_own_threads(False)

    @property
    def isa(self) -> str:
        """Instruction set in use: "scalar", "avx2", "avx512" or "neon"."""
        return str(self._library.tqai_isa().decode())

    def use_isa(self, name: str) -> bool:
        """Compute with that instruction set from now on; False if this machine or build has not got it."""
        return int(self._library.tqai_set_isa(name.encode())) == 0

    def use_own_threads(self, own: bool) -> None:
        """Compute on threads of our own from now on, or, if there are such, on torch's (`team.py`)."""
        self._library.tqai_use_team(None if own else gomp_parallel())

    def refuses(self, page_format: PageFormat, device_type: str, dtype: str) -> str | None:
        """See `Backend.refuses`."""
        if device_type != "cpu":
            return f"device {device_type}: this is the CPU's"
        if dtype not in ("float32", "bfloat16", "float16"):
            return f"dtype {dtype}: float32, bfloat16 and float16 are served"
        return refusal(page_format.key) or refusal(page_format.value)

    def encode(self, keys: Tensor, values: Tensor, page_format: PageFormat, out: Tensor) -> None:
        """See `Backend.encode`.

        Raises:
            InputError: shapes, dtypes or devices do not fit.
        """
        check_pages(keys, values, page_format, out)
        keys, values = _dense_last(keys), _dense_last(values)
        code = self._library.tqai_encode(
            native_format(page_format).struct,
            _source(keys),
            _source(values),
            out.data_ptr(),
            keys.shape[0],
            keys.shape[1],
            torch.get_num_threads(),
        )
        if code:
            raise_refusal(code)

    def decode(self, raw: Tensor, page_format: PageFormat, dtype: torch.dtype) -> ExactTokens:
        """See `Backend.decode`.

        Raises:
            InputError: `raw` or `dtype` does not fit.
        """
        check_raw(raw, page_format, dtype)
        lead = raw.shape[:-1]
        raw = raw.contiguous()
        decoded = ExactTokens(
            torch.empty((*lead, 64, page_format.key.spec.head_dim), dtype=dtype),
            torch.empty((*lead, 64, page_format.value.spec.head_dim), dtype=dtype),
        )
        if raw.numel():
            code = self._library.tqai_decode(
                native_format(page_format).struct,
                raw.data_ptr(),
                decoded.keys.data_ptr(),
                decoded.values.data_ptr(),
                DTYPE_CODES[dtype],
                raw.numel() // page_format.page_bytes,
                torch.get_num_threads(),
            )
            if code:
                raise_refusal(code)
        return decoded

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

        Raises:
            InputError: a shape, dtype, device, length or page address does not fit.
        """
        if torch.compiler.is_compiling():
            from tqai.backends.native.op import attend_traced

            if history.counts is not None:
                first = 0 if sinks is None else sinks.keys.shape[2]
                mask = within_counts(history, mask, first, query.shape[2], recent.keys.shape[2])
            return attend_traced(query, history, sinks, recent, mask, scaling, softcap)
        check_attend(query, history, sinks, recent, mask)
        if query.shape[2] > MAX_NEW_TOKENS:
            return self._attend_long(query, history, sinks, recent, mask, scaling, softcap)
        return self._call(query, history, sinks, recent, mask, scaling, softcap)

    def _call(
        self,
        query: Tensor,
        history: History,
        sinks: ExactTokens | None,
        recent: ExactTokens | None,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        kv_heads: int = 0,
    ) -> Attended:
        """One native call; arguments are checked. Without `recent`, `kv_heads` says how many."""
        try:
            args, packed = self._local.args
        except AttributeError:
            packed = bytearray(ctypes.sizeof(AttendArgs))
            args = AttendArgs.from_buffer(packed)
            self._local.args = args, packed
        batch, query_heads, new_tokens, _ = query.shape
        if query.stride(3) != 1:
            query = query.contiguous()
        if recent is not None:
            kv_heads = recent.keys.shape[1]
        known = known_history(history, batch, kv_heads)
        out = torch.empty((batch, query_heads, new_tokens, known.value_dim), dtype=query.dtype, device=CPU)
        lse = torch.empty((batch, query_heads, new_tokens), dtype=torch.float32, device=CPU)
        first, first_kept = _exact_fields(sinks, 0)
        own, own_kept = _exact_fields(recent, first[8] + known.tokens)
        mask_fields = (0, 0, 0, 0, 0)
        if mask is not None:
            strides = mask.stride()
            mask_fields = (
                mask.data_ptr(),
                strides[0] if mask.shape[0] > 1 else 0,
                strides[1] if mask.shape[1] > 1 else 0,
                strides[2],
                strides[3],
            )
        pack_attend_args(
            packed,
            0,
            *known.fields,
            query.data_ptr(),
            *query.stride()[:3],
            out.data_ptr(),
            lse.data_ptr(),
            *mask_fields,
            *first,
            *own,
            batch,
            kv_heads,
            query_heads // kv_heads,
            new_tokens,
            known.pages,
            known.first_token,
            DTYPE_CODES[query.dtype],
            torch.get_num_threads(),
            mask is None,
            scaling,
            softcap or 0.0,
        )
        code = self._attend(args)
        del first_kept, own_kept
        if code:
            raise_refusal(code)
        return Attended(out, lse)

    def _attend_long(
        self,
        query: Tensor,
        history: History,
        sinks: ExactTokens | None,
        recent: ExactTokens,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Attended:
        """Exact tokens through torch, history through the kernels, merged by their log-sum-exp."""
        from tqai.backends.torch_ops.attention import attend as attend_exact

        first = 0 if sinks is None else sinks.keys.shape[2]
        of_exact = mask
        if mask is not None and history.tokens:
            of_exact = torch.cat([mask[..., :first], mask[..., first + history.tokens :]], dim=-1)
        wide = query.float()
        exact = attend_exact(wide, None, sinks, recent, of_exact, scaling, softcap)
        if not history.tokens:
            return Attended(exact.out.to(query.dtype), exact.lse)
        of_history = None if mask is None else mask[..., first : first + history.tokens]
        coded = self._call(wide, history, None, None, of_history, scaling, softcap, recent.keys.shape[1])
        lse = torch.logaddexp(exact.lse, coded.lse)
        anchor = torch.where(lse == -torch.inf, 0.0, lse)
        out = exact.out * torch.exp(exact.lse - anchor).unsqueeze(-1)
        out += coded.out * torch.exp(coded.lse - anchor).unsqueeze(-1)
        limit = torch.finfo(query.dtype).max
        return Attended(out.clamp_(-limit, limit).to(query.dtype), lse)

    def to_canonical(self, raw: Tensor, page_format: PageFormat) -> CanonicalPages:
        """See `Backend.to_canonical`."""
        return reordered(pages_from_bytes(raw.cpu().numpy(), page_format), page_format, to_row_codes)

    def from_canonical(self, pages: CanonicalPages, page_format: PageFormat) -> NDArray[np.uint8]:
        """See `Backend.from_canonical`."""
        return pages_to_bytes(reordered(pages, page_format, from_row_codes), page_format)


def _dense_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _source(tensor: Tensor) -> Source:
    return Source(tensor.data_ptr(), (ctypes.c_int64 * 3)(*tensor.stride()[:3]), DTYPE_CODES[tensor.dtype])


def _exact_fields(
    exact: ExactTokens | None, column: int
) -> tuple[tuple[int, ...], tuple[Tensor, Tensor] | None]:
    """The fields of one `tqai_exact`, and what must outlive the call."""
    if exact is None or exact.keys.shape[2] == 0:
        return NO_EXACT, None
    keys, values = _dense_last(exact.keys), _dense_last(exact.values)
    fields = (
        keys.data_ptr(),
        values.data_ptr(),
        *keys.stride()[:3],
        *values.stride()[:3],
        keys.shape[2],
        DTYPE_CODES[keys.dtype],
        DTYPE_CODES[values.dtype],
        column,
    )
    return fields, (keys, values)
