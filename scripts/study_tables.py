"""Tables of docs/quality.md for `generate_docs.py`, from benchmarks/results/quality.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from results import read

__all__ = ["copies_table", "kl_tables", "peers_table", "retrieval_table", "short_table", "targets_table"]


def kl_tables(root: Path) -> str:
    """Mean KL of every cache, one table per model, one column per copy."""
    result = read(root, "quality")
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


def short_table(root: Path) -> str:
    """For the README: presets and peers, as trained and on the worst of the hard copies."""
    result = read(root, "quality")
    models = result["study"]["models"]
    lines = [f"| cache | bits | {' | '.join(models)} | worst hard copy |", "|---" * (3 + len(models)) + "|"]
    specs = ("small", "balanced", "quality", "quanto-2", "quanto-4", "hqq-4", "fp8")
    for spec in specs:
        plain = [result["quality"][model]["plain"].get(spec) for model in models]
        hard = [
            rows[spec]["kl_mean"]["value"]
            for model in models
            for copy, rows in result["quality"][model].items()
            if copy != "plain" and spec in rows
        ]
        if any(plain):
            bits = [row["bits_per_value"] for row in plain if row]
            span = f"{min(bits):.2f}" + (f" to {max(bits):.2f}" if max(bits) - min(bits) > 0.01 else "")
            cells = [f"{row['kl_mean']['value']:.5f}" if row else "" for row in plain]
            worst = f"{max(hard):.3g}" if hard else ""
            lines.append(f"| {spec} | {span} | {' | '.join(cells)} | {worst} |")
    return "\n".join(lines)


def copies_table(root: Path) -> str:
    """How exactly each copy equals its original, and how far the original is from the trained model."""
    result = read(root, "quality")
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
    for row in sorted(
        read(root, "quality")["retrieval"], key=lambda row: (row["cache"], row["model"], row["copy"])
    ):
        found = " | ".join(
            f"{row[kind]['correct']}/{row[kind]['questions']}" for kind in ("single", "multi", "lookup")
        )
        lines.append(f"| {_name(row['cache'])} | {row['model']} | {row['copy']} | {found} |")
    return "\n".join(lines)


def targets_table(root: Path) -> str:
    """The targets: one line per size and model, one column per copy, with our best cache within the bits."""
    result = read(root, "quality")
    copies = result["study"]["copies"]
    lines = [
        f"| at most | KL at most | model | cache | bits | {' | '.join(copies)} |",
        "|---" * (5 + len(copies)) + "|",
    ]
    for bits in sorted({row["bits"] for row in result["targets"]}, reverse=True):
        for model in result["study"]["models"]:
            rows = [row for row in result["targets"] if (row["bits"], row["model"]) == (bits, model)]
            for cache in dict.fromkeys(row["cache"] for row in rows):
                of_copy = {row["copy"]: row for row in rows if row["cache"] == cache}
                first = next(iter(of_copy.values()))
                cells = [_target(of_copy.get(copy)) for copy in copies]
                held = f"{first['bits_per_value']:.2f}"
                words = [bits, first["limit"], model, _name(cache), held, *cells]
                lines.append(f"| {' | '.join(map(str, words))} |")
    return "\n".join(lines)


def peers_table(root: Path) -> str:
    """Each peer against our best cache of no more bits, over the documents that both read: its KL / ours."""
    result = read(root, "quality")
    copies = result["study"]["copies"]
    lines = [f"| peer | bits | model | {' | '.join(copies)} |", "|---" * (3 + len(copies)) + "|"]
    for peer in dict.fromkeys(row["peer"] for row in sorted(result["peers"], key=lambda row: row["peer"])):
        for model in result["study"]["models"]:
            rows = {
                row["copy"]: row for row in result["peers"] if (row["peer"], row["model"]) == (peer, model)
            }
            if rows:
                cells = [_against(rows.get(copy)) for copy in copies]
                bits = next(iter(rows.values()))["peer_bits"]
                lines.append(f"| {peer} | {bits:.2f} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _target(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['kl']:.5f}" if row["reached"] else f"**{row['kl']:.5f} missed**"


def _against(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["cache"] is None:
        return f"{row['peer_kl']:.4f} / none so small"
    ours = f"{row['kl']:.4f}"
    return f"{row['peer_kl']:.4f} / {ours if row['below'] else f'**{ours}**'}"


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
