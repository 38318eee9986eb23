"""Which backend serves is said: in the log, in the cache's report, in the error where none does."""

from __future__ import annotations

import logging

import pytest
import torch

from tqai.backends import load, resolve
from tqai.cache.layer import CompressedLayer
from tqai.cache.page_format import page_format_for
from tqai.config import CacheConfig
from tqai.errors import BackendError, UnsupportedError


@pytest.fixture(autouse=True)
def native_kernels():
    try:
        load("native")
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("bits", "dim", "backend", "why"),
    [
        ((4, 2), 64, "native", "best that serves this"),
        ((5, 2), 64, "torch", "native: 5 bits"),
        ((4, 4), 72, "torch", "native: head_dim 72"),
    ],
)
def test_the_choice_is_logged_and_reported(caplog, bits, dim, backend, why):
    config = CacheConfig(bits_k=bits[0], bits_v=bits[1])
    layer = CompressedLayer(config)
    with caplog.at_level(logging.DEBUG, logger="tqai"):
        layer.append(*(torch.randn(1, 1, 70, dim) for _ in "kv"))
    (line,) = (record for record in caplog.records if record.message.startswith("backend "))
    assert line.levelno == logging.DEBUG
    assert line.message.startswith(f"backend {backend} for cpu float32: best that serves this")
    assert why in line.message
    report = layer.memory()
    assert report.backend == backend
    assert why in report.backend_reason


def test_a_backend_that_was_asked_for_is_never_replaced_in_silence():
    page_format = page_format_for(CacheConfig(bits_k=5, bits_v=4), 64, 64)
    assert resolve(page_format, "cpu", "float32", "torch").reason == "asked for"
    with pytest.raises(UnsupportedError, match="native: 5 bits"):
        resolve(page_format, "cpu", "float32", "native")
