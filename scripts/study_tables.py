"""Tables of docs/quality.md for `generate_docs.py`, from benchmarks/results/quality.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["copies_table", "kl_tables", "peers_table", "retrieval_table", "targets_table"]


def kl_tables(root: Path) -> str:
    """Mean KL of every cache, one table per model, one column per copy."""
    result = _result(root)
    lines: list[str] = []
    for model, copies in result["quality"].items():
        names = [copy for copy, rows in copies.items() if rows]
        specs = {spec: row for rows in copies.values() for spec, row in rows.items()}
        lines += [
            f"**{model}**",
            "",
            f"| cache | bits | {' | '.join(names)} |",
            "|---" * (2 + len(names)) + "|",
        ]
        for spec, row in sorted(specs.items(), key=lambda item: item[1]["bits_per_value"]):
            cells = [_cell(copies[copy].get(spec)) for copy in names]
            lines.append(f"| {_name(spec)} | {row['bits_per_value']:.2f} | {' | '.join(cells)} |")
        lines.append("")
    machines = "; ".join(dict.fromkeys(_machine(entry) for entry in result["provenance"]))
    study = result["study"]
    lines.append(
        f"Nats per token; in brackets the documents read, of {study['documents']} (more than one seed of the "
        f"rotation where it says so), then codes found of those asked for. Bits: mean over the lengths "
        f"{study['bits_tokens'] - 127} to {study['bits_tokens']}, bfloat16. {machines}."
    )
    return "\n".join(lines)


def copies_table(root: Path) -> str:
    """How exactly each copy equals its original, and how far the original is from the trained model."""
    result = _result(root)
    lines = [
        "| model | copy | logits differ by | original against trained model, KL | perplexity |",
        "|---|---|---|---|---|",
    ]
    for model, copies in result["copies"].items():
        for copy in result["study"]["copies"]:
            if copy not in copies or copy == "plain":
                continue
            row = copies[copy]
            lines.append(
                f"| {model} | {copy} | {row['relative_logit_difference']:.0e} | "
                f"{row['original_against_trained_kl']:.1e} | {row['perplexity']:.2f} "
                f"({row['trained_perplexity']:.2f}) |"
            )
    lines += [
        "",
        "Differences relative to the largest logit, in float32; perplexity of the trained model in brackets.",
    ]
    return "\n".join(lines)


def retrieval_table(root: Path) -> str:
    """Codes found, by kind."""
    lines = ["| cache | model | copy | single | multi | lookup |", "|---" * 6 + "|"]
    for row in sorted(_result(root)["retrieval"], key=lambda row: (row["cache"], row["model"], row["copy"])):
        found = " | ".join(
            f"{row[kind]['correct']}/{row[kind]['questions']}" for kind in ("single", "multi", "lookup")
        )
        lines.append(f"| {_name(row['cache'])} | {row['model']} | {row['copy']} | {found} |")
    return "\n".join(lines)


def targets_table(root: Path) -> str:
    """The targets, with the best of our caches within the bits."""
    lines = ["| at most | KL at most | model | copy | best | bits | KL | |", "|---" * 8 + "|"]
    for row in _result(root)["targets"]:
        lines.append(
            f"| {row['bits']} | {row['limit']} | {row['model']} | {row['copy']} | {_name(row['cache'])} | "
            f"{row['bits_per_value']:.2f} | {row['kl']:.4f} | {'reached' if row['reached'] else 'missed'} |"
        )
    return "\n".join(lines)


def peers_table(root: Path) -> str:
    """Each peer against our best cache of no more bits, over the documents that both read."""
    lines = ["| peer | bits | model | copy | its KL | ours | bits | KL |", "|---" * 8 + "|"]
    for row in sorted(_result(root)["peers"], key=lambda row: (row["peer"], row["model"])):
        ours = "none so small" if row["cache"] is None else _name(row["cache"])
        bits, kl = ("", "") if row["cache"] is None else (f"{row['bits_per_value']:.2f}", f"{row['kl']:.4f}")
        lines.append(
            f"| {row['peer']} | {row['peer_bits']:.2f} | {row['model']} | {row['copy']} "
            f"| {row['peer_kl']:.4f} | {ours} | {bits} | {kl} |"
        )
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    seeds = len(row["kl_by_seed"])
    notes = [f"{len(row['kl_by_document'])}" + (f", {seeds} seeds" if seeds > 1 else "")]
    cells = row.get("retrieval")
    if cells:
        notes.append(
            f"{sum(c['correct'] for c in cells.values())}/{sum(c['questions'] for c in cells.values())}"
        )
    return f"{row['kl_mean']['value']:.5f} ({'; '.join(notes)})"


def _name(spec: str) -> str:
    name, *settings = spec.split(",")
    words = [
        part.replace("codec=", "")
        .replace("scale_format=", "")
        .replace("window=", "window ")
        .replace("sinks=", "sinks ")
        for part in settings
    ]
    return " ".join([name, *words]).replace("offsets=auto", "offsets")


def _machine(entry: dict[str, Any]) -> str:
    where = entry["device"] if entry["device"] != "cpu" else entry["cpu"]
    return f"{where}, torch {entry['versions']['torch']}, backend {entry['backend']}"


def _result(root: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((root / "benchmarks" / "results" / "quality.json").read_text("utf-8"))
    return loaded
