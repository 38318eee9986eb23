"""`tqai eval --backend mlx`: the figures of a model that mlx-lm computes are those of torch."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (pip install 'tqai[mlx]')")

SIZES = ("--documents", "1", "--document-tokens", "208", "--prefill", "150", "--seeds", "1", "--json")
CACHES = ("K4/V4", "K2/V2,window=40,sinks=3", "dynamic")


@pytest.fixture(scope="module")
def both(tiny_model, tmp_path_factory):
    """Results with mlx and with torch."""
    import contextlib

    from tqai.cli.app import main

    folder = tmp_path_factory.mktemp("eval")
    (folder / "text.txt").write_text("All in the golden afternoon full leisurely we glide. " * 60, "utf-8")
    found = []
    for backend, more in (("mlx", ("--cache", "quantized-4")), ("torch", ())):
        out = folder / f"{backend}.json"
        with out.open("w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
            status = main(
                [
                    *(
                        "eval",
                        "--model",
                        tiny_model,
                        "--text",
                        str(folder / "text.txt"),
                        "--dtype",
                        "float32",
                    ),
                    *(*SIZES, "--backend", backend, "--bits-at", "512", "--greedy", "5"),
                    *(word for cache in CACHES for word in ("--cache", cache)),
                    *more,
                    *("--retrieval", "800", "--kind", "single", "--questions", "1"),
                ]
            )
        assert status == 0
        found.append(json.loads(out.read_text("utf-8"))["caches"])
    return found


def test_nothing_stays_patched(both):
    """Neither by this command nor by a test before it: attention is replaced in mlx-lm's own modules."""
    from tqai.integrations.mlx_lm import attention

    assert not attention._ORIGINALS and not any(attention._USERS.values())


def test_quality_is_that_of_torch(both):
    here, there = both
    for cache in CACHES:
        assert here[cache]["perplexity"]["value"] == pytest.approx(
            there[cache]["perplexity"]["value"], rel=5e-3
        )
    for cache in CACHES[:2]:
        assert here[cache]["kl_mean"]["value"] == pytest.approx(there[cache]["kl_mean"]["value"], rel=0.02)
        assert here[cache]["kl_p99"]["value"] == pytest.approx(there[cache]["kl_p99"]["value"], rel=0.05)
    assert here["dynamic"]["kl_mean"]["value"] < 1e-9
    assert here["dynamic"]["first_divergence"] == [None]
    assert [cell["questions"] for cell in here["K4/V4"]["retrieval"]] == [1]


def test_bits_count_everything(both):
    """Codes and scales as with torch, and an exact window whose room mlx-lm and torch round differently."""
    here, there = both
    for cache in CACHES[:2]:
        found, wanted = (side[cache]["bits_per_value_at"]["mean"] for side in (here, there))
        assert 0.7 * wanted < found < 1.3 * wanted
    # KVCache makes room for 256 tokens at a time
    assert here["dynamic"]["bits_per_value_at"]["mean"] == pytest.approx(32 * 512 / 449, rel=0.15)


def test_a_peer_of_mlx_lm(both):
    peer = both[0]["quantized-4"]
    assert peer["family"] == "quantized" and peer["kl_mean"]["value"] > 0
    assert peer["settings"] == {"bits": 4, "group_size": 64}
    # 4 bits, a float32 scale and shift for 64 numbers, room for 768 tokens where 385 to 512 are held
    assert 5.0 <= peer["bits_per_value_at"]["mean"] < 5.0 * 512 / 385


def test_a_filled_cache_counts_its_arrays_once_and_can_be_forked(tiny_model):
    import mlx_lm
    import torch
    from transformers import AutoConfig

    import tqai
    from tqai.evaluation import cache_maker, greedy_decode, held_bytes, prefill_caches
    from tqai.evaluation.mlx_models import MlxCausalModel

    model = MlxCausalModel(mlx_lm.load(tiny_model)[0], AutoConfig.from_pretrained(tiny_model))
    ids = torch.from_numpy(np.arange(150) % 300)[None]
    plain, packed = prefill_caches(model, ids, [cache_maker(name, model) for name in ("dynamic", "K4/V2")])
    assert plain.get_seq_length() == packed.get_seq_length() == 150
    for cache in (plain, packed):
        assert held_bytes(cache) == sum(layer.nbytes for layer in cache.layers) > 0
    assert held_bytes(packed) < held_bytes(plain) / 2
    fork = copy.deepcopy(packed)
    first = greedy_decode(model, ids[:, :3], fork, 4)
    assert (packed.get_seq_length(), fork.get_seq_length()) == (150, 156)
    assert greedy_decode(model, ids[:, :3], packed, 4) == first
    tqai.unpatch(model.mlx)


def test_without_a_cache_the_fallback_is_measured(tqai_command, tiny_model):
    arguments = ("eval", "--model", tiny_model, "--backend", "mlx", "--documents", "1", "--json")
    done = tqai_command(*arguments, "--document-tokens", "160", "--prefill", "120", "--seeds", "1")
    assert done.status == 0, done.err
    assert list(done.json["caches"]) == ["K4/V2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers",), "--layers"),
        (("--cache", "quanto-4"), "with mlx-lm allowed are dynamic, quantized-8"),
        (("--cache", "balanced"), "with mlx-lm allowed"),
        (("--cache", "dynamic,window=3"), "takes no options"),
        (("--device", "cpu"), "--device cpu"),
    ],
)
def test_what_is_not_served_is_said_in_one_line(tqai_command, tiny_model, options, message):
    done = tqai_command(
        "eval", "--model", tiny_model, "--backend", "mlx", "--document-tokens", "700", *options
    )
    assert done.status in (1, 2)
    assert message in done.one_line()
