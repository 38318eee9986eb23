"""`compress_hidden`, `compress_ffn`, `compress_attn_logits`: they change what flows, by as much as asked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import prompt

import tqai
from tqai.activations.blocks import attention_modules, decoder_layers, feed_forward_blocks
from tqai.activations.rounding import rounded_logits
from tqai.config import CacheConfig
from tqai.integrations.transformers.activations import ActivationStudy

Tiny = Callable[[str], Any]
NAMES = ["llama", "mistral", "gemma2", "gpt_oss", "deepseek", "gemma3n", "falcon_h1", "llama4"]
STUDIES = [
    ("compress_hidden", "bits_hidden"),
    ("compress_ffn", "bits_ffn"),
    ("compress_attn_logits", "bits_attn"),
]


@torch.no_grad()
def logits(model: Any, tokens: int = 90) -> torch.Tensor:
    return model(prompt(tokens), use_cache=False).logits.double()


@pytest.mark.parametrize(("switch", "bits"), STUDIES)
@pytest.mark.parametrize("name", NAMES)
def test_fewer_bits_change_more_and_detaching_ends_it(tiny: Tiny, name: str, switch: str, bits: str) -> None:
    model = tiny(name)
    plain = logits(model)
    changes = []
    for number in (8, 5, 2):
        study = ActivationStudy(model, CacheConfig(**{switch: True, bits: number})).attach()
        changes.append(float((logits(model) - plain).norm() / plain.norm()))
        study.detach()
    assert 1e-5 < changes[0] < changes[1] < changes[2], changes
    assert changes[0] < 0.2 and changes[2] > 0.05
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_found(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    layers = model.config.get_text_config().num_hidden_layers
    assert (
        len(attention_modules(model))
        == len(decoder_layers(model))
        == len(feed_forward_blocks(model))
        == layers
    )


@pytest.mark.parametrize(("switch", "bits"), STUDIES)
def test_patch_attaches_and_unpatch_detaches(tiny: Tiny, switch: str, bits: str) -> None:
    model = tiny("llama")
    plain = logits(model)
    own = dict(vars(model))
    for _ in range(2):
        tqai.patch(model, **{switch: True, bits: 2})
        once = logits(model)
    assert (once - plain).norm() > 0.05 * plain.norm()
    # patched twice is rounded once: as a fresh copy patched once
    other = copy.deepcopy(tiny("qwen2"))
    tqai.patch(other, **{switch: True, bits: 2})
    twice = logits(other)
    tqai.patch(other, **{switch: True, bits: 2})
    assert torch.equal(logits(other), twice)
    tqai.patch(model)
    assert torch.equal(logits(model), plain)
    tqai.patch(model, **{switch: True, bits: 2})
    tqai.unpatch(model)
    tqai.unpatch(model)
    assert torch.equal(logits(model), plain)
    assert vars(model) == own


@torch.no_grad()
def test_rounded_logits_in_generation_over_compressed_history(tiny: Tiny) -> None:
    """The handles of a compressed history are read too: 1 bit of logits changes the tokens, 8 bits hardly."""
    model = tiny("llama")
    found = {}
    for bits in (None, 8, 1):
        given = {} if bits is None else {"compress_attn_logits": True, "bits_attn": bits}
        cache = tqai.patch(model, bits_k=8, bits_v=8, **given)
        out = model.generate(
            prompt(200),
            past_key_values=cache,
            max_new_tokens=4,
            output_logits=True,
            return_dict_in_generate=True,
            do_sample=False,
        )
        assert cache.memory().codes_bytes > 0
        found[bits] = torch.stack(out.logits)[0].double()
    exact = found[None]
    assert (found[8] - exact).norm() < 0.15 * exact.norm() < (found[1] - exact).norm()


def test_levels_of_logits() -> None:
    row = torch.tensor([[0.0, 1.0, 2.0, 3.1, 9.0]])
    seen = torch.tensor([[True, True, True, True, False]])
    found = rounded_logits(row, seen, 2)
    assert torch.allclose(found[0, :4], torch.tensor([0.0, 3.1 / 3, 2 * 3.1 / 3, 3.1]))
    assert found[0, 4] == -torch.inf
    assert torch.equal(rounded_logits(row[:, :1], None, 1), row[:, :1])
    nothing = rounded_logits(row, torch.zeros_like(seen), 4)
    assert (nothing == -torch.inf).all()


def test_ffn_rounds_what_enters_the_block(tiny: Tiny) -> None:
    """Exactly: the hook's output is the rounding of its input, and the residual stream is left alone."""
    from tqai.activations.vectors import rounded

    model = tiny("llama")
    entered: list[torch.Tensor] = []
    block = feed_forward_blocks(model)[0]
    before = block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with ActivationStudy(model, CacheConfig(compress_ffn=True, bits_ffn=4)):
        after = block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        logits(model, 20)
    before.remove()
    after.remove()
    assert torch.equal(entered[1], rounded(entered[0], 4))


def test_training_with_packed_activations(tiny: Tiny) -> None:
    """Gradients of a whole model, its forward pass untouched."""
    for name, limit in (("llama", 0.08), ("gpt_oss", 0.05), ("deepseek", 0.03)):
        model, ids = copy.deepcopy(tiny(name)).train(), prompt(130)

        def gradients(model: Any = model, ids: torch.Tensor = ids) -> tuple[torch.Tensor, list[torch.Tensor]]:
            model.zero_grad()
            out = model(ids, labels=ids, use_cache=False)
            out.loss.backward()
            return out.logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

        plain, wanted = gradients()
        with tqai.compress_activations(model, bits=8):
            packed, found = gradients()
        assert torch.equal(plain, packed)
        error = sum((a - b).square().sum() for a, b in zip(found, wanted, strict=True))
        total = sum(b.square().sum() for b in wanted)
        assert 0 < float((error / total) ** 0.5) < limit, name
