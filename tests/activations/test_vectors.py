"""activations.vectors: any shape, padded rows, the error that theory gives, bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai.activations.vectors import block_size, pack_tensor, rounded

# sqrt of the squared error per unit vector at head_dim 128, Lloyd-Max with a least-squares scale
ERROR = {8: 0.0065, 4: 0.0957, 2: 0.3396}


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("bits", ERROR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_relative_error(bits, dtype):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(bits)).to(dtype)
    found = pack_tensor(x, bits).unpack()
    assert found.dtype == dtype and found.shape == x.shape
    error = (found - x).double().norm() / x.double().norm()
    # bfloat16 output rounds by up to 2**-9 each
    assert ERROR[bits] * 0.95 < error < ERROR[bits] * 1.05 + (0.002 if dtype == torch.bfloat16 else 0)


def test_an_outlier_reaches_no_further_than_its_block():
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    clean = rounded(x, 8)
    x[1, 200] = 1e6
    found = rounded(x, 8)
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    assert torch.equal(found[1, :128], clean[1, :128])
    assert found[1, 200] == pytest.approx(1e6, rel=0.01)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), max_size=3), st.integers(1, 300), st.sampled_from([1, 3, 8]))
def test_any_shape(lead, row, bits):
    x = torch.randn(*lead, row, generator=torch.Generator().manual_seed(row))
    packed = pack_tensor(x, bits)
    size = block_size(row)
    blocks = -(-row // size) * x[..., 0].numel()
    assert packed.held_bytes == blocks * (size * bits // 8 + 2)
    found = packed.unpack()
    assert found.shape == x.shape and found.is_contiguous()
    if bits == 8:
        assert (found - x).norm() <= 0.01 * x.norm()


def test_chunks_change_nothing(monkeypatch):
    import tqai.activations.vectors as vectors

    x = torch.randn(37, 130, generator=torch.Generator().manual_seed(0))
    whole = pack_tensor(x, 4)
    monkeypatch.setattr(vectors, "CHUNK_VALUES", 512)
    parts = pack_tensor(x, 4)
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scales, parts.scales)
    assert torch.equal(whole.unpack(), parts.unpack())


def test_transposed_and_empty_tensors():
    x = torch.randn(40, 3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(x.transpose(0, 1), 8), rounded(x.transpose(0, 1).contiguous(), 8))
    assert rounded(x[:0], 8).shape == (0, 3, 64)


def test_special_blocks():
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    clean = rounded(x, 8)
    x[0], x[1], x[2, 7], x[3, 9] = 0.0, 1e-30, torch.inf, torch.nan
    found = rounded(x, 8)
    assert not found[:2].any() and found[2:4].isnan().all()
    assert torch.equal(found[4], clean[4])
    half = torch.full((1, 256), 60000.0, dtype=torch.float16)  # its length is beyond float16
    assert (rounded(half, 8).double() / 60000 - 1).abs().max() < 0.1


def test_under_autocast_the_codes_are_the_same():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    plain = pack_tensor(x, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed = pack_tensor(x, 8)
        assert torch.equal(packed.codes, plain.codes)
        assert torch.equal(packed.unpack(), plain.unpack())
