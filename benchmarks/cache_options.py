"""What offsets cost, what bits per layer gain, and what balancing keys against queries would.

    python benchmarks/cache_options.py [offsets] [bits] [halves] [balance]    some minutes; all without names

offsets   time per layer and decode step on the CPU with and without them, and beside the alternative of
          subtracting from the window at every step; and the error of attention to exact bfloat16 tokens,
          which are held without the offset. Nothing is timed before both ways agree with float64.
bits      KL of the embedded model, cache in the loop: the same bits everywhere, the bits that the first
          prefill chooses, and those of a calibration on another text, at the same all-in budget.
balance   the same KL when every RoPE pair of the keys is scaled by s and that of the queries by 1 / s (folded
          into the weights, exact), with the s that makes the expected error of the logits least.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from typing import Any

import torch
from provenance import ROOT, provenance

from tqai.cache.layer import CompressedLayer
from tqai.config import CacheConfig
from tqai.demo import load
from tqai.demo.retrieval import document
from tqai.evaluation import CacheMaker, cache_maker, evaluate_quality, split_documents
from tqai.evaluation.calibrate import calibrate

RESULT = ROOT / "benchmarks" / "results" / "cache_options.json"
HEADS, GROUPS, DIM, HISTORY, WINDOW, STEPS = 8, 4, 128, 2048, 128, 300
DOCUMENTS, TOKENS, PREFILL, CHUNK = 3, 1024, 512, 32
CALIBRATION_TOKENS = 768
TOLERANCE = 4e-3


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    chosen = names or list(SECTIONS)
    for name in chosen:
        section = {**SECTIONS[name](), "provenance": provenance()}
        found = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else {}
        found[name] = section
        RESULT.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        print(json.dumps({key: found[name][key] for key in found[name] if key != "provenance"}, indent=1))
    return 0


# --- offsets


def offsets() -> dict[str, Any]:
    """Section "offsets"."""
    return {
        "heads": HEADS,
        "query_heads": HEADS * GROUPS,
        "head_dim": DIM,
        "tokens": HISTORY,
        "residual_window": WINDOW,
        "steps": STEPS,
        "dtypes": {str(dtype).removeprefix("torch."): _of_dtype(dtype) for dtype in DTYPES},
        "exact_tokens": [_exact_error(mean) for mean in (0.0, 1.0, 10.0, 100.0)],
    }


DTYPES = (torch.float32, torch.bfloat16)


def _tokens(count: int, dtype: torch.dtype, mean: float, seed: int) -> list[torch.Tensor]:
    generator, centre = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    return [
        (
            mean * torch.randn(1, HEADS, 1, DIM, generator=centre)
            + torch.randn(1, HEADS, count, DIM, generator=generator)
        ).to(dtype)
        for _ in "kv"
    ]


def _of_dtype(dtype: torch.dtype) -> dict[str, float]:
    """Microseconds per layer and step: medians of interleaved steps."""
    layers = {}
    for mode in ("off", "on"):
        layers[mode] = CompressedLayer(CacheConfig(offsets=mode, residual_window=WINDOW))
        layers[mode].append(*_tokens(HISTORY, dtype, 1.0, 0))
    query = (0.3 * torch.randn(1, HEADS * GROUPS, 1, DIM, generator=torch.Generator().manual_seed(5))).to(
        dtype
    )
    for layer in layers.values():
        step = layer.append(*_tokens(1, dtype, 1.0, 1))
        out = layer.attend(step, query, None, DIM**-0.5).out
        truth = _reference(query, *layer.materialize(step))
        error = float((out.double() - truth).norm() / truth.norm())
        assert error < TOLERANCE, error
    attended = layers["on"].attend(step, query, None, DIM**-0.5, with_lse=False)
    times: dict[str, list[float]] = {"off": [], "on": [], "subtracted": [], "copied": [], "offset": []}
    for turn in range(STEPS):
        token = _tokens(1, dtype, 1.0, turn)
        for mode, layer in layers.items():
            begin = time.perf_counter()
            step = layer.append(*token)
            layer.attend(step, query, None, DIM**-0.5, with_lse=False)
            times[mode].append(time.perf_counter() - begin)
        held, taken = layers["off"].window_tokens, layers["on"].offsets
        pair = type(held)(*token)
        place = type(held)(*(torch.empty_like(part) for part in token))
        clock = [time.perf_counter()]
        taken.taken_off(type(held)(*(part.float() for part in held)))
        clock.append(time.perf_counter())
        for there, part in zip(place, token, strict=True):
            there.copy_(part)
        clock.append(time.perf_counter())
        taken.take_off_into(place, pair)
        taken.corrected(attended, query, None, False)
        clock.append(time.perf_counter())
        for name, begin, end in zip(("subtracted", "copied", "offset"), clock, clock[1:], strict=False):
            times[name].append(end - begin)
    microseconds = {name: 1e6 * statistics.median(found) for name, found in times.items()}
    return {
        "step_off_us": microseconds["off"],
        "step_on_us": microseconds["on"],
        "added_us": microseconds["offset"] - microseconds["copied"],
        "subtracting_the_window_us": microseconds["subtracted"],
        "backend": layers["on"].backend.name,
    }


def _reference(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of one new token in float64."""
    keys, values = (part.double().repeat_interleave(GROUPS, 1) for part in (keys, values))
    return torch.softmax(DIM**-0.5 * query.double() @ keys.transpose(-1, -2), -1) @ values


