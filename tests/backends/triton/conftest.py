"""The Triton backend: on the GPU where there is one, else by Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch


def _taken_out(names):
    """Modules of these packages, removed from the import system, but for the compiled one."""
    found = [m for m in sys.modules if any(m == name or m.startswith(name + ".") for name in names)]
    found = [m for m in found if not m.startswith("triton._C")]
    return {m: sys.modules.pop(m) for m in found}


def _let_numpy_index():
    """Triton 3.6 turns arrays of one element into loop bounds by int(), which numpy 2.4 no longer does."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


@pytest.fixture(scope="module")
def triton_backend():
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        yield importlib.import_module("tqai.backends.triton").TritonBackend()
        return
    # Triton decides on import whether its kernels are interpreted: a second copy is imported for these tests.
    packages = ("triton", "tqai.backends.triton")
    before = _taken_out(packages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        _let_numpy_index()
        yield importlib.import_module("tqai.backends.triton").TritonBackend()
    _taken_out(packages)
    sys.modules.update(before)
