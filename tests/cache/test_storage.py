"""Files: what was saved comes back to the bit, and what was altered is refused."""

from __future__ import annotations

import os
import random

import pytest
import torch

from tqai.cache import storage
from tqai.cache.layer import CompressedLayer
from tqai.cache.layer_state import export_layer, import_layer
from tqai.cache.storage import read_file, write_file
from tqai.config import CacheConfig
from tqai.errors import CorruptFileError, FileVersionError, ModelMismatchError


@pytest.fixture
def saved(tmp_path, filled_layer):
    layer = filled_layer(200, batch=2, sink_tokens=3, bits_k=3, bits_v=5)
    tensors, about = export_layer(layer)
    path = tmp_path / "cache.safetensors"
    write_file(path, tensors, {"layers": [about]})
    return layer, path


@pytest.mark.parametrize(
    "settings", [{}, {"sink_tokens": 70}, {"residual_window": 64}, {"sliding_window": 80}], ids=str
)
@pytest.mark.parametrize("tokens", [0, 1, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_round_trip_continues_exactly(tmp_path, filled_layer, random_tokens, settings, tokens, dtype):
    layer = filled_layer(tokens, batch=2, dtype=dtype, **settings)
    tensors, about = export_layer(layer)
    write_file(tmp_path / "c", tensors, {"layer": about})
    tensors, header = read_file(tmp_path / "c")
    twin = CompressedLayer(layer.config, 0, layer.sliding_window)
    import_layer(twin, tensors, header["layer"], torch.device("cpu"))
    assert twin.length == layer.length
    more = random_tokens(9, 2, 2, 100, 64, dtype)
    for one, other in zip(layer.append(*more).materialize(), twin.append(*more).materialize(), strict=True):
        assert torch.equal(one, other)
    if layer.pool.pages:
        assert torch.equal(layer.pool.raw(), twin.pool.raw())


def test_every_altered_byte_is_noticed(saved, tmp_path):
    _, path = saved
    whole = path.read_bytes()
    rng = random.Random(0)
    header_bytes = int.from_bytes(whole[:8], "little") + 8
    positions = [rng.randrange(header_bytes) for _ in range(150)] + [
        rng.randrange(len(whole)) for _ in range(150)
    ]
    other = tmp_path / "altered"
    for position in [0, 7, 8, header_bytes, len(whole) - 1, *positions]:
        altered = bytearray(whole)
        altered[position] ^= 1 << rng.randrange(8)
        other.write_bytes(altered)
        with pytest.raises((CorruptFileError, FileVersionError)):
            read_file(other)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated_files_are_refused(saved, tmp_path, share):
    _, path = saved
    whole = path.read_bytes()
    short = tmp_path / "short"
    short.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CorruptFileError, match="truncated"):
        read_file(short)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no saved cache"):
        read_file(tmp_path / "missing")
    save_file({"x": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(CorruptFileError, match="no saved cache"):
        read_file(tmp_path / "other")


def test_unknown_version_is_named(saved, tmp_path, monkeypatch):
    layer, _ = saved
    for version in (999, 3, 1):
        monkeypatch.setattr(storage, "FORMAT_VERSION", version)
        write_file(tmp_path / "other", *export_layer(layer)[:1], {})
        monkeypatch.undo()
        with pytest.raises(FileVersionError, match=f"version {version}: allowed is 4"):
            read_file(tmp_path / "other")


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    layer, path = saved
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(path, export_layer(layer)[0], {})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_another_configuration_is_refused(saved):
    layer, path = saved
    tensors, header = read_file(path)
    about = header["layers"][0]
    for config, window in (
        (CacheConfig(bits_k=4, bits_v=5), None),
        (CacheConfig(bits_k=3, bits_v=5, seed=1), None),
    ):
        with pytest.raises(ModelMismatchError, match="was saved with"):
            import_layer(CompressedLayer(config, 0, window), tensors, about, torch.device("cpu"))
    with pytest.raises(ModelMismatchError, match="sliding_window"):
        import_layer(CompressedLayer(layer.config, 0, 64), tensors, about, torch.device("cpu"))
    incomplete = {name: tensor for name, tensor in tensors.items() if name != "value_scales"}
    with pytest.raises(CorruptFileError, match="fit together"):
        import_layer(CompressedLayer(layer.config), incomplete, about, torch.device("cpu"))
    with pytest.raises(CorruptFileError, match="claims 201"):
        import_layer(CompressedLayer(layer.config), tensors, {**about, "length": 201}, torch.device("cpu"))


def test_a_folder_that_is_not_there_is_named(tmp_path, saved):
    with pytest.raises(FileNotFoundError) as raised:
        write_file(tmp_path / "none" / "c", {}, {})
    assert str(raised.value) == f"no folder {tmp_path / 'none'} to save a cache in"
    assert not (tmp_path / "none").exists()