def _exact_error(mean: float) -> dict[str, float]:
    """Attention to at least 512 exact bfloat16 tokens around a mean, held as they are and without their
    offset: L2 error against float64 attention to the same tokens, over that output."""
    errors: dict[str, float] = {"mean_over_deviation": mean}
    true = _tokens(640, torch.float32, mean, 3)
    query = torch.randn(1, HEADS * GROUPS, 1, DIM, generator=torch.Generator().manual_seed(6))
    for mode in ("off", "on"):
        layer = CompressedLayer(
            CacheConfig(offsets=mode, residual_window=512, bits_k=8, bits_v=8, backend="torch")
        )
        step_tokens = [part.bfloat16() for part in true]
        layer.append(*(part[:, :, :639] for part in step_tokens))
        step = layer.append(*(part[:, :, 639:] for part in step_tokens))
        count = step.recent.keys.shape[2]
        only_exact = type(step)(step.serving, None, None, step.recent, 1, step.offsets)
        out = layer.attend(only_exact, query.bfloat16(), None, DIM**-0.5).out.double()
        exact = [part[:, :, -count:].bfloat16().double() for part in true]
        truth = _reference(query.bfloat16(), *exact)

        errors[mode] = float((out - truth).norm() / truth.norm())
    return errors


# --- bits


def bits() -> dict[str, Any]:
    """Section "bits"."""
    model, documents, calibration_ids = _demo()
    found = calibrate(model, calibration_ids, CacheConfig(), PREFILL, CHUNK)
    budgets = {
        name: found.all_in_bits(CacheConfig(), ((width, width),) * len(found.layers))
        for name, width in (("K2/V2", 2), ("K3/V3", 3), ("K4/V4", 4))
    }
    middle = {f"{low} and a half": budgets[f"K{low}/V{low}"] + 0.5 for low in (2, 3)}
    makers: list[CacheMaker] = [cache_maker(name, model) for name in budgets]
    makers.append(cache_maker("K4/V2", model))
    chosen = {}
    for name, budget in {"K3/V3": budgets["K3/V3"], **middle}.items():
        chosen[name] = found.layer_bits(CacheConfig(), budget)
        makers.append(cache_maker("K4/V4", model, label=f"{name}, first prefill", bits_budget=budget))
        makers.append(cache_maker("K4/V4", model, label=f"{name}, calibrated", layer_bits=chosen[name]))
    return {
        "budget_tokens": CacheConfig().budget_tokens,
        "budgets": {**budgets, **middle},
        "calibrated_bits": chosen,
        "calibration": [
            {"keys": dict(layer[1].keys), "values": dict(layer[1].values)} for layer in found.layers if layer
        ],
        "kl": _kl(model, documents, makers),
        **_about(),
    }


