"""Refuses what the kernels must never see: every shape, dtype, stride and length is looked at here, before
any native call. The kernels themselves refuse null and unaligned page addresses before they read a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from tqai.backends.base import ExactTokens, History
from tqai.backends.native.structs import NativeFormat, native_format
from tqai.core.page import PAGE_TOKENS, PageFormat
from tqai.errors import InputError

__all__ = [
    "DTYPE_CODES",
    "KnownHistory",
    "check_attend",
    "check_exact",
    "check_pages",
    "check_raw",
    "known_history",
    "raise_refusal",
]

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_REFUSALS = {
    1: (InputError, "a pointer or page address is null"),
    2: (InputError, "a page address is not a multiple of 16"),
    3: (InputError, "a size, dtype or number of bits is not served"),
    4: (MemoryError, "no memory for the partial results"),
}


def raise_refusal(code: int) -> NoReturn:
    """Raise what a native function's return value stands for."""
    kind, text = _REFUSALS.get(code, (InputError, f"refused with code {code}"))
    raise kind(f"native kernels: {text}")


def check_attend(
    query: Tensor,
    history: History,
    sinks: ExactTokens | None,
    recent: ExactTokens,
    mask: Tensor | None,
) -> None:
    """Raises InputError where an argument of `attend` has a wrong shape, dtype, device or length."""
    page_format = history.page_format
    shape = query.shape
    if len(shape) != 4 or query.dtype not in DTYPE_CODES or not query.is_cpu:
        _refuse("query", query, "4 axes of float32, bfloat16 or float16 on the CPU")
    batch, query_heads, new_tokens, head_dim = shape
    if head_dim != page_format.key.spec.head_dim or new_tokens < 1 or batch < 1:
        _refuse("query", query, f"[batch, heads, 1 or more, {page_format.key.spec.head_dim}]")
    own = recent.keys.shape
    kv_heads = own[1] if len(own) == 4 else 0
    if kv_heads < 1 or query_heads % kv_heads:
        raise InputError(f"{query_heads} query heads are no multiple of {kv_heads} KV heads")
    check_exact("recent", recent, page_format, batch, kv_heads)
    if sinks is not None:
        check_exact("sinks", sinks, page_format, batch, kv_heads)
    known_history(history, batch, kv_heads)
    if mask is not None:
        tokens = history.tokens + own[2] + (0 if sinks is None else sinks.keys.shape[2])
        if mask.dtype != torch.bool or mask.dim() != 4 or not mask.is_cpu:
            _refuse("mask", mask, "4 axes of bool on the CPU")
        if (
            mask.shape[0] not in (1, batch)
            or mask.shape[1] not in (1, query_heads)
            or mask.shape[2] != new_tokens
            or mask.shape[3] != tokens
        ):
            _refuse("mask", mask, f"[1 or {batch}, 1 or {query_heads}, {new_tokens}, {tokens}]")
    elif own[2] < new_tokens:
        raise InputError(f"{own[2]} recent tokens cannot hold the query's own {new_tokens}")


@dataclass(frozen=True)
class KnownHistory:
    """What a call needs of a history that has been checked.

    Attributes:
        batch, kv_heads: what it has been checked for.
        fields: `format`, `addresses`, `address_stride` and `counts` of `tqai_attend_args`.
        kept: what the first of them points to.
    """

    batch: int
    kv_heads: int
    pages: int
    tokens: int
    first_token: int
    value_dim: int
    fields: tuple[int, int, int, int]
    kept: NativeFormat

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy of a history is looked at anew


