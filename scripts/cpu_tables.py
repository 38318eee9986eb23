"""Tables of attention on the CPU for `generate_docs.py`, from benchmarks/results/cpu_attention*.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from results import read_if_there

__all__ = ["attention_table", "second_machine_table", "targets_table"]

AIMS = (
    ("avx512 K4/V4", "32768", 8.0),
    ("avx512 K4/V2", "32768", 10.0),
    ("avx512 K4/V4", "4096", 3.0),
    ("avx512 K4/V2", "4096", 3.0),
    ("avx2 K4/V4", "32768", 4.0),
    ("avx2 K4/V2", "32768", 4.0),
)
"""How many times faster than torch an instruction set and pair of bits is meant to be at so many tokens."""


def attention_table(root: Path, name: str = "cpu_attention") -> str:
    """Time of one step of attention on the CPU, packed codes against the fastest torch formulation."""
    result = read_if_there(root, name)
    if result is None:
        return "No result is committed yet; `python benchmarks/cpu_attention.py` writes it."
    paths = [f"{isa} {bits}" for isa in ("avx512", "avx2") for bits in ("K4/V4", "K4/V2", "K3/V3")]
    paths = [path for path in paths if all(f"native {path}" in rows for rows in result["lengths"].values())]
    lines = [
        "| tokens | fastest torch | " + " | ".join(paths) + " |",
        "|---|---|" + "---|" * len(paths),
    ]
    for tokens, rows in result["lengths"].items():
        fastest = _fastest_torch(rows)
        cells = [f"{rows[fastest]['median_ms']:.2f} ({fastest.removeprefix('torch ')})"]
        for path in paths:
            row = rows[f"native {path}"]
            cells.append(f"{row['median_ms']:.2f} ({row['times_faster_than_fastest_torch']:.1f}x)")
        lines.append(f"| {tokens} | {' | '.join(cells)} |")
    worst = max(
        row["relative_error"]
        for rows in result["lengths"].values()
        for path, row in rows.items()
        if path.startswith("native")
    )
    machine, read = result["machine"], result["read_bytes_per_s"] / 1e9
    lines += [
        "",
        f"Median milliseconds, and how many times faster than the fastest torch formulation of the same run. "
        f"Largest relative L2 error of a packed path: {worst:.0e}. {machine['cpu']}, {machine['threads']} "
        f"threads, torch {result['versions']['torch']}; memory reads at {read:.1f} GB/s in the same run.",
    ]
    return "\n".join(lines)


def second_machine_table(root: Path) -> str:
    """The same on two cores of another CPU."""
    return attention_table(root, "cpu_attention_emeraldrapids")


def targets_table(root: Path) -> str:
    """What is aimed at, what is reached, and what computing alone would allow, codes in the caches."""
    result = read_if_there(root, "cpu_attention")
    if result is None:
        return "No result is committed yet; `python benchmarks/cpu_attention.py` writes it."
    lines = ["| | tokens | aimed at | reached | computing alone |", "|---|---|---|---|---|"]
    for path, tokens, aim in AIMS:
        rows = result["lengths"][tokens]
        row = rows[f"native {path}"]
        alone = rows[_fastest_torch(rows)]["median_ms"] / row["compute_ms"]
        reached = row["times_faster_than_fastest_torch"]
        lines.append(f"| {path}, times torch's speed | {tokens} | {aim:.0f} | {reached:.1f} | {alone:.1f} |")
    rate = max(result["read_bytes_per_s"], result["read_bytes_per_s_at_the_end"])
    for path in ("avx512 K4/V4", "avx512 K4/V2"):
        row = result["lengths"]["131072"][f"native {path}"]
        read_ms = row["bytes_held"] / rate * 1e3
        summed_ms = row["median_ms"] / row["of_the_time_to_read_its_bytes"]
        for what, aim, base in (
            (f"of the time to read its bytes at {rate / 1e9:.0f} GB/s", "at most 2", read_ms),
            ("of the time in which torch adds them up, in large pages", "-", summed_ms),
        ):
            reached, alone = (row[name] / base for name in ("median_ms", "compute_ms"))
            lines.append(f"| {path}, {what} | 131072 | {aim} | {reached:.2f} | {alone:.2f} |")
    return "\n".join(lines)


def _fastest_torch(rows: dict[str, Any]) -> str:
    of_torch = [name for name in rows if name.startswith("torch")]
    return min(of_torch, key=lambda name: float(rows[name]["median_ms"]))
