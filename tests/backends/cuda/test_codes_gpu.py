"""Encoding and decoding kernels against core."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.backends.cuda.conftest import formats

from tqai.backends.cuda import codes
from tqai.backends.cuda.codes import encode_generally
from tqai.backends.cuda.encode import encode_with_tensor_cores, tensor_encoding_is_right, tensor_form
from tqai.backends.cuda.encode_plan import FORMS
from tqai.core.packing import unpack
from tqai.core.page import pages_from_bytes

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def special(vectors):
    """Zero, subnormal, tiny, huge, NaN and inf rows, one each."""
    wide = vectors.dtype != torch.float16
    vectors[0, 0, 0] = 0
    vectors[0, 0, 1] *= 1e-30 if wide else 1e-3
    vectors[0, 0, 2] *= 1e30 if wide else 1e3
    vectors[0, 0, 3, 5] = torch.nan
    vectors[0, 0, 4, 7] = -torch.inf
    if wide:
        vectors[0, 0, 5] = 1e-39
        vectors[0, 0, 6] = 3e38
    return vectors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits_k", "bits_v"), [(4, 2), (3, 8), (8, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_codes_are_those_of_core(cuda_backend, dim, bits_k, bits_v, dtype):
    page_format = formats(bits_k, bits_v, dim)
    generator = torch.Generator().manual_seed(0)
    sides = [special(torch.randn(3, 2, 64, dim, generator=generator).to(dtype)) for _ in range(2)]
    out = torch.full((3, 2, page_format.page_bytes), 0xFF, dtype=torch.uint8, device="cuda")
    cuda_backend.encode(*(side.cuda() for side in sides), page_format, out)
    got = cuda_backend.to_canonical(out, page_format)
    for codec, encoded, vectors in (
        (page_format.key, got.key, sides[0]),
        (page_format.value, got.value, sides[1]),
    ):
        wanted = codec.encode(vectors.float().numpy())
        mine = unpack(encoded.codes, codec.spec.bits, dim).astype(int)
        right = unpack(wanted.codes, codec.spec.bits, dim).astype(int)
        apart = mine != right
        # Only a coordinate within float32 rounding of a boundary may differ, and by one.
        assert np.abs(mine - right).max() <= 1
        rotated = vectors.double().nan_to_num(0, 0, 0).numpy()
        rotated = (
            rotated / np.maximum(np.abs(rotated).max(-1, keepdims=True), 1e-300) @ codec.rotation_matrix.T
        )
        unit = rotated / np.maximum(np.linalg.norm(rotated, axis=-1, keepdims=True), 1e-300)
        boundary = codec.tables()["boundaries"][np.minimum(mine, right)[apart]]
        assert (np.abs(unit[apart] - boundary) < 5e-7).all()
        assert apart.sum() < 20
        whole = ~apart.any(-1)
        np.testing.assert_array_equal(encoded.scales[whole] == 0x7FC0, wanted.scales[whole] == 0x7FC0)
        steps = np.abs(encoded.scales[whole].astype(int) - wanted.scales[whole].astype(int))
        assert steps.max() <= 1 and (steps > 0).sum() <= max(2, 2e-3 * steps.size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits_k", "bits_v"), [(4, 2), (3, 8), (8, 1), (2, 3), (1, 4)])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_decoding_is_that_of_core(cuda_backend, dim, bits_k, bits_v, dtype):
    page_format = formats(bits_k, bits_v, dim)
    rng = np.random.default_rng(0)
    canonical = pages_from_bytes(
        rng.integers(0, 256, (3, 2, page_format.page_bytes), dtype=np.uint8), page_format
    )
    for part in canonical:
        part.scales[...] = (
            rng.standard_normal(part.scales.shape).astype(np.float32).view(np.uint32) >> 16
        ) & 0x7FFF
        part.scales[0, 0, 0] = 0x7FC0
        part.scales[0, 0, 1] = 0
    raw = torch.from_numpy(cuda_backend.from_canonical(canonical, page_format)).cuda()
    got = cuda_backend.decode(raw, page_format, dtype)
    tolerance = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]
    for codec, mine, part in zip((page_format.key, page_format.value), got, canonical, strict=True):
        wanted = torch.from_numpy(codec.decode(part))
        size = wanted.nan_to_num(0).abs().amax(-1, keepdim=True)
        mine = mine.float().cpu()
        assert mine[0, 0, 0].isnan().all()
        apart = (mine - wanted).abs().nan_to_num(0) <= tolerance * size + 1e-7
        assert apart.all()


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("bits_k", "bits_v", "dim"), [(4, 2, 128), (3, 3, 128), (2, 4, 64)])
def test_tensor_cores_are_used_here(cuda_backend, bits_k, bits_v, dim, dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    assert tensor_encoding_is_right(formats(bits_k, bits_v, dim), dtype, device, encode_generally)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(
    ("bits_k", "bits_v", "dim"), [(4, 2, 128), (3, 3, 128), (2, 4, 64), (4, 3, 64), (2, 2, 128)]
)
@pytest.mark.parametrize(("pages", "heads"), [(301, 7), (1, 1)])
def test_tensor_cores_encode_alike(cuda_backend, pages, heads, bits_k, bits_v, dim, dtype, form):
    if form == "wgmma" and tensor_form(torch.device("cuda", torch.cuda.current_device())) != form:
        pytest.skip("instructions that this GPU does not have")
    page_format = formats(bits_k, bits_v, dim)
    generator = torch.Generator(device="cuda").manual_seed(0)
    sides = [
        torch.randn(pages, 64, heads, dim, device="cuda", generator=generator).to(dtype).transpose(1, 2)
        for _ in range(2)
    ]
    for side in sides:
        special(side)
    size = (pages + 1, heads, page_format.page_bytes)
    found, wanted = (torch.full(size, 0xFF, dtype=torch.uint8, device="cuda") for _ in range(2))
    encode_with_tensor_cores(*sides, page_format, found[:-1], form)
    encode_generally(*sides, page_format, wanted[:-1])
    # of coordinates at a boundary, a few in a million; of one page there may be one or two
    assert (found != wanted).sum().item() <= max(2, 1e-4 * found.numel())


@pytest.mark.parametrize("dim", [64, 128])
def test_general_kernel_encodes_alike(cuda_backend, monkeypatch, dim):
    monkeypatch.setattr(codes, "tensor_encoding_is_right", lambda *_: False)
    test_codes_are_those_of_core(cuda_backend, dim, 4, 2, torch.bfloat16)


def test_strided_and_unaligned_input(cuda_backend):
    page_format = formats(4, 2, 128)
    keys = torch.randn(3, 2, 64, 128, device="cuda").bfloat16()
    plain = torch.empty(3, 2, page_format.page_bytes, dtype=torch.uint8, device="cuda")
    cuda_backend.encode(keys, keys, page_format, plain)
    strided = keys.transpose(1, 2).contiguous().transpose(1, 2)
    unaligned = torch.empty(3, 2, 64, 129, dtype=keys.dtype, device="cuda")[..., 1:].copy_(keys)
    out = torch.full_like(plain, 0xFF)
    cuda_backend.encode(strided, unaligned, page_format, out)
    assert torch.equal(out, plain)