def halves() -> dict[str, Any]:
    """Section "halves": what half a bit more buys without a plan, on the documents of "bits"."""
    model, documents, _ = _demo()
    makers = [
        cache_maker("K4/V4", model, label=f"K{k}/V{v}", bits_k=k, bits_v=v)
        for k, v in ((3, 2), (2, 3), (4, 3), (3, 4))
    ]
    return {"kl": _kl(model, documents, makers), **_about()}


def _demo() -> tuple[Any, list[torch.Tensor], torch.Tensor]:
    """Model, documents to score, and other text to calibrate on."""
    model, tokenizer = load(torch.float32, torch.device("cpu"))
    ids = torch.tensor(tokenizer.encode(document()[-60_000:]))
    return model, split_documents(ids, TOKENS, DOCUMENTS), ids[-CALIBRATION_TOKENS:]


def _kl(model: Any, documents: list[torch.Tensor], makers: list[CacheMaker]) -> dict[str, Any]:
    reports = evaluate_quality(model, documents, makers, prefill_tokens=PREFILL, chunk_tokens=CHUNK)
    return {name: report.to_dict()["kl_mean"] for name, report in reports.items()}


def _about() -> dict[str, int]:
    return {"documents": DOCUMENTS, "tokens": TOKENS, "prefill_tokens": PREFILL, "chunk_tokens": CHUNK}


# --- balance


def balance() -> dict[str, Any]:
    """Section "balance"."""
    model, documents, calibration_ids = _demo()
    names = ("K2/V4", "K3/V4", "K4/V4")
    result: dict[str, Any] = {**_about(), "kl": {}}
    for called, net in (("plain", model), ("balanced", balanced(model, calibration_ids))):
        ids = calibration_ids[None]
        with torch.inference_mode():
            expected, got = (one(ids, use_cache=False).logits for one in (model, net))
        difference = float((expected - got).abs().max() / expected.abs().max())
        assert difference < 1e-4, difference
        makers = [
            cache_maker("K4/V4", net, label=f"{name} offsets={mode}", bits_k=int(name[1]), offsets=mode)
            for name in names
            for mode in ("off", "on")
        ]
        result["kl"][called] = _kl(net, documents, makers)
    return result


def balanced(model: Any, ids: torch.Tensor) -> Any:
    """A copy whose keys and queries have s and 1 / s in each RoPE pair, s^4 = mean q^2 / mean k^2 of the
    pair: the least product of the two energies, which is what the variance of a logit's error goes by."""
    net = copy.deepcopy(model)
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def note(index: int, name: str) -> Any:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            seen.setdefault(index, {})[name] = output[0].square().mean(0)

        return hook

    hooks = []
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        hooks += [attention.q_proj.register_forward_hook(note(index, "q"))]
        hooks += [attention.k_proj.register_forward_hook(note(index, "k"))]
    with torch.inference_mode():
        model(ids[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    dim = model.config.head_dim
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    with torch.no_grad():
        for index, layer in enumerate(net.model.layers):
            # energies per KV head and RoPE pair (j, j + dim / 2)
            energy_k = seen[index]["k"].view(-1, 2, dim // 2).sum(1)
            energy_q = seen[index]["q"].view(-1, groups, 2, dim // 2).sum((1, 2))
            scale = (energy_q / energy_k).sqrt().sqrt().repeat(1, 2)
            layer.self_attn.k_proj.weight.mul_(scale.reshape(-1, 1))
            layer.self_attn.q_proj.weight.div_(scale.repeat_interleave(groups, 0).reshape(-1, 1))
    return net


SECTIONS = {"offsets": offsets, "bits": bits, "halves": halves, "balance": balance}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
