"""Does `generate` get faster on the CPU when the cache is compressed?

    python benchmarks/cpu_generate.py            about 6 minutes on two cores; writes the result
    python benchmarks/cpu_generate.py --quick    a smoke run, writes nothing

The embedded model (float32) continues a prompt of held-out text by 256 tokens with `model.generate`,
greedily, with transformers' DynamicCache and with compressed caches in turn, several rounds. Times
are taken where tokens reach a streamer, so they hold everything that generate does. Reported are the
time to the first token (prefill, including compression) and the median time of a later token, as
ratios to DynamicCache in the same round.

Correctness first: before anything is timed, the native kernels must give the logits of the torch
backend on the same codes, token by token, to 2e-3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from provenance import ROOT, provenance
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from tqai import CacheConfig, TurboQuantCache
from tqai.demo import load
from tqai.demo.retrieval import document

RESULT = ROOT / "benchmarks" / "results" / "cpu_generate.json"
PRESETS = ("K4/V2", "K4/V4")
PROMPT_TOKENS = (512, 2048, 8192)
NEW_TOKENS = 256
ROUNDS = 3
LOGITS_TOLERANCE = 2e-3
GATES = {(512, "tokens"): 0.95, (8192, "tokens"): 2.0}
PREFILL_GATE = 1.05


class Clock(BaseStreamer):
    """Notes when each token arrives; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate_times(model: Any, prompt: torch.Tensor, cache: Any, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and median seconds of a later one."""
    clock = Clock()
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        streamer=clock,
        pad_token_id=0,
        **settings,
    )
    gaps = [later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False)]
    return gaps[0], statistics.median(gaps[1:])


@torch.inference_mode()
def logits_error(model: Any, prompt: torch.Tensor, preset: str) -> float:
    """Largest relative L2 distance of a token's logits, native kernels against torch operations."""
    worst = 0.0
    caches = [
        TurboQuantCache(model, config=CacheConfig.preset(preset, backend=name))
        for name in ("native", "torch")
    ]
    for cache in caches:
        model(prompt[:, :-16], past_key_values=cache, logits_to_keep=1)
    for token in prompt[0, -16:]:
        found, wanted = (model(token.view(1, 1), past_key_values=cache).logits for cache in caches)
        worst = max(worst, float((found - wanted).norm() / wanted.norm()))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short prompts, one round, nothing written")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file")
    arguments = parser.parse_args()
    lengths = (512, 1024) if arguments.quick else PROMPT_TOKENS
    rounds, new_tokens = (1, 16) if arguments.quick else (ROUNDS, NEW_TOKENS)
    model, tokenizer = load()
    text = torch.tensor(tokenizer.encode(document()))[None]
    failures, rows = [], []
    errors = {preset: logits_error(model, text[:, : lengths[1]], preset) for preset in PRESETS}
    print("native against torch, relative L2 of logits:", {k: f"{v:.1e}" for k, v in errors.items()})
    if max(errors.values()) > LOGITS_TOLERANCE:
        print(f"FAILED: over {LOGITS_TOLERANCE}; nothing is timed")
        return 1
    generate_times(model, text[:, :512], DynamicCache(config=model.config), 8)
    for length in lengths:
        prompt = text[:, :length]
        makers = {"DynamicCache": lambda: DynamicCache(config=model.config)}
        for preset in PRESETS:
            makers[preset] = lambda preset=preset: TurboQuantCache(model, config=preset)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
        for _ in range(rounds):
            for name, make in makers.items():
                times[name].append(generate_times(model, prompt, make(), new_tokens))
        base = times["DynamicCache"]
        for name, measured in times.items():
            speedups = [b[1] / m[1] for b, m in zip(base, measured, strict=True)]
            prefill = [m[0] / b[0] for b, m in zip(base, measured, strict=True)]
            row = {
                "prompt_tokens": length,
                "new_tokens": new_tokens,
                "cache": name,
                "token_ms": 1e3 * statistics.median(m[1] for m in measured),
                "first_token_ms": 1e3 * statistics.median(m[0] for m in measured),
                "tokens_per_second_ratio": statistics.median(speedups),
                "prefill_time_ratio": statistics.median(prefill),
            }
            rows.append(row)
            print(
                f"{length:6} {name:14} {row['token_ms']:8.2f} ms/token "
                f"{row['tokens_per_second_ratio']:5.2f}x  "
                f"first token {row['first_token_ms']:8.0f} ms  {row['prefill_time_ratio']:5.3f}x"
            )
            if name != "DynamicCache":
                wanted = GATES.get((length, "tokens"), 0.0)
                if row["tokens_per_second_ratio"] < wanted:
                    failures.append(
                        f"{name} at {length}: {row['tokens_per_second_ratio']:.2f}x, wanted {wanted}x"
                    )
                if length == lengths[-1] and row["prefill_time_ratio"] > PREFILL_GATE:
                    failures.append(
                        f"{name} at {length}: prefill {row['prefill_time_ratio']:.3f}x, not {PREFILL_GATE}x"
                    )
    if not arguments.quick:
        result = {**provenance(), "logits_error": errors, "rows": rows, "failed_targets": failures}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for failure in failures:
        print("target missed:", failure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
