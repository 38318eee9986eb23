"""Kernels that no GPU has run are not used unless asked for."""

from __future__ import annotations

import pytest
import torch

from tqai.backends.cuda import codes, encode, trellis_codes
from tqai.backends.cuda.unproven import VARIABLE, unproven_kernels
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat


def page_format(codec):
    return PageFormat(make_codec(CodecSpec(codec, 128, 3)), make_codec(CodecSpec(codec, 128, 3, seed=1)))


def pages():
    return torch.zeros(1, 1, 64, 128, dtype=torch.bfloat16), torch.empty(1, 1, 7000, dtype=torch.uint8)


def encoders_called(monkeypatch, codec):
    """Names of the encoders that `encode_pages` comes to; none of them runs."""
    called = []
    for module, name in (
        (codes, "encode_with_tensor_cores"),
        (codes, "encode_generally"),
        (trellis_codes, "_encode_by_kernel"),
        (trellis_codes, "_encode_by_torch"),
    ):
        monkeypatch.setattr(module, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(encode, "_difference", lambda *_: None)
    monkeypatch.setattr(encode, "_RIGHT", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(trellis_codes, "_kernel_encodes", lambda *_: True)
    vectors, out = pages()
    codes.encode_pages(vectors, vectors, page_format(codec), out)
    return called


@pytest.mark.parametrize("value", [None, "", "0"])
def test_they_are_off(monkeypatch, value):
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    assert not unproven_kernels()
    assert encoders_called(monkeypatch, "scalar") == ["encode_generally"]
    assert encoders_called(monkeypatch, "trellis") == ["_encode_by_torch"]


def test_they_are_on_where_asked_for(monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    assert unproven_kernels()
    assert encoders_called(monkeypatch, "scalar") == ["encode_with_tensor_cores"]
    assert encoders_called(monkeypatch, "trellis") == ["_encode_by_kernel"]
