"""Fixtures of the transformers integration: tiny models (built once), the oracle, and clean models after."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import build

import tqai
from tqai import backends


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a test names a backend, it runs on the one that every machine has."""
    monkeypatch.setattr(backends, "BACKENDS", {"torch": backends.BACKENDS["torch"]})


_built = lru_cache(maxsize=None)(build)


@pytest.fixture
def tiny() -> Iterator[Callable[[str], Any]]:
    """`tiny(name)`: the tiny model of that name, unpatched; whatever a test does to its attention or
    its `generate` is undone after it."""
    used: dict[str, tuple[Any, str]] = {}

    def get(name: str) -> Any:
        model = _built(name)
        used.setdefault(name, (model, model.config._attn_implementation))
        return model

    yield get
    for model, attention in used.values():
        tqai.unpatch(model)
        assert model.config._attn_implementation == attention
        assert "generate" not in vars(model)
