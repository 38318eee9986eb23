"""Tables of docs/cache-options.md for `generate_docs.py`, from benchmarks/results/cache_options.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from results import read

__all__ = ["balance_table", "bits_table", "offsets_error_table", "offsets_time_table"]


def offsets_time_table(root: Path) -> str:
    """What a decode step pays per layer."""
    result = read(root, "cache_options")["offsets"]
    lines = [
        "| model | step without offsets | offsets add | subtracting from the window at every step would |",
        "|---|---|---|---|",
    ]
    for dtype, row in result["dtypes"].items():
        lines.append(
            f"| {dtype} | {row['step_off_us']:.0f} us | {row['added_us']:.0f} us "
            f"| {row['subtracting_the_window_us']:.0f} us |"
        )
    lines += [
        "",
        f"One layer, one new token, {result['heads']} KV heads, "
        f"{result['query_heads']} query heads, head_dim {result['head_dim']}, {result['tokens']} tokens, of "
        f"which {result['residual_window']} to {result['residual_window'] + 63} exact; medians of "
        f"{result['steps']} interleaved steps on one core, backend native. {_machine(result)}",
    ]
    return "\n".join(lines)


def offsets_error_table(root: Path) -> str:
    """What holding bfloat16 tokens without their offset does to attention over them."""
    result = read(root, "cache_options")["offsets"]
    lines = ["| mean, in deviations | held as they are | held without offset |", "|---|---|---|"]
    for row in result["exact_tokens"]:
        lines.append(f"| {row['mean_over_deviation']:g} | {row['off']:.4f} | {row['on']:.4f} |")
    return "\n".join(lines)


def bits_table(root: Path) -> str:
    """KL at equal budgets: the same bits everywhere, the first prefill's, a calibration's."""
    found = read(root, "cache_options")
    result, halves = found["bits"], found["halves"]
    budgets = result["budgets"]
    kl = {**result["kl"], **halves["kl"]}

    def cell(*names: str) -> str:
        name = min(names, key=lambda one: kl[one]["value"])
        bits = f"{name} " if name in halves["kl"] or name in ("K2/V2", "K3/V3", "K4/V4") else ""
        return f"{bits}{kl[name]['value']:.4f}"

    rows = (
        ("K2/V2", ("K2/V2",), None),
        ("2 and a half", ("K3/V2", "K2/V3"), "2 and a half"),
        ("K3/V3", ("K3/V3",), "K3/V3"),
        ("3 and a half", ("K4/V3", "K3/V4"), "3 and a half"),
        ("K4/V4", ("K4/V4",), None),
    )
    lines = [
        "| bits per value, all-in | the same bits everywhere, the better | first prefill | calibration |",
        "|---|---|---|---|",
    ]
    for budget, uniform, label in rows:
        auto = [cell(f"{label}, {how}") for how in ("first prefill", "calibrated")] if label else ["-", "-"]
        lines.append(f"| {budgets[budget]:.2f} | {cell(*uniform)} | {auto[0]} | {auto[1]} |")
    lines += [
        "",
        f"KL in nats per token against the uncompressed embedded model, {result['documents']} documents of "
        f"{result['tokens']} tokens, prefill {result['prefill_tokens']}, chunks of {result['chunk_tokens']}; "
        f"calibrated on another part of the text; bits counted at {result['budget_tokens']} tokens of a "
        "float32 model. "
        f"{_machine(result)}",
    ]
    return "\n".join(lines)


def balance_table(root: Path) -> str:
    """KL with keys and queries balanced pair by pair."""
    result = read(root, "cache_options")["balance"]
    lines = ["| cache | plain | balanced |", "|---|---|---|"]
    for name, plain in result["kl"]["plain"].items():
        other = result["kl"]["balanced"][name]
        lines.append(f"| {name} | {plain['value']:.4f} | {other['value']:.4f} |")
    return "\n".join(lines)


def _machine(result: dict[str, Any]) -> str:
    made = result["provenance"]
    return f"{made['cpu']}, torch {made['versions']['torch']}; {made['date'][:10]}."
