"""What each choice of a compressed cache costs, simulated: windows, widths, scales, layers, transforms.

    python benchmarks/quality_choices.py --device cuda --workers 4       two minutes on one large GPU
    python benchmarks/quality_choices.py --quick                         a few choices, one short document

The same models, documents and measure as `quality.py`, with `simulated_cache.py` in the place of real caches.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from provenance import ROOT, provenance
from simulated_cache import Choice, moments_of, simulated_cache

RESULT = ROOT / "benchmarks" / "results" / "quality_choices.json"
LAYERS = {"demo": 6, "llama-7m": 8, "qwen2-6m": 6}
BASE = Choice("K3/V3")
PREFILL_TOKENS = 512
CHUNK_TOKENS = 32
DOCUMENTS = 8
BITS_TOKENS = 8128  # the middle of the lengths at which quality.py counts


def choices() -> list[tuple[str, Choice]]:
    """(copy, choice) of everything but the layers."""
    found = [BASE]
    for bits in (2, 3, 4):
        for scale in ("log8", "log8 fine"):
            found.append(
                replace(BASE, name=f"K{bits}/V{bits} {scale}", bits_k=bits, bits_v=bits, scale=scale)
            )
    for key, value in ((2, 2), (4, 4), (2, 3), (3, 2), (3, 4), (4, 2), (4, 3)):
        found.append(replace(BASE, name=f"K{key}/V{value}", bits_k=key, bits_v=value))
    found += [replace(BASE, name=f"window {n}", window=n) for n in (0, 32, 64, 96, 192, 256)]
    for window, young in ((0, 128), (64, 64), (64, 128), (64, 192)):
        name = f"window {window}, then {young} of 8 bits"
        found.append(replace(BASE, name=name, window=window, young=young))
    found.append(replace(BASE, name="window 64, then 128 of 6 bits", window=64, young=128, young_bits=6))
    found += [replace(BASE, name=f"sinks {n}", sinks=n) for n in (0, 1, 16, 64)]
    found += [replace(BASE, name=f"seed {n}", seed=n) for n in (1, 2)]
    for key in (2, 3, 4):
        found.append(
            replace(BASE, name=f"K{key}/V{key} trellis256", bits_k=key, bits_v=key, codec="trellis256")
        )
    found.append(replace(BASE, name="K3/V3 scalar", codec="scalar"))
    balanced = [
        replace(BASE, name=f"balance: {how}", balance=how) for how in ("pair", "pair, 2^n", "keys", "matrix")
    ]
    balanced.append(replace(BASE, name="balance of both: matrix", balance="matrix", balance_values="matrix"))
    found.append(replace(BASE, name="balance of values: matrix", balance_values="matrix"))
    return [("plain", choice) for choice in (*found, *balanced)] + [("pairs", c) for c in (BASE, *balanced)]


def tasks() -> list[tuple[str, str, Choice]]:
    """(model, copy, choice), with one layer's side changed at a time at the end."""
    found = [(model, *rest) for rest in choices() for model in LAYERS]
    for model, layers in LAYERS.items():
        for layer in range(layers):
            for side in ("bits_k", "bits_v"):
                for bits in (2, 4):
                    changed = tuple(bits if index == layer else 3 for index in range(layers))
                    choice = replace(BASE, name=f"layer {layer} {side} {bits}", **{side: changed})
                    found.append((model, "plain", choice))
    return found


@lru_cache(maxsize=8)
def _place(model: str, copy: str, device: str, documents: int, tokens: int) -> tuple[Any, ...]:
    from quality_tasks import _copied, _loaded
    from transformers import DynamicCache

    from tqai.evaluation import split_documents

    made, text = _copied(model, copy, device), _loaded(model, device)[2]
    prefix = torch.tensor(made.prefix, dtype=text.dtype)
    pieces = split_documents(text, tokens - len(prefix), DOCUMENTS)[:documents]
    ids = torch.stack([torch.cat([prefix, piece]) for piece in pieces]).to(device)
    reference = _logits(made.model, ids, DynamicCache(config=made.model.config))
    return made.model, ids, reference, moments_of(made.model, ids[:1, :PREFILL_TOKENS])


def _logits(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.inference_mode():
        model(input_ids=ids[:, :PREFILL_TOKENS], past_key_values=cache, use_cache=True, logits_to_keep=1)
        parts = [
            model(input_ids=ids[:, at : at + CHUNK_TOKENS], past_key_values=cache, use_cache=True).logits
            for at in range(PREFILL_TOKENS, ids.shape[1], CHUNK_TOKENS)
        ]
    return torch.cat(parts, 1).float()


def _kl(reference: torch.Tensor, got: torch.Tensor) -> list[float]:
    found = []
    for row, other in zip(reference, got, strict=True):
        one, two = torch.log_softmax(row, -1), torch.log_softmax(other, -1)
        found.append(float((one.exp() * (one - two)).sum(-1).double().mean()))
    return found


def _work(device: str, sizes: tuple[int, int], todo: list[Any], following: Any, out: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if device != "cpu":
        from quality_gpu import fast_trellis

        fast_trellis(device)
    while True:
        with following.get_lock():
            number = following.value
            following.value += 1
        if number >= len(todo):
            return
        name, copy, choice = todo[number]
        model, ids, reference, moments = _place(name, copy, device, *sizes)
        kl = _kl(reference, _logits(model, ids, simulated_cache(choice, model, moments)))
        bits = choice.all_in_bits(model.config, BITS_TOKENS)
        row = {"model": name, "copy": copy, "choice": asdict(choice), "bits_per_value": bits}
        out.put({**row, "kl_mean": sum(kl) / len(kl), "kl_by_document": kl})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few choices, nothing written")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--commit", help="where there is no git checkout")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    todo, sizes = tasks(), (DOCUMENTS, 2048)
    if arguments.quick:
        todo, sizes = [task for task in todo if task[0] == "qwen2-6m"][:4], (1, 768)
    context = multiprocessing.get_context("spawn")
    following, out = context.Value("i", 0), context.Queue()
    arguments_of_one = (arguments.device, sizes, todo, following, out)
    crew = [context.Process(target=_work, args=arguments_of_one) for _ in range(arguments.workers)]
    start = time.time()
    for worker in crew:
        worker.start()
    rows = []
    while len(rows) < len(todo) and any(worker.is_alive() for worker in crew):
        rows.append(out.get(timeout=3600))
        row = rows[-1]
        print(f"{row['model']:9} {row['copy']:6} {row['choice']['name']:32} {row['kl_mean']:.5f}", flush=True)
    for worker in crew:
        worker.join()
    if len(rows) < len(todo):
        return 1
    order = [(model, copy, choice.name) for model, copy, choice in todo]
    rows.sort(key=lambda row: order.index((row["model"], row["copy"], row["choice"]["name"])))
    print(f"{len(rows)} runs in {time.time() - start:.0f} s")
    if not arguments.quick:
        where = torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu"
        found = {**provenance(), "device": where}
        found["commit"] = arguments.commit or found["commit"]
        result = {"provenance": found, "documents": sizes[0], "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
