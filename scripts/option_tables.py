"""Generated tables of docs/quality-options.md, from benchmarks/results/*.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from results import read_if_there

__all__ = ["activations_table", "qjl_table", "solvers_table"]

MIB = 2.0**20


def qjl_table(root: Path) -> str:
    """KL of the embedded model with sketches of several sizes."""
    result = read_if_there(root, "qjl")
    if result is None:
        return "No result is committed yet; `python benchmarks/qjl.py` writes it."
    lines = [
        "| cache | bits per value | KL, nats per token | times K4/V4 | same likeliest token |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"| {name} | {row['bits_per_value']:.2f} | {row['kl_mean']['value']:.5f} | {row['kl_ratio']:.2f} "
            f"| {row['top1_agreement']['value']:.1%} |"
        )
    settings = result["settings"]
    lines += [
        "",
        f"Embedded model, {settings['documents']} held-out documents of {settings['tokens']} tokens, the "
        f"first {settings['prefill_tokens']} as prefill, then chunks of {settings['chunk_tokens']} that read "
        f"the cache; bits count everything held. {_where(result)}",
    ]
    return "\n".join(lines)


def solvers_table(root: Path) -> str:
    """What each solver and objective gains over Lloyd-Max."""
    result = read_if_there(root, "solvers")
    if result is None:
        return "No result is committed yet; `python benchmarks/solvers.py` writes it."
    lines = [
        "| bits | solver | objective | squared error | 1 - cosine | attention, seen | attention, unseen |",
        "|---|---|---|---|---|---|---|",
    ]
    base: dict[str, Any] = {}
    for row in result["rows"]:
        if row["solver"] == "lloyd_max":
            base = row
            cells = [f"{row[key]:.5f}" for key in ("mse", "cosine", "attention_seen", "attention_unseen")]
        else:
            cells = [f"{row[key] / base[key] - 1:+.2%}" for key in ("mse", "cosine", "attention_seen")]
            cells.append(f"{-row['attention_gain']:+.2%} ± {2 * row['attention_gain_error']:.2%}")
        lines.append(f"| {row['bits']} | {row['solver']} | {row['objective']} | {' | '.join(cells)} |")
    lines += [
        "",
        f"head_dim {result['head_dim']}; rows below lloyd_max are relative to it, less is better. Attention "
        f"is the KL divergence of softmax with coded keys on Gaussian samples: the sample that was optimized "
        f"for, and 40 others (± two standard errors). {result['date'][:10]}.",
    ]
    return "\n".join(lines)


def activations_table(root: Path) -> str:
    """Memory, time and loss of fine-tuning with packed activations."""
    result = read_if_there(root, "activations")
    if result is None:
        return "No result is committed yet; `python benchmarks/activations.py` writes it."
    variants, settings = result["variants"], result["settings"]
    plain = variants["plain"]
    steps = len(plain["losses"])
    shown = sorted({0, steps // 4, steps // 2, 3 * steps // 4, steps - 1})
    lines = [
        "| saved tensors | held for backward | peak above the start | time of a step | "
        + " | ".join(f"loss {step + 1}" for step in shown)
        + " |",
        "|---|---|---|---|" + "---|" * len(shown),
    ]
    for name, row in variants.items():
        called = "exact" if name == "plain" else f"{name} bits"
        cells = [
            f"{row['saved_for_backward_bytes'] / MIB:.0f} MiB",
            f"{row['peak_bytes'] / MIB:.0f} MiB",
            f"{row['step_cpu_seconds'] / plain['step_cpu_seconds']:.2f}x",
            *(f"{row['losses'][step]:.4f}" for step in shown),
        ]
        lines.append(f"| {called} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Embedded model in float32, AdamW, batches of {settings['batch']} x {settings['tokens']} tokens. "
        f"Held for backward: growth of the process over a forward pass, the logits and loss included, which "
        f"stay exact. Time: processor time, one thread; exact takes {plain['step_cpu_seconds']:.1f} s. "
        f"{_where(result)}",
    ]
    return "\n".join(lines)


def _where(result: dict[str, Any]) -> str:
    return f"{result['cpu']}; torch {result['versions']['torch']}; {result['date'][:10]}."
