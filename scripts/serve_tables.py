"""Tables of the server's figures for `generate_docs.py`, from benchmarks/results/serve_{cpu,gpu}.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from results import read

__all__ = ["cpu_load_table", "first_token_table", "gap_table", "gpu_load_table", "steps_table"]

GIB = 2**30


def steps_table(root: Path) -> str:
    """A decode step over synthetic contexts of 32k tokens."""
    steps = read(root, "serve_gpu")["steps"]
    base = next(row for row in steps["rows"] if row["kind"] == "uncompressed")
    lines = [
        "| | contexts | step, ms | its graph alone, ms | tokens/s | pages, GiB | against (a) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in [*steps["rows"], steps["pool"]["K4/V2"]]:
        names = {"DynamicCache": "transformers' DynamicCache", "uncompressed": "(a) tqai, uncompressed"}
        graph = f"{row['graph_ms']:.1f}" if "graph_ms" in row else "-"
        held = row["used_pages"] * row["page_bytes"] if "used_pages" in row else row["held_bytes"]
        lines.append(
            f"| {names.get(row['kind'], '(b) tqai, ' + row['kind'])} | {row['contexts']} "
            f"| {row['step_ms']:.1f} | {graph} | {row['tokens_per_s']:.0f} | {held / GIB:.2f} "
            f"| {row['tokens_per_s'] / base['tokens_per_s']:.2f} |"
        )
    return "\n".join(lines)


def first_token_table(root: Path) -> str:
    """Time to the first token of a prompt that is alone."""
    rows = read(root, "serve_gpu")["first"]["first"]
    found: dict[tuple[str, Any], dict[int, float]] = {}
    for row in rows:
        key = (row["kind"], row.get("chunk_tokens"))
        found.setdefault(key, {})[row["prompt_tokens"]] = row["first_token_ms"]
    lines = ["| ms to the first token | chunks of | 8k | 32k |", "|---|---|---|---|"]
    for (kind, chunk), times in sorted(found.items(), key=lambda item: (item[0][1] or 0, item[0][0])):
        chunk_text = "whole prompt" if chunk is None else chunk
        shown = " | ".join(f"{times[n]:.0f}" if n in times else "-" for n in (8192, 32768))
        lines.append(f"| {kind} | {chunk_text} | {shown} |")
    return "\n".join(lines)


def gap_table(root: Path) -> str:
    """Gaps between tokens while a prompt of 32k tokens joins."""
    lines = [
        "| gaps, ms | chunks of | before | p50 | p99 | largest |",
        "|---|---|---|---|---|---|",
    ]
    for row in read(root, "serve_gpu")["first"]["gaps"]:
        times = " | ".join(f"{row[name]:.0f}" for name in ("calm_gap_ms", "p50_gap_ms", "p99_gap_ms"))
        lines.append(f"| {row['kind']} | {row['chunk_tokens']} | {times} | {row['largest_gap_ms']:.0f} |")
    return "\n".join(lines)


def gpu_load_table(root: Path) -> str:
    """The open-loop client against three servers on a GPU."""
    return _load(read(root, "serve_gpu")["load"])


def cpu_load_table(root: Path) -> str:
    """The same on a CPU."""
    return _load(read(root, "serve_cpu")["rows"])


def _load(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| prompts | | requests/s | tokens/s | first token, ms: p50, p99 | later tokens, ms: p50, p99 |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["prompt_tokens"]):
        first, later = (
            ", ".join(f"{row[name][at]:.{digits}f}" for at in ("p50", "p99"))
            for name, digits in (("first_token_ms", 0), ("per_token_ms", 1))
        )
        lines.append(
            f"| {row['requests']} of {row['prompt_tokens']:,} | {_named(row['server'])} "
            f"| {row['requests_per_second']:.2f} | {row['output_tokens_per_second']:.1f} "
            f"| {first} | {later} |"
        )
    return "\n".join(lines)


def _named(server: str) -> str:
    return server.replace("serve continuous", "serve --continuous-batching")
