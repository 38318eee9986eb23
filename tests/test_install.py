"""An install without a C compiler: it succeeds, in a wheel for every Python, and says why it is slower."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core")

ROOT = Path(__file__).resolve().parents[1]
NO_COMPILER = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "-w", str(folder), str(ROOT)],
        env={**os.environ, **NO_COMPILER},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if "safetensors" not in name])
    return folder


def test_one_wheel_for_every_python(wheel):
    name, _, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("tqai", "py3", "none")
    assert platform != "any"


def test_what_could_not_be_built_is_noted(unpacked):
    native = unpacked / "tqai" / "backends" / "native"
    assert (native / "build_note.txt").read_text("utf-8") == "installed without a C compiler\n"
    assert not [path for path in native.iterdir() if path.suffix in (".so", ".dylib", ".dll")]


def test_it_works_and_says_why_the_kernels_are_off(unpacked):
    code = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Redirect" not in type(finder).__name__]
sys.path.insert(0, {str(unpacked)!r})
import tqai
assert tqai.__file__.startswith({str(unpacked)!r}), tqai.__file__
from pathlib import Path
from tqai.backends.native import library
library._folders = lambda: [Path(library.__file__).parent]  # not the editable install's, too
import torch
from tqai.cache.layer import CompressedLayer
layer = CompressedLayer(tqai.CacheConfig(bits_k=4, bits_v=4))
step = layer.append(torch.randn(1, 1, 70, 64), torch.randn(1, 1, 70, 64))
layer.attend(step, torch.randn(1, 1, 1, 64), None, 0.1)
print(layer.memory().backend, "|", layer.memory().backend_reason)
from tqai.cli.app import main
main(["info"])
"""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TQAI_NATIVE_LIB", "PYTHONPATH")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    memory, _, told = done.stdout.partition("\n")
    why = "native kernels are off: installed without a C compiler"
    assert memory.startswith("torch |") and f"native: {why}" in memory
    (line,) = (line for line in told.splitlines() if "backend native on cpu" in line)
    assert why in line
