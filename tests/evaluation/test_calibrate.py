"""Calibration on a tiny model: what is measured is what a cache of these bits costs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tqai.cache.bit_plan import WIDTHS
from tqai.config import CacheConfig
from tqai.errors import InputError
from tqai.evaluation.calibrate import calibrate, calibration_runs
from tqai.evaluation.chunked import chunked_logits
from tqai.integrations.transformers import TurboQuantCache


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        initializer_range=0.25,
    )
    return LlamaForCausalLM(config).eval()


IDS = torch.randint(0, 96, (220,), generator=torch.Generator().manual_seed(1))


def kl_of(model, layer_bits):
    reference = chunked_logits(model, IDS, lambda: DynamicCache(config=model.config), 150, 16)
    logits = chunked_logits(
        model, IDS, lambda: TurboQuantCache(model, layer_bits=layer_bits, backend="torch"), 150, 16
    )
    log_p, log_q = (part.double().log_softmax(-1) for part in (reference, logits))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_costs_are_measured_one_side_at_a_time(model):
    runs = []
    found = calibrate(model, IDS, CacheConfig(backend="torch"), 150, 16, runs.append)
    assert runs[-1] == calibration_runs(2) == 14
    assert found.about["reference_bits"] == 8
    floor = kl_of(model, ((8, 8), (8, 8)))
    assert found.about["reference_kl"] == pytest.approx(floor, rel=1e-3, abs=1e-9)
    for index, side, width in ((0, 0, 2), (0, 1, 3), (1, 0, 3), (1, 1, 2)):
        bits = [[8, 8], [8, 8]]
        bits[index][side] = width
        errors = found.layers[index][1]
        measured = (errors.keys, errors.values)[side][width]
        assert measured == pytest.approx(kl_of(model, tuple(map(tuple, bits))) - floor, rel=1e-3, abs=1e-9)
    for layer in found.layers:
        assert (layer[0].kv_heads, layer[0].key_dim, layer[0].value_bytes) == (1, 64, 4)
        for errors in (layer[1].keys, layer[1].values):
            assert tuple(errors) == WIDTHS
            assert errors[2] > errors[3] > errors[4] >= 0
    assert found.model["config"]


def test_a_prefill_without_a_page_is_refused(model):
    with pytest.raises(InputError, match="prefill_tokens=100: allowed are 164 or more"):
        calibrate(model, IDS, CacheConfig(residual_window=100), 100)
