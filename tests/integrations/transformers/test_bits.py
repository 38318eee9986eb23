"""`bits="auto"` and `layer_bits` in models: decided, kept, saved and shown."""

from __future__ import annotations

import pytest
import torch
from oracle import distance
from steps import CHUNKS, generate, run
from tiny_models import prompt
from transformers import DynamicCache

import tqai
from tqai.cache.bit_plan import LayerShape, SideErrors
from tqai.cache.calibration import Calibration
from tqai.cache.storage import read_file
from tqai.errors import ConfigError, ModelMismatchError

BUDGET = {"bits": "auto", "bits_budget": 3.4}


def test_layer_bits_are_what_each_layer_has(tiny):
    model = tiny("llama")
    cache = tqai.TurboQuantCache(model, layer_bits=((2, 4), (8, 3)))
    with torch.no_grad():
        model(prompt(150), past_key_values=cache)
    assert cache.layer_bits == cache.memory().layer_bits == ((2, 4), (8, 3))
    specs = [
        (layer.store.pool.page_format.key.spec.bits, layer.store.pool.page_format.value.spec.bits)
        for layer in cache.layers
    ]
    assert specs == [(2, 4), (8, 3)]
    with pytest.raises(ConfigError, match="layer_bits is of 3 layers: the cache of this model has 2"):
        tqai.TurboQuantCache(model, layer_bits=((2, 4),) * 3)


@pytest.mark.parametrize("strategy", ["auto", "full"])
@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "gemma3n", "falcon_h1", "qwen3_next", "gptj", "diffllama"]
)
def test_the_first_prefill_decides(tiny, name, strategy):
    """The same logits as a cache made with the bits that came out; the first pass is exact."""
    model, ids = tiny(name), prompt(207)
    with torch.no_grad():
        exact = model(ids[:, :70], past_key_values=DynamicCache(config=model.config)).logits
        cache = tqai.TurboQuantCache(model, cache_strategy=strategy, **BUDGET)
        assert set(cache.layer_bits) == {None}
        logits = run(model, ids, cache, CHUNKS)
        assert distance(logits[:, :70], exact) < 1e-5
        bits = [(4, 2) if pair is None else pair for pair in cache.layer_bits]
        assert None not in cache.memory().layer_bits
        twin = tqai.TurboQuantCache(model, cache_strategy=strategy, layer_bits=tuple(bits))
        assert distance(run(model, ids, twin, CHUNKS), logits) < 1e-5


def test_what_contradicts_itself_is_named(tiny):
    model = tiny("llama")
    for given, message in (
        ({"bits": "auto"}, "needs bits_budget="),
        ({"bits": "auto", "bits_budget": 3.0, "bits_k": 4}, "sets bits_k and bits_v"),
        ({"bits": "some"}, "bits_k='some'"),
        ({"calibration": "missing.json"}, "without bits_budget="),
        ({"calibration": "missing.json", "bits_budget": 3.0}, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            tqai.TurboQuantCache(model, **given)
    with pytest.raises(ConfigError, match="made with the model or its config"):
        tqai.TurboQuantCache(**BUDGET)


def test_patch_generate_and_save(tiny, tmp_path):
    model = tiny("qwen2")
    cache = tqai.patch(model, **BUDGET)
    first = generate(model, past_key_values=cache)
    assert None not in cache.layer_bits
    again = generate(model)
    assert torch.equal(first.sequences, again.sequences)
    assert again.past_key_values.layer_bits == cache.layer_bits
    beams = generate(model, num_beams=3)
    assert beams.sequences.shape[1] == first.sequences.shape[1]
    cache.save(tmp_path / "c", model)
    header = read_file(tmp_path / "c")[1]
    assert header["settings"]["layer_bits"] == [list(pair) for pair in cache.layer_bits]
    assert "bits_budget" not in header["settings"]
    twin = tqai.TurboQuantCache.load(tmp_path / "c", model)
    assert twin.layer_bits == cache.layer_bits
    with torch.no_grad():
        logits = [model(prompt(1, seed=5), past_key_values=one).logits for one in (cache, twin)]
    assert torch.equal(*logits)
    cache.reset()
    assert set(cache.layer_bits) == {None}
    assert torch.equal(generate(model, past_key_values=cache).sequences, first.sequences)


def test_a_calibration_spends_the_budget(tiny, tmp_path):
    from tqai.integrations.transformers.saving import fingerprint

    model = tiny("llama")
    shape = LayerShape(2, 64, 64, 4)
    cheap, dear = ({2: 1e-6, 3: 1e-7, 4: 0.0}, {2: 1.0, 3: 0.5, 4: 0.1})
    layers = ((shape, SideErrors(cheap, dear)), (shape, SideErrors(dear, cheap)))
    Calibration(layers, "kl", fingerprint(model)).save(tmp_path / "c.json")
    # at 8192 tokens two bits take 2.5 here, window included, and every half bit is one width of one side
    cache = tqai.patch(model, bits="auto", bits_budget=3.51, calibration=tmp_path / "c.json")
    assert cache.layer_bits == ((2, 4), (4, 2))
    assert cache.settings.layer_bits == ((2, 4), (4, 2))
    assert generate(model).past_key_values.layer_bits == ((2, 4), (4, 2))
    Calibration(layers, "kl", {"config": "other"}).save(tmp_path / "d.json")
    with pytest.raises(ModelMismatchError, match="another configuration"):
        tqai.TurboQuantCache(model, calibration=tmp_path / "d.json", bits_budget=3.51)
    with pytest.raises(ConfigError, match="2 bits everywhere take"):
        tqai.TurboQuantCache(model, calibration=tmp_path / "c.json", bits_budget=2.2)
