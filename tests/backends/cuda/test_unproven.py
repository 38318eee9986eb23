"""Kernels that no GPU has run are not used unless asked for."""

from __future__ import annotations

import pytest
import torch

from tqai.backends.cuda import codes, encode
from tqai.backends.cuda.unproven import VARIABLE, unproven_kernels
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat


def page_format():
    return PageFormat(
        make_codec(CodecSpec("scalar", 128, 3)), make_codec(CodecSpec("scalar", 128, 3, seed=1))
    )


def pages():
    return torch.zeros(1, 1, 64, 128, dtype=torch.bfloat16), torch.empty(1, 1, 7000, dtype=torch.uint8)


def encoders_called(monkeypatch):
    """Names of the encoders that `encode_pages` comes to; none of them runs."""
    called = []
    for module, name in (
        (codes, "encode_with_tensor_cores"),
        (codes, "encode_generally"),
    ):
        monkeypatch.setattr(module, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(encode, "_difference", lambda *_: None)
    monkeypatch.setattr(encode, "_RIGHT", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    vectors, out = pages()
    codes.encode_pages(vectors, vectors, page_format(), out)
    return called


@pytest.mark.parametrize("value", [None, "", "0"])
def test_they_are_off(monkeypatch, value):
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    assert not unproven_kernels()
    assert encoders_called(monkeypatch) == ["encode_generally"]


def test_they_are_on_where_asked_for(monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    assert unproven_kernels()
    assert encoders_called(monkeypatch) == ["encode_with_tensor_cores"]