def known_history(history: History, batch: int, kv_heads: int) -> KnownHistory:
    """The history's fields; raises InputError where it is not one of `batch` sequences with `kv_heads` heads.
    As a history does not change, it is looked at once: between one step and the next the codes drive this
    code and what it reads out of the caches, and looking at all again took 30 us of a step."""
    known: KnownHistory | None = history.__dict__.get("_native")
    if known is not None and known.batch == batch and known.kv_heads == kv_heads:
        return known
    page_format, addresses = history.page_format, history.addresses
    pages = history.pages
    if history.table.shape[0] != batch and pages:
        raise InputError(f"the page table has {history.table.shape[0]} rows for a batch of {batch}")
    if not 0 <= history.first_token < PAGE_TOKENS:
        raise InputError(f"first_token={history.first_token}: allowed are 0 to {PAGE_TOKENS - 1}")
    if pages:
        if addresses.dtype != torch.int64 or not addresses.is_cpu or addresses.dim() != 2:
            _refuse("addresses", addresses, "[batch, pages or more] of int64 on the CPU")
        if addresses.shape[0] != batch or addresses.shape[1] < pages or addresses.stride(1) != 1:
            _refuse("addresses", addresses, f"[{batch}, {pages} or more], rows dense")
        counts = history.counts
        if counts is not None and (
            counts.dtype != torch.int32
            or not counts.is_cpu
            or counts.shape != (batch,)
            or not counts.is_contiguous()
        ):
            _refuse("counts", counts, f"[{batch}] of int32 on the CPU")
        for slab in history.slabs:
            if (
                slab.dtype != torch.uint8
                or slab.shape[1:] != (kv_heads, page_format.page_bytes)
                or not (slab.is_contiguous())
            ):
                _refuse("a slab", slab, f"dense uint8 [pages, {kv_heads}, {page_format.page_bytes}]")
    kept = native_format(page_format)
    fields = (
        kept.address,
        addresses.data_ptr() if pages else 0,
        addresses.stride(0) if pages else 0,
        0 if history.counts is None else history.counts.data_ptr(),
    )
    value_dim = page_format.value.spec.head_dim
    known = KnownHistory(batch, kv_heads, pages, history.tokens, history.first_token, value_dim, fields, kept)
    object.__setattr__(history, "_native", known)
    return known


def check_exact(name: str, exact: ExactTokens, page_format: PageFormat, batch: int, kv_heads: int) -> None:
    """Raises InputError where exact tokens do not fit the page format."""
    keys, values = exact
    shape = keys.shape
    tokens = shape[2] if len(shape) == 4 else 0
    for side, tensor, codec in (("keys", keys, page_format.key), ("values", values, page_format.value)):
        shape = tensor.shape
        if tensor.dtype not in DTYPE_CODES or not tensor.is_cpu or len(shape) != 4:
            _refuse(f"{name} {side}", tensor, "4 axes of float32, bfloat16 or float16 on the CPU")
        if shape != (batch, kv_heads, tokens, codec.spec.head_dim):
            _refuse(f"{name} {side}", tensor, f"[{batch}, {kv_heads}, {tokens}, {codec.spec.head_dim}]")


def check_pages(keys: Tensor, values: Tensor, page_format: PageFormat, out: Tensor) -> None:
    """Raises InputError where the arguments of `encode` do not fit each other."""
    if keys.dim() != 4 or keys.shape[1] < 1:
        _refuse("keys", keys, f"[pages, kv_heads, {PAGE_TOKENS}, {page_format.key.spec.head_dim}]")
    lead = keys.shape[:2]
    for name, tensor, codec in (("keys", keys, page_format.key), ("values", values, page_format.value)):
        if tensor.shape != (*lead, PAGE_TOKENS, codec.spec.head_dim):
            _refuse(name, tensor, f"[{lead[0]}, {lead[1]}, {PAGE_TOKENS}, {codec.spec.head_dim}]")
        if tensor.dtype not in DTYPE_CODES or not tensor.is_cpu:
            _refuse(name, tensor, "float32, bfloat16 or float16 on the CPU")
    if out.shape != (*lead, page_format.page_bytes) or out.dtype != torch.uint8 or not out.is_contiguous():
        _refuse("out", out, f"dense uint8 [{lead[0]}, {lead[1]}, {page_format.page_bytes}]")
    if not out.is_cpu or out.data_ptr() % 2:
        raise InputError("out does not lie on the CPU at an even address")


def check_raw(raw: Tensor, page_format: PageFormat, dtype: torch.dtype) -> None:
    """Raises InputError where the arguments of `decode` do not fit the page format."""
    if raw.dtype != torch.uint8 or not raw.is_cpu or raw.dim() < 1:
        _refuse("raw pages", raw, "uint8 on the CPU")
    if raw.shape[-1] != page_format.page_bytes:
        _refuse("raw pages", raw, f"[..., {page_format.page_bytes}]")
    if dtype not in DTYPE_CODES:
        raise InputError(f"dtype={dtype}: allowed are float32, bfloat16 and float16")


def _refuse(name: str, tensor: Tensor, wanted: str) -> NoReturn:
    raise InputError(
        f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device.type}; wanted is {wanted}"
    )
