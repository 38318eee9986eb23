"""Attention as the registered torch operator `tqai::native_attend`, used where torch.compile traces.

In eager mode the backend calls C directly, which is faster than a registered operator. A traced call
passes all that the kernel reads as arguments, so that a compiled graph can be run again with other
tensors; a page format, being no tensor, goes as the text of its two codecs' specs.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tqai.backends import load
from tqai.backends.base import Attended, ExactTokens, History
from tqai.core.codec import Codec, CodecSpec, make_codec
from tqai.core.page import PageFormat

__all__ = ["attend_traced", "native_attend", "spec_text"]


@torch.library.custom_op("tqai::native_attend", mutates_args=())
def native_attend(
    query: Tensor,
    addresses: Tensor,
    slabs: list[Tensor],
    sink_keys: Tensor | None,
    sink_values: Tensor | None,
    recent_keys: Tensor,
    recent_values: Tensor,
    mask: Tensor | None,
    pages: int,
    first_token: int,
    key_spec: str,
    value_spec: str,
    scaling: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """`Backend.attend` with plain arguments; `slabs` are among them so that they outlive the call."""
    table = np.zeros((query.shape[0], pages), dtype=np.int32)
    page_format = _format_of(key_spec, value_spec)
    history = History(page_format, slabs, [0] * len(slabs), table, addresses, first_token)
    sinks = None if sink_keys is None or sink_values is None else ExactTokens(sink_keys, sink_values)
    recent = ExactTokens(recent_keys, recent_values)
    found = load("native").attend(query, history, sinks, recent, mask, scaling, softcap or None)
    return found.out, found.lse


@native_attend.register_fake
def _(
    query: Tensor,
    addresses: Tensor,
    slabs: list[Tensor],
    sink_keys: Tensor | None,
    sink_values: Tensor | None,
    recent_keys: Tensor,
    recent_values: Tensor,
    mask: Tensor | None,
    pages: int,
    first_token: int,
    key_spec: str,
    value_spec: str,
    scaling: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:3], recent_values.shape[3]))
    return out, query.new_empty(query.shape[:3], dtype=torch.float32)


def attend_traced(
    query: Tensor,
    history: History,
    sinks: ExactTokens | None,
    recent: ExactTokens,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Attended:
    """`NativeBackend.attend` as one node of a traced graph."""
    out, lse = native_attend(
        query,
        history.addresses,
        list(history.slabs),
        None if sinks is None else sinks.keys,
        None if sinks is None else sinks.values,
        recent.keys,
        recent.values,
        mask,
        history.pages,
        history.first_token,
        spec_text(history.page_format.key),
        spec_text(history.page_format.value),
        scaling,
        softcap or 0.0,
    )
    return Attended(out, lse)


def spec_text(codec: Codec) -> str:
    """The spec of a codec as text, such as "scalar 128 4 hadamard2 least_squares 0"."""
    spec = codec.spec
    return f"{spec.name} {spec.head_dim} {spec.bits} {spec.rotation} {spec.scale} {spec.seed}"


@lru_cache(maxsize=64)
def _format_of(key_spec: str, value_spec: str) -> PageFormat:
    return PageFormat(_codec_of(key_spec), _codec_of(value_spec))


def _codec_of(text: str) -> Codec:
    name, head_dim, bits, rotation, scale, seed = text.split(" ")
    return make_codec(CodecSpec(name, int(head_dim), int(bits), rotation, scale, int(seed)))
