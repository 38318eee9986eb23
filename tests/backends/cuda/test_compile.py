"""Sources, the cache of compiled kernels, and that the sources compile where there is a compiler."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import pytest

from tqai.backends.cuda import compile as compiling
from tqai.backends.cuda.params import CHANGING, Sizes
from tqai.backends.cuda.plan import codec_macros
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat
from tqai.errors import BackendError


def test_source_needs_no_include_path():
    for name in ("attend_split.cu", "attend_line.cu", "encode.cu", "decode.cu"):
        text = compiling.source(name)
        assert "#include" not in text
        assert "prmt.b32" in text or name in ("encode.cu", "decode.cu")


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("TQAI_CACHE_DIR", raising=False)
    assert compiling.cache_directory() == tmp_path / "xdg" / "tqai" / "kernels"
    monkeypatch.setenv("TQAI_CACHE_DIR", str(tmp_path / "own"))
    assert compiling.cache_directory() == tmp_path / "own" / "kernels"


def test_cubins_are_kept_by_all_that_matters(monkeypatch, tmp_path):
    monkeypatch.setenv("TQAI_CACHE_DIR", str(tmp_path))
    compiled = []

    def compile_once(text, name, macros, arch):
        compiled.append((dict(macros), arch))
        return f"{sorted(macros.items())} {arch}".encode()

    monkeypatch.setattr(compiling, "_compile", compile_once)
    first = compiling.cubin("encode.cu", {"DK": 128}, "sm_90")
    assert compiling.cubin("encode.cu", {"DK": 128}, "sm_90") == first
    assert len(compiled) == 1
    compiling.cubin("encode.cu", {"DK": 64}, "sm_90")
    compiling.cubin("encode.cu", {"DK": 128}, "sm_80")
    compiling.cubin("attend_split.cu", {"DK": 128}, "sm_90")
    assert len(compiled) == 4
    assert len(list((tmp_path / "kernels").glob("*.cubin"))) == 4
    assert not list((tmp_path / "kernels").glob("*.part"))
    monkeypatch.setattr(compiling, "_compiler_version", lambda: ("another",))
    compiling.cubin("encode.cu", {"DK": 128}, "sm_90")
    assert len(compiled) == 5


def test_a_cache_that_cannot_be_written_only_warns(monkeypatch, tmp_path, caplog):
    (tmp_path / "kernels").write_text("in the way")
    monkeypatch.setenv("TQAI_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiling, "_compile", lambda *_: b"code")
    with caplog.at_level("WARNING", logger="tqai"):
        assert compiling.cubin("encode.cu", {}, "sm_90") == b"code"
    assert "cannot be kept" in caplog.text


def test_without_cuda_core_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("TQAI_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "cuda", None)
    with pytest.raises(BackendError, match=r"tqai\[cuda\]"):
        compiling.cubin("encode.cu", {}, "sm_90")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
@pytest.mark.parametrize(
    ("arch", "dim", "bits_k", "bits_v", "masked"), [("sm_80", 80, 3, 4, 1), ("sm_90", 128, 4, 2, 0)]
)
def test_sources_compile(tmp_path, arch, dim, bits_k, bits_v, masked):
    page_format = PageFormat(
        make_codec(CodecSpec("scalar", dim, bits_k)), make_codec(CodecSpec("scalar", dim, bits_v))
    )
    macros = codec_macros(page_format, "bfloat16")
    attention = {**macros, "WARPS": 4, "STAGES": 2, "SOFTCAP": masked, "MASKED": masked, "OUT": 1}
    split = ("attend_split.cu", {**attention, "CLUSTER": 1 - masked})
    other = [("attend_line.cu", attention)] if masked else [("encode.cu", macros), ("decode.cu", macros)]
    for name, given in (split, *other):
        file = tmp_path / name
        text = compiling.source(name)
        if "struct Params {" in text:
            # what the host packs is what the kernel reads
            size = CHANGING.size + ctypes.sizeof(Sizes)
            text += f'static_assert(sizeof(Params) == {size}, "size");\n'
            text += f'static_assert(__builtin_offsetof(Params, pages) == {CHANGING.size}, "sizes");\n'
            text += f'static_assert(__builtin_offsetof(Params, times256) == {size - 8}, "the last");\n'
        file.write_text(text)
        command = [
            "nvcc",
            "-std=c++17",
            f"-arch={arch}",
            "-cubin",
            "-o",
            str(tmp_path / "out.cubin"),
            str(file),
        ]
        done = subprocess.run(
            [*command, *compiling.options(given)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
