"""A layer of trellis pages: what it holds, and saved and loaded again."""

import torch

from tqai.cache.layer import CompressedLayer
from tqai.cache.layer_state import export_layer, import_layer
from tqai.cache.storage import read_file, write_file


def test_saved_trellis_pages_come_back_to_the_bit(tmp_path, filled_layer, random_tokens):
    layer = filled_layer(130, batch=1, codec="trellis", bits_k=3, bits_v=2)
    assert layer.pool.pages == 2
    tensors, about = export_layer(layer)
    assert about["key_codec"]["name"] == "trellis"
    write_file(tmp_path / "c", tensors, {"layer": about})
    tensors, header = read_file(tmp_path / "c")
    twin = CompressedLayer(layer.config, 0, layer.sliding_window)
    import_layer(twin, tensors, header["layer"], torch.device("cpu"))
    assert torch.equal(layer.pool.raw(), twin.pool.raw())
    more = random_tokens(9, 1, 2, 70, 64, torch.float32)
    for one, other in zip(layer.append(*more).materialize(), twin.append(*more).materialize(), strict=True):
        assert torch.equal(one, other)


def test_a_trellis_page_is_as_large_as_a_scalar_one(filled_layer):
    trellis = filled_layer(64, batch=1, codec="trellis", bits_k=3, bits_v=2)
    scalar = filled_layer(64, batch=1, bits_k=3, bits_v=2)
    assert trellis.pool.page_format.page_bytes == scalar.pool.page_format.page_bytes
