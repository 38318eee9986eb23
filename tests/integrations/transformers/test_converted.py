"""Converted models: the same function, values that come rotated, a cache that need not rotate them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, prompt
from transformers import AutoModelForCausalLM

import tqai
from tqai import backends
from tqai.core.rotation import rotation_matrix
from tqai.errors import ConfigError, ModelMismatchError, UnsupportedError
from tqai.integrations.transformers.folding import fold_value_rotation

Tiny = Callable[[str], Any]
NAMES = [
    "llama",
    "llama_dim80",
    "qwen2",
    "mistral",
    "gemma3",
    "gemma3n",
    "gpt_oss",
    "falcon_h1",
    "gptj",
]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(prompt(100), use_cache=False).logits.double()


@pytest.mark.parametrize("name", NAMES)
def test_function_is_preserved_and_values_are_rotated(name: str) -> None:
    """Biases too: those of the tiny models are not 0 here."""
    model = build(name)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if part.endswith("bias"):
                parameter.normal_(std=0.1)

    def watch(model: Any) -> torch.Tensor:
        cache = tqai.TurboQuantCache(model.config)
        with torch.no_grad():
            model(prompt(40), past_key_values=cache)
        layer = next(layer for layer in cache.layers if hasattr(layer, "store"))
        return layer.values.double()

    before, plain = watch(model), logits(model)
    fold_value_rotation(model, "auto", 5)
    after = watch(model)
    assert float((logits(model) - plain).norm() / plain.norm()) < 1e-5
    matrix = torch.from_numpy(rotation_matrix("auto", before.shape[-1], 5).copy())
    assert float((before @ matrix.T - after).norm() / before.norm()) < 1e-5
    assert float((before - after).norm() / before.norm()) > 0.5


def test_phi3_style_fused_projection() -> None:
    import transformers as tf

    torch.manual_seed(0)
    config = tf.Phi3Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    model = tf.Phi3ForCausalLM(config).eval()
    plain = logits(model)
    fold_value_rotation(model, "haar", 1)
    assert float((logits(model) - plain).norm() / plain.norm()) < 1e-5


@pytest.mark.parametrize(
    ("name", "words"),
    [("qwen3_next", "more with its values than attend"), ("deepseek", "no plain value projection")],
)
def test_gates_and_latents_are_refused_and_left_alone(name: str, words: str) -> None:
    model = build(name)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match=words):
        fold_value_rotation(model, "auto", 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_cache_that_does_not_come_rotated_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function may be preserved and the cache still hold something else."""
    from tqai.integrations.transformers import folding

    monkeypatch.setattr(folding, "_rotate", lambda *_: None)
    with pytest.raises(UnsupportedError, match="caches something else"):
        fold_value_rotation(build("llama"), "auto", 0)


def test_unknown_projections_are_refused() -> None:
    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.v_proj, attention.o_proj = torch.nn.Identity(), attention.o_proj
    with pytest.raises(UnsupportedError, match="v_proj or qkv_proj"):
        fold_value_rotation(model, "auto", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "qwen2"
    tqai.convert(build("qwen2"), target, bits_k=3, bits_v=4, seed=42, source="the original")
    return target


def test_file_holds_what_was_asked_for(folder: Path) -> None:
    content = json.loads((folder / "tqai_config.json").read_text("utf-8"))
    assert (content["bits_k"], content["bits_v"], content["seed"]) == (3, 4, 42)
    assert content["tqai_version"] == tqai.__version__
    assert content["model"] == "the original"
    assert (
        content["settings"] == tqai.CacheConfig(bits_k=3, bits_v=4, seed=42, rotation_v="identity").to_dict()
    )


@torch.no_grad()
def test_plain_transformers_loads_it(folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    original = logits(build("qwen2"))
    assert float((logits(loaded) - original).norm() / original.norm()) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "native"])
