"""Offsets in models: the same attention on the codes as on decompressed tensors, and what they are for."""

from __future__ import annotations

import contextlib

import pytest
import torch
from oracle import WITH_FLIPS, distance
from steps import CHUNKS, generate, run
from tiny_models import prompt
from transformers import DynamicCache

import tqai
from tqai.errors import UnsupportedError

CONSTANT = 500.0


@contextlib.contextmanager
def large_key_bias(model, constant=CONSTANT):
    """A constant on the slowest RoPE pair of every key, as Qwen2 models have. Queries are made small, or
    the tiny model would turn any error into another text."""
    attentions = [layer.self_attn for layer in model.model.layers]
    biases = [attention.k_proj.bias for attention in attentions]
    queries = [parameter for attention in attentions for parameter in attention.q_proj.parameters()]
    changed = [*biases, *queries]
    before = [parameter.detach().clone() for parameter in changed]
    half = model.config.hidden_size // model.config.num_attention_heads // 2
    with torch.no_grad():
        for bias in biases:
            bias.view(-1, 2 * half)[:, [half - 1, 2 * half - 1]] += constant
        for parameter in queries:
            parameter.mul_(0.2)
    try:
        yield model
    finally:
        with torch.no_grad():
            for parameter, original in zip(changed, before, strict=True):
                parameter.copy_(original)


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_large_key_biases_cost_nothing_with_offsets(tiny, mode):
    """K4/V4 on a Qwen2 type: the error of the logits falls by an order of magnitude and more."""
    with large_key_bias(tiny("qwen2")) as model, torch.no_grad():
        ids = prompt(207)
        exact = run(model, ids, DynamicCache(config=model.config), CHUNKS)
        errors = {}
        for offsets in ("off", mode):
            cache = tqai.TurboQuantCache(model, bits=4, offsets=offsets)
            errors[offsets] = distance(run(model, ids, cache, CHUNKS)[:, 70:], exact[:, 70:])

        assert errors["off"] > 10 * errors[mode]
        for layer in cache.layers:
            pair = layer.store.offsets.keys[0, 0, 0, [31, 63]]
            assert (pair.abs() > CONSTANT / 2).all() or (pair.norm() > CONSTANT)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "mistral", "gemma2", "gemma3", "gemma3n", "deepseek", "gpt_oss", "diffllama"]
)
def test_codes_and_tensors_agree(tiny, name):
    """Attention on the codes corrects its output; decompressed tensors get the offsets added first."""
    mode = "auto" if name == "gemma2" else "on"
    with torch.no_grad():
        ids = prompt(207, batch=2)
        outputs = []
        for strategy in ("full", "incremental", "auto"):
            cache = tqai.TurboQuantCache(
                tiny(name), bits=4, offsets=mode, sink_tokens=3, cache_strategy=strategy
            )
            outputs.append(run(tiny(name), ids, cache, CHUNKS))
        assert cache.memory().offsets_bytes > 0 or name == "gemma2"
        assert distance(outputs[1], outputs[0]) < 1e-5
        # the second layer's tokens differ in their last bits, so a few codes do
        assert distance(outputs[2], outputs[0]) < WITH_FLIPS


def test_soft_capped_models_keep_their_keys(tiny):
    with pytest.raises(UnsupportedError, match=r"offsets='on'.*'auto'"):
        tqai.TurboQuantCache(tiny("gemma2"), offsets="on")
    cache = tqai.TurboQuantCache(tiny("gemma2"), offsets="auto")
    assert all(layer.store.soft_capped for layer in cache.layers)
    assert not any(
        layer.store.soft_capped for layer in tqai.TurboQuantCache(tiny("llama"), offsets="on").layers
    )


def test_left_padding_beams_and_saving(tiny, tmp_path):
    with large_key_bias(tiny("qwen2"), 20.0) as model:
        ids = prompt(150, batch=2)
        mask = torch.ones_like(ids)
        ids[1, :100], mask[1, :100] = 0, 0
        wanted = generate(model, ids, attention_mask=mask).sequences
        cache = tqai.patch(model, 8, 8, offsets="on")
        assert torch.equal(generate(model, ids, attention_mask=mask).sequences, wanted)
        beams = {"num_beams": 3, "attention_mask": mask}
        found = generate(model, ids, **beams).sequences
        tqai.unpatch(model)
        assert torch.equal(found, generate(model, ids, **beams).sequences)
        cache = tqai.TurboQuantCache(model, bits=4, offsets="on")
        with torch.no_grad():
            model(prompt(150), past_key_values=cache)
            cache.save(tmp_path / "c", model)
            twin = tqai.TurboQuantCache.load(tmp_path / "c", model)
            assert twin.settings.offsets == "on"
            token = prompt(1, seed=3)
            first, second = (model(token, past_key_values=one).logits for one in (cache, twin))
        assert torch.equal(first, second)


def test_files_of_version_1_still_load(tiny, tmp_path):
    """Neither settings nor specs of a file without offsets hold anything that version 1 did not know."""
    from tqai.cache.storage import read_file

    model = tiny("qwen2")
    cache = tqai.TurboQuantCache(model, bits=4)
    with torch.no_grad():
        model(prompt(150), past_key_values=cache)
    cache.save(tmp_path / "c")
    header = read_file(tmp_path / "c")[1]
    assert header["version"] == 4
    assert set(header["settings"]) == {
        *("bits_k", "bits_v", "sink_tokens", "residual_window", "cache_strategy", "codec", "rotation"),
        *("scale", "seed", "backend", "device", "check_finite"),
    }
    assert set(header["layers"][0]["key_codec"]) == {"name", "head_dim", "bits", "rotation", "scale", "seed"}
    assert tqai.TurboQuantCache.load(tmp_path / "c", model).settings.offsets == "off"
