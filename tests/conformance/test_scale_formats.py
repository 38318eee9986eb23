"""Scales of one byte: the backends that take them agree with core to the last bit, the others say why not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tqai.backends import load, resolve
from tqai.backends.torch_ops.log_scale import from_steps, to_steps
from tqai.cache.layer import CompressedLayer
from tqai.cache.layer_state import export_layer, import_layer
from tqai.cache.page_format import page_format_for
from tqai.cache.storage import read_file, write_file
from tqai.config import CacheConfig
from tqai.core import log_scale
from tqai.core.page import with_scale_format
from tqai.errors import ModelMismatchError


def test_bytes_and_scales_equal_core():
    """All 32768 non-negative bfloat16, against bases of every size; and every byte back."""
    rng = np.random.default_rng(0)
    scales = rng.permuted(np.tile(np.arange(0x8000, dtype=np.uint16), (3, 1)), axis=1).reshape(-1, 64)
    near = np.sort(rng.integers(0x3F00, 0x4080, (500, 64)).astype(np.uint16))
    for group in (scales, near, near[:, :1], np.zeros((2, 64), np.uint16)):
        wanted, wanted_bases = log_scale.to_steps(group)
        tensor = torch.from_numpy(group.view(np.int16).copy()).view(torch.bfloat16)
        found, bases = to_steps(tensor)
        np.testing.assert_array_equal(found.numpy(), wanted)
        np.testing.assert_array_equal(bases.numpy().view(np.uint16)[..., 0], wanted_bases)
        back = from_steps(found, bases).numpy()
        np.testing.assert_array_equal(back, log_scale.from_steps(wanted, wanted_bases))


@pytest.mark.parametrize(("bits_k", "bits_v", "dim"), [(4, 2, 128), (3, 3, 64), (4, 4, 80), (2, 8, 256)])
@pytest.mark.usefixtures("poisoned_allocations")
def test_attention_decode_and_codes(
    backend, format_for, fill, exact_tokens, reference_attention, bits_k, bits_v, dim
):
    page_format = format_for(bits_k, bits_v, dim, scale_format="log8")
    generator = torch.Generator().manual_seed(dim)
    spread = torch.exp(2 * torch.randn(2, 2, 192, 1, generator=generator))
    keys, values = (torch.randn(2, 2, 192, dim, generator=generator) * spread for _ in "kv")
    values[:, :, 5], keys[0, 0, 70] = 0.0, torch.nan
    filled = fill(page_format, keys, values, slabs=2)
    raw = filled.pool.raw()
    pages = backend.to_canonical(raw, page_format)
    np.testing.assert_array_equal(backend.from_canonical(pages, page_format), raw.numpy())
    for codec, encoded, vectors in (
        (page_format.key, pages.key, keys),
        (page_format.value, pages.value, values),
    ):
        by_page = vectors.unflatten(2, (3, 64)).transpose(1, 2).double().numpy()
        expected = with_scale_format(codec.encode(by_page), "log8")
        assert (encoded.scales != expected.scales).mean() < 0.01
        steps, wanted = (part.scales[..., :64].astype(int) for part in (encoded, expected))
        assert np.abs(steps - wanted).max() <= 1
    decoded = backend.decode(raw, page_format, torch.float32)
    for found, wanted in ((decoded.keys, filled.keys), (decoded.values, filled.values)):
        found = found.transpose(1, 2).flatten(2, 3).double()
        assert torch.equal(found.isnan(), wanted.isnan())
        found, wanted = found.nan_to_num(), wanted.nan_to_num()
        assert ((found - wanted).norm(dim=-1) <= 3e-6 * wanted.norm(dim=-1)).all()
    recent = exact_tokens(generator, 2, 2, 5, dim, dim, torch.float32)
    query = torch.randn(2, 4, 3, dim, generator=generator)
    mask = torch.rand(2, 1, 3, 197, generator=generator) > 0.3
    mask[..., 70] = False
    attended = backend.attend(query, filled.pool.history(), None, recent, mask, 0.05)
    everything = [
        torch.cat([a.nan_to_num(), b.double()], 2)
        for a, b in zip((filled.keys, filled.values), recent, strict=True)
    ]
    wanted, lse = reference_attention(query, *everything, mask, 0.05)
    exact = backend.name == "torch"
    assert (attended.out - wanted).norm() < (1e-5 if exact else 2e-3) * wanted.norm()
    assert (
        (attended.lse - lse).abs() < (2e-6 if exact else 2e-3) * lse.abs() + (1e-5 if exact else 2e-3)
    ).all()


@pytest.mark.parametrize("name", ["cuda", "triton", "mlx"])
def test_other_backends_say_why_not(name):
    from tqai.errors import BackendError

    page_format = page_format_for(CacheConfig(scale_format="log8"), 128, 128)
    device = "mlx" if name == "mlx" else "cuda"
    try:
        loaded = load(name)
    except BackendError as error:
        pytest.skip(str(error))
    assert "scale_format 'log8'" in loaded.refuses(page_format, device, "bfloat16")


def test_on_the_cpu_scales_of_one_byte_change_no_backend():
    chosen = {
        scale_format: resolve(
            page_format_for(CacheConfig(scale_format=scale_format), 128, 128), "cpu", "float32"
        ).backend.name
        for scale_format in ("bfloat16", "log8")
    }
    assert len(set(chosen.values())) == 1, chosen


@pytest.mark.parametrize("codec", ["scalar", "qjl"])
def test_saved_and_counted(tmp_path, codec):
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(2, 2, 200, 128, generator=generator) for _ in "kv"]
    layer = CompressedLayer(CacheConfig(3, 3, scale_format="log8", codec=codec, check_finite=False))
    tokens[0][0, 0, 7] = torch.nan
    layer.append(*tokens)
    report = layer.memory()
    assert report.scales_bytes == 2 * 2 * 3 * (64 + 64 + 16)
    tensors, about = export_layer(layer)
    assert tensors["key_scales"].dtype == torch.uint8
    assert tensors["key_scales"].shape == (2, 3, 2, 66)
    write_file(tmp_path / "c", tensors, {"layer": about})
    tensors, header = read_file(tmp_path / "c")
    assert header["version"] == 4
    twin = CompressedLayer(layer.config)
    import_layer(twin, tensors, header["layer"], torch.device("cpu"))
    assert torch.equal(twin.pool.raw(), layer.pool.raw())
    with pytest.raises(ModelMismatchError, match="scale_format='log8'"):
        import_layer(
            CompressedLayer(layer.config.with_changes(scale_format="bfloat16")),
            tensors,
            header["layer"],
            torch.device("cpu"),
        )
