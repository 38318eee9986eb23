"""Who encodes trellis codes: the kernel, unless it is worse than torch's operations."""

from __future__ import annotations

import pytest
import torch

from tqai.backends.cuda import trellis_codes
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat

VECTORS = torch.zeros(1, 1, 64, 128, dtype=torch.bfloat16)


@pytest.fixture
def called(monkeypatch):
    """Names of the encoders that were called; none of them runs."""
    names = []
    for name in ("_encode_by_kernel", "_encode_by_torch"):
        monkeypatch.setattr(trellis_codes, name, lambda *_, name=name: names.append(name))
    monkeypatch.setattr(trellis_codes, "_GOOD", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return names


def encode():
    codec = make_codec(CodecSpec("trellis", 128, 3))
    trellis_codes.encode_trellis_pages(VECTORS, VECTORS, PageFormat(codec, codec), VECTORS)


@pytest.mark.parametrize("good", [True, False])
def test_the_kernel_is_asked_once_whether_it_is_good(called, monkeypatch, good):
    asked = []
    monkeypatch.setattr(trellis_codes, "_is_as_good", lambda *_: asked.append(1) or good)
    encode()
    encode()
    assert called == ["_encode_by_kernel" if good else "_encode_by_torch"] * 2
    assert len(asked) == 1


def test_while_a_stream_is_captured_nothing_is_compared(called, monkeypatch):
    monkeypatch.setattr(trellis_codes, "_is_as_good", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    encode()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    encode()
    assert called == ["_encode_by_torch", "_encode_by_kernel"]
