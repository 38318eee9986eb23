"""The Python of README.md runs, on the embedded model, and prints what it promises."""

import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.S)


@pytest.fixture(scope="module")
def names() -> dict:
    """What the blocks take from each other and from the reader."""
    import tqai.demo

    text = tqai.demo.retrieval.document()[:900]
    code = BLOCKS[0].replace('tokenizer("..."', "tokenizer(text")
    found = {"name": str(tqai.demo.model_path()), "text": text, "vectors": np.eye(5, 768)}
    exec(code, found)
    return found


def test_patching_block_compresses_and_restores(names):
    memory = names["cache"].memory()
    assert memory.codes_bytes > 0
    assert memory.compression_factor > 1.5
    assert names["model"].config._attn_implementation == "sdpa"


def test_unpatched_block(names):
    block = next(block for block in BLOCKS if "TurboQuantCache" in block)
    exec(block, names)
    assert names["cache"].memory().codes_bytes > 0


def test_vectors_block(names):
    block = next(block for block in BLOCKS if "TurboQuantMSE" in block)
    exec(block, names)
    error = np.square(np.asarray(names["approximation"]) - names["vectors"]).sum(-1)
    assert np.all(error < 0.1)


def test_every_block_is_tested():
    assert len(BLOCKS) == 3
