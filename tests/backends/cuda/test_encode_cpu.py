"""The encoding kernels with tensor cores, compiled for the CPU with stand-ins for a GPU's instructions."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.backends.cuda.conftest import formats

from tqai.backends.cuda.compile import source
from tqai.backends.cuda.driver import SPECIFIC, architecture
from tqai.backends.cuda.encode import tensor_form
from tqai.backends.cuda.encode_plan import (
    FORMS,
    WARPS,
    encode_words,
    has_tensor_encoding,
    level_cells,
    tables_bytes,
)
from tqai.backends.cuda.layout import plain_pages
from tqai.backends.cuda.plan import codec_macros
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.packing import unpack

RUN = """
static EncodeParams params;
static void keys_lane() { tqai_encode_keys(params); ended[current] = true; }
static void values_lane() { tqai_encode_values(params); ended[current] = true; }
extern "C" void run(const EncodeParams* given, int values, int blocks) {
    params = *given;
    gridDim = {blocks, 1};
    for (int b = 0; b < blocks; ++b) {
        blockIdx = {b, 0};
        run_block(values ? values_lane : keys_lane);
    }
}
extern "C" int shared_bytes(int values) {
    return 4 * (values ? Sizes<DV>::TABLE + ENCODE_WARPS * Sizes<DV>::WARP
                       : Sizes<DK>::TABLE + ENCODE_WARPS * Sizes<DK>::WARP);
}
"""


class Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("pages", "source", "table")),
        ("strides", ctypes.c_int64 * 3),
        *((name, ctypes.c_float) for name in ("per_unit", "boundary", "inner", "outer")),
        *((name, ctypes.c_int32) for name in ("heads", "units", "least_squares")),
    ]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Form, page format and dtype to the compiled kernels."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("encode")
    header = (Path(__file__).parent / "encode_on_cpu.h").read_text()

    def text_of(form):
        text = source(f"encode_{form}.cu")
        for replaced in ("device.cuh", "encode_instructions.cuh", "encode_wgmma_instructions.cuh"):
            text = text.replace(source(replaced), "")
        text = re.sub(r"extern __shared__ .* u32 table\[\];", "u32* table = (u32*)shared_memory;", text)
        return text.replace(source("quantize.cuh").split("// 16 neighbouring elements")[1], "\n")

    def build(form, page_format, dtype):
        macros = [f"-D{name}={value}" for name, value in codec_macros(page_format, dtype).items()]
        macros.append(f"-DTHREADS={32 * WARPS[form]}")
        path = folder / (form + "".join(macros) + ".so")
        if not path.exists():
            file = folder / "kernel.cpp"
            file.write_text(header + text_of(form) + RUN)
            command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *macros, "-o", path, file]
            subprocess.run(command, check=True)
        return ctypes.CDLL(str(path))

    return build


def encoded(compiled, form, page_format, sides, blocks=1):
    """Canonical pages of `[pages, heads, 64, dim]` vectors, by the kernel."""
    dtype = {torch.bfloat16: "bfloat16", torch.float16: "float16"}[sides[0].dtype]
    library = compiled(form, page_format, dtype)
    pages, heads = sides[0].shape[:2]
    out = np.full((pages, heads, page_format.page_bytes), 0xEE, dtype=np.uint8)
    for values, (codec, side) in enumerate(zip((page_format.key, page_format.value), sides, strict=True)):
        words = np.ascontiguousarray(encode_words(codec, dtype, bool(values), form))
        assert library.shared_bytes(values) == tables_bytes(codec.spec.head_dim, form)
        arrays = codec.tables()
        half = len(arrays["centroids"]) // 2
        params = Params(out.ctypes.data, side.data_ptr(), words.ctypes.data)
        params.strides[:] = side.stride()[:3]
        params.per_unit, params.boundary = level_cells(codec)[2], arrays["boundaries"][half]
        params.inner, params.outer = arrays["centroids"][half : half + 2]
        params.heads, params.units = heads, pages * heads
        params.least_squares = codec.spec.scale == "least_squares"
        library.run(ctypes.byref(params), values, blocks)
    return plain_pages(out, page_format)


def check(page_format, got, sides):
    for codec, mine, vectors in zip((page_format.key, page_format.value), got, sides, strict=True):
        wanted = codec.encode(vectors.float().numpy())
        codes, right = (
            unpack(e.codes, codec.spec.bits, codec.spec.head_dim).astype(int) for e in (mine, wanted)
        )
        apart = codes != right
        assert np.abs(codes - right).max() <= 1
        rotated = vectors.double().nan_to_num(0, 0, 0).numpy()
        rotated = (
            rotated / np.maximum(np.abs(rotated).max(-1, keepdims=True), 1e-300) @ codec.rotation_matrix.T
        )
        unit = rotated / np.maximum(np.linalg.norm(rotated, axis=-1, keepdims=True), 1e-300)
        boundary = codec.tables()["boundaries"][np.minimum(codes, right)[apart]]
        assert (np.abs(unit[apart] - boundary) < 5e-7).all() and apart.sum() < 10
        whole = ~apart.any(-1)
        np.testing.assert_array_equal(mine.scales[whole] == 0x7FC0, wanted.scales[whole] == 0x7FC0)
        steps = np.abs(mine.scales[whole].astype(int) - wanted.scales[whole].astype(int))
        assert steps.max() <= 1 and (steps > 0).mean() < 5e-3


def draw(*shape, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize(
    ("form", "dim", "bits_k", "bits_v", "dtype"),
    [
        ("mma", 128, 4, 2, torch.bfloat16),
        ("mma", 128, 3, 4, torch.float16),
        ("mma", 64, 2, 3, torch.bfloat16),
        ("wgmma", 128, 4, 2, torch.bfloat16),
        ("wgmma", 128, 2, 3, torch.float16),
        ("wgmma", 64, 3, 4, torch.bfloat16),
    ],
)
def test_codes_are_those_of_core(compiled, form, dim, bits_k, bits_v, dtype):
    page_format = formats(bits_k, bits_v, dim)
    sides = draw(3, 2, 64, dim, dtype=dtype)
    for side in sides:
        side[0, 1, 0] = 0
        side[0, 1, 9] *= 1e-30 if dtype == torch.bfloat16 else 1e-3
        side[0, 1, 2] *= 1e30 if dtype == torch.bfloat16 else 1e3
        side[0, 1, 3, 5] = torch.nan
        side[0, 1, 60, 7] = -torch.inf
        if dtype == torch.bfloat16:
            side[1, 0, 5] = 1e-39
            side[1, 0, 6] = 3e38
    check(page_format, encoded(compiled, form, page_format, sides), sides)


@pytest.mark.parametrize("form", FORMS)
def test_norm_scale_and_strides(compiled, form):
    page_format = formats(4, 2, 64, scale="norm")
    sides = [side.transpose(1, 2).contiguous().transpose(1, 2) for side in draw(3, 3, 64, 64)]
    check(page_format, encoded(compiled, form, page_format, sides, blocks=2), sides)


def test_which_formats_are_served():
    assert has_tensor_encoding(formats(4, 2, 128), "bfloat16")
    assert not has_tensor_encoding(formats(4, 2, 128), "float32")
    for bits_k, bits_v, dim, rotation in (
        (8, 4, 128, "auto"),
        (4, 1, 128, "auto"),
        (4, 4, 256, "auto"),
        (4, 4, 96, "auto"),
        (4, 4, 128, "hadamard"),
        (4, 4, 128, "haar"),
    ):
        assert not has_tensor_encoding(formats(bits_k, bits_v, dim, rotation=rotation), "bfloat16")


@pytest.mark.parametrize(("capability", "form"), [((8, 0), "mma"), ((9, 0), "wgmma"), ((10, 0), "mma")])
def test_products_of_four_warps_are_of_sm_90_alone(monkeypatch, capability, form):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    assert tensor_form(device) == form
    specific = f"encode_{form}.cu" in SPECIFIC
    assert architecture(device, specific) == {"mma": f"sm_{capability[0]}0", "wgmma": "sm_90a"}[form]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_buckets_find_every_level(dim, bits):
    codec = make_codec(CodecSpec("scalar", dim, bits))
    boundaries = codec.tables()["boundaries"]
    cells, levels, per_unit = level_cells(codec)
    close = [boundaries - 2e-7, boundaries + 2e-7]
    t = np.concatenate([np.linspace(-1.001, 1.001, 9999), *close]).astype(np.float32)
    place = (t.astype(np.float64) * per_unit + 0.5).clip(0.0, 1.0).astype(np.float32)
    bucket = np.floor(place * np.float32(32)).astype(int)
    found = levels[bucket + (place >= cells[bucket])]
    right = np.searchsorted(boundaries, t, side="right")
    near = np.abs(t[:, None] - boundaries).min(-1) < 1e-7
    stored = right ^ (right << 1 & 8) ^ 8 if bits == 4 else right
    np.testing.assert_array_equal((found & 15)[~near], stored[~near])
    level = codec.tables()["centroids"][right]
    np.testing.assert_allclose((found & ~np.uint32(15)).view(np.float32)[~near], level[~near], rtol=2e-6)
