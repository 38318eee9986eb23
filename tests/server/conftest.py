"""One model and its tokenizer, engines over it, and requests from the demo document."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))

import torch

from tqai import demo
from tqai.server.engine.engine import Engine
from tqai.server.engine.settings import EngineSettings


@pytest.fixture(scope="session")
def loaded() -> tuple[Any, Any]:
    return demo.load()


@pytest.fixture(scope="session")
def document_ids(loaded) -> list[int]:
    text = (demo.model_path().parent / "document.txt").read_text("utf-8")
    return loaded[1].encode(text[:30_000])[:8000]


@pytest.fixture(scope="session")
def make_engine(loaded) -> Callable[..., Any]:
    """`with make_engine(max_running=4) as engine:` an engine that runs, and leaks no page."""

    @contextmanager
    def make(**settings: Any) -> Iterator[Engine]:
        torch.set_num_threads(settings.pop("torch_threads", 1))
        pages = settings.pop("pages", None)
        settings.setdefault("max_running", 8)
        settings.setdefault("max_kv_bytes", 256 << 20)
        engine = Engine(*loaded, EngineSettings(**settings))
        if pages is not None:
            settings["max_kv_bytes"] = pages * engine.store.pool.page_bytes
            engine = Engine(*loaded, EngineSettings(**settings))
        engine.start()
        try:
            yield engine
            assert engine.wait_idle(120)
            assert_no_leak(engine)
        finally:
            engine.stop()
            torch.set_num_threads(1)

    return make


def assert_no_leak(engine: Engine) -> None:
    """Every page is free or held by the prefix cache, and that gives all of them back."""
    prefixes = engine.scheduler.prefixes
    assert engine.store.pool.used == prefixes.pages
    for number, pool in enumerate(engine.store.pools):
        assert pool.used == len(prefixes._holds[number]) == prefixes.evictable(number)
    prefixes.clear()
    for pool in engine.store.pools:
        assert pool.free == pool.pages and not any(pool.references)


@pytest.fixture(scope="module")
def served(make_engine) -> Iterator[Any]:
    from serving import serving

    with make_engine(max_running=8) as engine, serving(engine) as running:
        yield running


@pytest.fixture(scope="module")
def client(served) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0, timeout=120) as found:
        yield found