@torch.no_grad()
def test_decoding_equals_the_original_with_the_rotation(
    folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "native":
        monkeypatch.setattr(backends, "BACKENDS", {"native": "tqai.backends.native.backend:NativeBackend"})
        try:
            backends.load("native")
        except tqai.errors.BackendError as error:
            pytest.skip(str(error))
    ids = prompt(260)
    found = []
    for model, given in (
        (AutoModelForCausalLM.from_pretrained(folder), {"config_path": folder}),
        (build("qwen2"), {"bits_k": 3, "bits_v": 4, "seed": 42}),
    ):
        cache = tqai.patch(model, **given)
        model(ids[:, :256], past_key_values=cache)
        found.append(model(ids[:, 256:], past_key_values=cache).logits.double())
        codec = cache.layers[0].store.pool.page_format.value
        assert codec.spec.rotation == ("identity" if "config_path" in given else "hadamard2")
        assert cache.settings.bits_v == 4
    # a code that lies on a boundary may fall to either side
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 5e-3


def test_the_value_rotation_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tqai.backends.torch_ops import attention

    calls: list[str] = []
    original = attention.torch_codec

    def watched(codec: Any, device: Any) -> Any:
        calls.append(codec.spec.rotation)
        form = original(codec, device)

        class Watched:
            def __getattr__(self, name: str) -> Any:
                assert name != "rotation" or codec.spec.rotation != "identity", "the values were rotated"
                return getattr(form, name)

        return Watched()

    monkeypatch.setattr(attention, "torch_codec", watched)
    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = tqai.patch(model, config_path=folder)
    with torch.no_grad():
        model(prompt(200), past_key_values=cache)
        model(prompt(1), past_key_values=cache)
    assert "identity" in calls


def test_settings_beside_the_folder_go_before_it(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = tqai.patch(model, config_path=folder, bits_v=8, sink_tokens=4)
    settings = cache.settings
    assert (settings.bits_k, settings.bits_v, settings.sink_tokens, settings.seed) == (3, 8, 4, 42)
    assert settings.rotation_v == "identity"
    assert tqai.patch(model).settings.rotation_v is None
    with pytest.raises(ConfigError, match="config_path"):
        tqai.patch(model, config_path=folder, config="K4/V4")


def test_another_dtype_is_the_same_model_and_another_model_is_not(folder: Path, tiny: Tiny) -> None:
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert tqai.patch(half, config_path=folder).settings.seed == 42
    for model in (tiny("qwen2"), tiny("llama")):
        with pytest.raises(ModelMismatchError, match="load the model from there"):
            tqai.patch(model, config_path=folder)


def test_bfloat16_weights(tmp_path: Path) -> None:
    model = copy.deepcopy(build("llama")).to(torch.bfloat16)
    plain = logits(model)
    tqai.convert(model, tmp_path / "half")
    assert float((logits(model) - plain).norm() / plain.norm()) < 0.1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    tqai.patch(loaded, config_path=tmp_path / "half")


def test_folders_that_are_not_empty(tmp_path: Path, tiny: Tiny) -> None:
    model = copy.deepcopy(tiny("llama"))
    before = model.model.layers[0].self_attn.v_proj.weight.clone()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        tqai.convert(model, tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        tqai.convert(model, tmp_path / "mine.txt")
    with pytest.raises(ConfigError, match="identity"):
        tqai.convert(model, tmp_path / "new", rotation_v="identity")
    assert torch.equal(model.model.layers[0].self_attn.v_proj.weight, before)
    tqai.convert(model, tmp_path / "new")
    tqai.convert(copy.deepcopy(tiny("llama")), tmp_path / "new", bits_k=2)
    assert json.loads((tmp_path / "new" / "tqai_config.json").read_text())["bits_k"] == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "tqai convert"),
        ("{", "no JSON"),
        ('{"bits_k": 4, "tqai_version": "0.1.0"}', "run `tqai convert` again"),
        ('{"format": "tqai-converted", "version": 9}', "version 9"),
        ('{"format": "tqai-converted", "version": 1}', "lacks 'settings'"),
        ('{"format": "tqai-converted", "version": 1, "settings": {"bits_k": 77}}', "bits_k=77"),
    ],
)
def test_damaged_settings(tmp_path: Path, tiny: Tiny, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "tqai_config.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        tqai.patch(tiny("llama"), config_path=tmp_path)


@torch.no_grad()
def test_calibration_and_offsets_lie_beside_it(tmp_path: Path) -> None:
    from tqai.evaluation.calibrate import calibrate

    model = build("llama")
    measured = calibrate(model, prompt(200)[0], prefill_tokens=128)
    measured.save(tmp_path / "measured.json")
    given = {"bits_budget": 6.0, "budget_tokens": 1 << 20, "offsets": "auto"}
    written = tqai.convert(model, tmp_path / "new", calibration=tmp_path / "measured.json", **given)
    assert written.layer_bits is not None and written.bits_budget is None
    assert (tmp_path / "new" / "calibration.json").read_text() == (tmp_path / "measured.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    cache = tqai.patch(loaded, config_path=tmp_path / "new")
    assert cache.settings == written
    loaded(prompt(200), past_key_values=cache)
    formats = [layer.store.pool.page_format for layer in cache.layers]
    assert [(f.key.spec.bits, f.value.spec.bits) for f in formats] == list(written.layer_bits)
    assert cache.settings.offsets == "auto"
    assert tqai.patch(loaded, config_path=tmp_path / "new", bits_v=8).settings.layer_bits is None
    with pytest.raises(ConfigError, match="bits_budget"):
        tqai.convert(loaded, tmp_path / "other", calibration=measured)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("training", [True, False])
def test_a_model_stays_in_its_mode(training: bool) -> None:
    model = build("llama").train(training)
    fold_value_rotation(model, "auto", 0)
    assert all(part.training is training for part in model.modules())
