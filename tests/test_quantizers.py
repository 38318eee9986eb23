"""tqai.quantizers: published distortions, no bias, numpy and torch alike."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import tqai
from tqai.core import bfloat16
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.packing import packed_bytes, unpack
from tqai.errors import ConfigError, InputError
from tqai.quantizers import (
    MSEQuantized,
    PolarQuantized,
    PolarQuantizer,
    ProdQuantized,
    TurboQuantIP,
    TurboQuantMSE,
    TurboQuantProd,
    frames,
)

# Expected squared error per unit vector at dim 128, and its relative tolerance with 10 000 vectors.
MSE_128 = {1: 0.3606, 2: 0.1153, 3: 0.0336, 4: 0.00915}
MSE_TOLERANCE = 0.01
# Expected dim * (squared error of inner products of unit vectors) at dim 128: pi/2 of the squared error
# with one bit less, minus 1/dim of it. The paper's figure for 4 bits, 0.047, is pi/2 times its rounded 0.03.
PROD_128 = {1: 1.559, 2: 0.5635, 3: 0.1802, 4: 0.0525}
PROD_TOLERANCE = 0.03
FLOATS = [np.float16, np.float32, np.float64]
TORCH_FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
QUANTIZERS = [TurboQuantMSE, TurboQuantProd, PolarQuantizer]


def unit_vectors(count, dim, seed=0):
    out = np.random.default_rng(seed).standard_normal((count, dim))
    return out / np.linalg.norm(out, axis=-1, keepdims=True)


def round_trip(quantizer, vectors):
    quantized = quantizer.quantize(vectors)
    if isinstance(quantizer, TurboQuantProd):
        return quantizer.dequantize(quantized)
    return quantizer.dequantize(*quantized)


@pytest.mark.parametrize("bits", MSE_128)
def test_mse_distortion(bits):
    vectors = unit_vectors(10_000, 128)
    for quantizer in (TurboQuantMSE(128, bits), PolarQuantizer(128, bits)):
        error = ((round_trip(quantizer, vectors) - vectors) ** 2).sum(-1).mean()
        assert error == pytest.approx(MSE_128[bits], rel=MSE_TOLERANCE)


@pytest.mark.parametrize("bits", PROD_128)
def test_inner_product_distortion(bits):
    squares = []
    for seed in range(40):
        x, y = unit_vectors(400, 128, seed), unit_vectors(400, 128, 1000 + seed)
        quantizer = TurboQuantProd(128, bits, seed=seed)
        squares.append((quantizer.inner_product(y, quantizer.quantize(x)) - (x * y).sum(-1)) ** 2)
    assert 128 * np.mean(squares) == pytest.approx(PROD_128[bits], rel=PROD_TOLERANCE)


@pytest.mark.parametrize("sketch", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [16, 24])
def test_inner_products_are_unbiased_over_seeds(bits, dim, sketch):
    """Against y = x itself, where the MSE quantizer alone is far from unbiased, and against another y."""
    x, other = unit_vectors(2, dim)
    y = np.stack([x, other, x + other])
    seeds = 500
    estimates = np.empty((seeds, 3))
    for seed in range(seeds):
        quantizer = TurboQuantProd(dim, bits, seed=seed, sketch=sketch)
        estimates[seed] = quantizer.inner_product(y, quantizer.quantize(x))
    z = (estimates.mean(0) - y @ x) / (estimates.std(0, ddof=1) / math.sqrt(seeds))
    assert (np.abs(z) < 4).all(), z


def test_the_mse_quantizer_alone_is_biased():
    """What the sketch is for: the test above would notice its absence."""
    x = unit_vectors(1, 24)[0]
    estimates = np.array([round_trip(TurboQuantMSE(24, 2, seed=seed), x) @ x for seed in range(200)])
    assert (estimates.mean() - 1) / (estimates.std() / math.sqrt(200)) < -20


def test_orthogonal_sketch_has_less_distortion():
    squares = []
    for seed in range(20):
        x, y = unit_vectors(400, 128, seed), unit_vectors(400, 128, 1000 + seed)
        quantizer = TurboQuantProd(128, 3, seed=seed, sketch="orthogonal")
        squares.append((quantizer.inner_product(y, quantizer.quantize(x)) - (x * y).sum(-1)) ** 2)
    assert 128 * np.mean(squares) == pytest.approx((math.pi / 2 - 1) * 0.1153, rel=0.05)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (0,), (2, 0, 4)])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_shapes_and_dtypes(kind, lead):
    dim, bits = 20, 3
    vectors = np.random.default_rng(0).standard_normal((*lead, dim)).astype(np.float32)
    if kind == "torch":
        vectors = torch.from_numpy(vectors)
    lib = np if kind == "numpy" else torch
    mse, prod, polar = (make(dim, bits) for make in QUANTIZERS)

    quantized = mse.quantize(vectors)
    assert isinstance(quantized, MSEQuantized)
    check(quantized.indices, (*lead, dim), lib.uint8)
    check(quantized.norms, lead, lib.float32)
    check(mse.dequantize(*quantized), (*lead, dim), lib.float32)

    quantized = prod.quantize(vectors)
    assert isinstance(quantized, ProdQuantized)
    check(quantized.codes, (*lead, packed_bytes(dim, bits - 1)), lib.uint8)
    check(quantized.signs, (*lead, packed_bytes(dim, 1)), lib.uint8)
    check(quantized.norms, lead, lib.float32)
    check(quantized.residual_norms, lead, lib.float32)
    check(prod.dequantize(quantized), (*lead, dim), lib.float32)
    check(prod.inner_product(vectors, quantized), lead, lib.float32)

    quantized = polar.quantize(vectors)
    assert isinstance(quantized, PolarQuantized)
    check(quantized.codes, (*lead, packed_bytes(dim, bits)), lib.uint8)
    check(quantized.scales, lead, np.uint16 if kind == "numpy" else torch.bfloat16)
    check(polar.dequantize(*quantized), (*lead, dim), lib.float32)


def check(array, shape, dtype):
    assert isinstance(array, torch.Tensor if isinstance(dtype, torch.dtype) else np.ndarray)
    assert tuple(array.shape) == shape
    assert array.dtype == dtype


@pytest.mark.parametrize("dtype", TORCH_FLOATS, ids=str)
@pytest.mark.parametrize("bits", [1, 4])
def test_torch_gives_what_numpy_gives(dtype, bits):
    tensor = torch.randn(5, 3, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor = tensor.transpose(0, 1).requires_grad_()
    array = tensor.detach().to(torch.float64).numpy()
    double = dtype == torch.float64
    array = array if double else array.astype(np.float32)
    for make in QUANTIZERS:
        ours, theirs = make(80, bits).quantize(tensor), make(80, bits).quantize(array)
        for part, want in zip(ours, theirs, strict=True):
            got = part.view(torch.int16) if part.dtype == torch.bfloat16 else part
            np.testing.assert_array_equal(got.numpy(), want.view(np.int16) if got is not part else want)
            assert not part.requires_grad
        back, want = round_trip(make(80, bits), tensor), round_trip(make(80, bits), array)
        assert back.dtype == (torch.float64 if double and make is not PolarQuantizer else torch.float32)
        np.testing.assert_array_equal(back.numpy(), want)
    prod = TurboQuantProd(80, bits)
    dots = prod.inner_product(tensor, prod.quantize(tensor))
    np.testing.assert_array_equal(dots.numpy(), prod.inner_product(array, prod.quantize(array)))


def test_inner_product_broadcasts():
    prod = TurboQuantProd(32, 3)
    keys, queries = unit_vectors(7, 32), unit_vectors(4, 32, 1)
    quantized = prod.quantize(keys)
    dots = prod.inner_product(queries[:, None], quantized)
    np.testing.assert_allclose(dots, queries @ prod.dequantize(quantized).T, rtol=0, atol=1e-12)


def test_inner_product_estimates_itself():
    """Not only on average: at 8 bits each is close, so a factor or a swapped seed cannot hide."""
    prod = TurboQuantProd(256, 8)
    keys, queries = 5 * unit_vectors(50, 256), unit_vectors(50, 256, 1)
    errors = prod.inner_product(queries, prod.quantize(keys)) - (keys * queries).sum(-1)
    assert np.abs(errors).max() < 5 * 5 * math.sqrt(math.pi / 2 * 1.62e-4 / 256)


@pytest.mark.parametrize("make", QUANTIZERS)
def test_many_rows_are_worked_in_blocks(make, monkeypatch):
    vectors = np.random.default_rng(0).standard_normal((5, 13, 24))
    want = make(24, 3).quantize(vectors)
    # 7 rows at a time: the last block is short.
    monkeypatch.setattr(frames, "BLOCK_VALUES", 7 * 24 + 5)
    assert [len(block) for block in frames.Frame(vectors, 24).blocks()] == [7] * 9 + [2]
    for got, expected in zip(make(24, 3).quantize(vectors), want, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [1, 3])
def test_special_vectors(dtype, bits):
    base = unit_vectors(1, 64)[0]
    vectors = np.zeros((5, 64), dtype)
    vectors[1:] = base
    vectors[2, 7], vectors[3, 0] = np.nan, np.inf
    largest = min(float(np.finfo(dtype).max), 1e300)
    vectors[4] *= 0.99 * largest / np.abs(base).max()
    for make in QUANTIZERS:
        with np.errstate(over="raise", invalid="raise"):
            back = round_trip(make(64, bits), vectors)
        assert (back[0] == 0).all()
        assert np.isnan(back[2:4]).all()
        assert np.isfinite(back[4]).all()
        np.testing.assert_array_equal(back[1], round_trip(make(64, bits), vectors[:2])[1])


def test_indices_are_those_of_the_definition():
    quantizer = TurboQuantMSE(40, 3, seed=11)
    vectors = np.random.default_rng(0).standard_normal((63, 40)) * 50
    indices, norms = quantizer.quantize(vectors)
    rotated = vectors @ quantizer.codec.rotation_matrix.T
    unit = rotated / np.linalg.norm(rotated, axis=-1, keepdims=True)
    boundaries = quantizer.codec.tables()["boundaries"].astype(float)
    np.testing.assert_array_equal(indices, (unit[..., None] >= boundaries).sum(-1))
    paper = TurboQuantMSE(40, 3, seed=11, scale="norm")
    np.testing.assert_allclose(paper.quantize(vectors).norms, np.linalg.norm(vectors, axis=-1), rtol=1e-13)
    assert not np.allclose(norms, np.linalg.norm(vectors, axis=-1), rtol=1e-3)


def test_seed_and_rotation_matter():
    vectors = unit_vectors(3, 64)
    base = TurboQuantMSE(64, 4).quantize(vectors).indices
    for other in (TurboQuantMSE(64, 4, seed=1), TurboQuantMSE(64, 4, rotation="haar")):
        assert (other.quantize(vectors).indices != base).any()


def test_one_bit_prod_is_the_sketch_alone():
    prod = TurboQuantProd(24, 1, seed=5)
    vectors = 3 * unit_vectors(6, 24)
    quantized = prod.quantize(vectors)
    assert quantized.codes.shape == (6, 0)
    assert (quantized.norms == 0).all()
    np.testing.assert_allclose(quantized.residual_norms, 3, rtol=1e-14)
    np.testing.assert_array_equal(unpack(quantized.signs, 1, 24), vectors @ prod.sketch.matrix.T >= 0)


def test_polar_is_the_codec_of_the_cache():
    codec = make_codec(CodecSpec("scalar", 96, 4, seed=3))
    polar = PolarQuantizer(96, 4, seed=3)
    vectors = np.random.default_rng(0).standard_normal((65, 96)).astype(np.float32)
    encoded, quantized = codec.encode(vectors), polar.quantize(torch.from_numpy(vectors))
    assert polar.codec is codec
    assert polar.bits_per_value == codec.bits_per_value == 4 + 16 / 96
    np.testing.assert_array_equal(quantized.codes.numpy(), encoded.codes)
    np.testing.assert_array_equal(quantized.scales.float().numpy(), bfloat16.from_bits(encoded.scales))
    np.testing.assert_array_equal(polar.dequantize(*quantized).numpy(), codec.decode(encoded))
    np.testing.assert_array_equal(polar.dequantize(*polar.quantize(vectors)), codec.decode(encoded))


@pytest.mark.parametrize("make", QUANTIZERS)
@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (np.zeros((4, 63)), r"shape \[4, 63\]: \[\.\.\., 64\]"),
        (np.zeros(()), r"shape \[\]: \[\.\.\., 64\]"),
        (np.zeros((4, 64), np.int64), "dtype int64: a float dtype"),
        (torch.zeros(64, 4), r"shape \[64, 4\]: \[\.\.\., 64\]"),
        (torch.zeros(4, 64, dtype=torch.uint8), r"dtype torch\.uint8: a float dtype"),
        (torch.zeros(4, 64, dtype=torch.complex64), r"dtype torch\.complex64"),
        ([["a"] * 64], "a float dtype is wanted"),
    ],
)
def test_quantize_refuses(make, vectors, words):
    with pytest.raises(InputError, match=words):
        make(64, 3).quantize(vectors)


def test_dequantize_refuses_parts_that_do_not_belong_together():
    vectors = unit_vectors(5, 64)
    mse, prod, polar = (make(64, 3) for make in QUANTIZERS)
    indices, norms = mse.quantize(vectors)
    for bad, words in [
        ((indices[:4], norms), r"indices have shape \[4, 64\]: \[5, 64\]"),
        ((indices[:, :60], norms), r"\[5, 60\]: \[5, 64\]"),
        ((indices + 8, norms), "index"),
        ((norms, norms), "indices have dtype float64"),
        ((indices, indices[:, 0]), "dtype uint8: a float dtype"),
    ]:
        with pytest.raises(InputError, match=words):
            mse.dequantize(*bad)
    parts = prod.quantize(vectors)
    for bad, words in [
        (parts._replace(codes=parts.codes[:, 1:]), r"codes have shape \[5, 15\]: \[5, 16\]"),
        (parts._replace(signs=parts.signs[1:]), r"signs have shape \[4, 8\]: \[5, 8\]"),
        (parts._replace(residual_norms=parts.norms[1:]), r"residual_norms \[4\]"),
    ]:
        with pytest.raises(InputError, match=words):
            prod.dequantize(bad)
    with pytest.raises(InputError, match=r"shape \[5, 63\]"):
        prod.inner_product(vectors[:, 1:], parts)
    codes, scales = polar.quantize(vectors)
    for bad, words in [
        ((codes[:, 1:], scales), r"codes have shape \[5, 23\]: \[5, 24\]"),
        ((codes, scales.astype(np.float32)), "scales have dtype float32: uint16"),
        ((torch.from_numpy(codes), torch.ones(5)), r"torch\.float32: torch\.bfloat16"),
    ]:
        with pytest.raises(InputError, match=words):
            polar.dequantize(*bad)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 2.0}, r"bits=2\.0"),
        ({"dim": 0}, "head_dim=0"),
        ({"seed": -1}, "seed=-1"),
        ({"rotation": "hadamard", "dim": 80}, "head_dim=80"),
        ({"scale": "max"}, "scale='max'"),
    ],
)
def test_bad_arguments(arguments, words):
    for make in QUANTIZERS:
        with pytest.raises(ConfigError, match=words):
            make(**{"dim": 64, "bits": 2, **arguments})
    with pytest.raises(ConfigError, match="sketch='none'"):
        TurboQuantProd(64, 2, sketch="none")


def test_public_names():
    assert TurboQuantIP is TurboQuantProd
    for name in ("TurboQuantMSE", "TurboQuantProd", "TurboQuantIP", "PolarQuantizer"):
        assert getattr(tqai, name) is getattr(tqai.quantizers, name)


def test_numpy_users_never_load_torch():
    code = (
        "import sys, numpy as np; from tqai.quantizers import *; q = TurboQuantMSE(64, 3); "
        "q.dequantize(*q.quantize(np.ones((2, 64)))); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("make", QUANTIZERS)
def test_results_stay_on_the_device(make):
    quantized = make(64, 3).quantize(torch.randn(5, 64, device="cuda", dtype=torch.bfloat16))
    assert all(part.is_cuda for part in quantized)
    back = make(64, 3).dequantize(quantized) if make is TurboQuantProd else make(64, 3).dequantize(*quantized)
    assert back.is_cuda
