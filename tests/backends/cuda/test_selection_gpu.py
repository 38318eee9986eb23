"""Which backend serves a real GPU, and with what reason."""

from __future__ import annotations

import json

import pytest
import torch
from tests.backends.cuda.conftest import formats
from typer.testing import CliRunner

from tqai.backends import resolve
from tqai.backends.cuda import compile as compiling
from tqai.backends.cuda.backend import _build_failure
from tqai.cli.app import app
from tqai.errors import BackendError

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rotation", ["haar", "hadamard", "hadamard2", "identity"])
def test_a_gpu_is_served_by_its_own_kernels(cuda_backend, dtype, rotation):
    choice = resolve(formats(4, 2, 128, rotation=rotation), "cuda", dtype)
    assert choice.backend.name == "cuda"
    assert choice.reason == "best that serves this"


def test_what_the_kernels_refuse_goes_to_torch_with_the_reason(cuda_backend):
    for page_format, dtype, why in (
        (formats(4, 2, 128), "float32", "float32 queries"),
        (formats(5, 2, 128), "bfloat16", "keys of 5 bits"),
        (formats(4, 2, 512), "bfloat16", "head_dim 512"),
    ):
        choice = resolve(page_format, "cuda", dtype)
        assert choice.backend.name == "torch"
        assert f"cuda: {why}" in choice.reason


def test_info_names_the_gpu_and_the_backend(cuda_backend):
    result = CliRunner().invoke(app, ["info", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["devices"][0]["name"] == torch.cuda.get_device_name(0)
    assert facts["backends"]["cuda"]["cuda"] is None
    assert facts["backends"]["native"]["cuda"] is not None


def test_a_compiler_that_fails_is_said_once_and_torch_serves(cuda_backend, monkeypatch, tmp_path, caplog):
    def broken(*_):
        raise BackendError("attend_split.cu does not compile for sm_00: as the test wants it")

    page_format = formats(4, 3, 176)  # of no other test, so that nothing of it is built yet
    monkeypatch.setenv("TQAI_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "_compile", broken)
    with caplog.at_level("WARNING", logger="tqai"):
        for _ in range(3):
            choice = resolve(page_format, "cuda", "bfloat16")
            assert choice.backend.name == "torch"
            assert "as the test wants it" in choice.reason
    assert sum("cannot be used" in record.message for record in caplog.records) == 1
    _build_failure.cache_clear()
