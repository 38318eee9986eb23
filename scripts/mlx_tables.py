"""The tables of docs/mlx.md, from benchmarks/results/mlx.json."""

from __future__ import annotations

from pathlib import Path

from results import read

__all__ = ["memory_table", "quality_table", "speed_table"]


def speed_table(root: Path) -> str:
    """Milliseconds per decoded token of the embedded model."""
    lengths = read(root, "mlx")["speed"]["lengths"]
    names = list(next(iter(lengths.values()))["ms_per_token"])
    names.sort(key=lambda name: (name.startswith("K") and "/" in name, name.startswith("q")))
    lines = ["| tokens | " + " | ".join(names) + " |", "|---:|" + "---:|" * len(names)]
    for tokens, row in lengths.items():
        times = row["ms_per_token"]
        cells = [f"{times[name]:.0f} ms" for name in names]
        lines.append(f"| {int(tokens)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_table(root: Path) -> str:
    """Bits per value of filled caches, by `nbytes` and by MLX's allocator."""
    memory = read(root, "mlx")["memory"]
    lines = [f"| cache, {memory['tokens']} tokens | `nbytes` | bits per value |", "|---|---:|---:|"]
    for name, row in memory["caches"].items():
        lines.append(f"| {name} | {row['nbytes'] / 2**20:.2f} MiB | {row['bits_per_value']:.3f} |")
    return "\n".join(lines)


def quality_table(root: Path) -> str:
    """Mean KL beside torch, and retrieval."""
    result = read(root, "mlx")
    lines = ["| cache | mean KL here | mean KL with torch | ratio |", "|---|---:|---:|---:|"]
    for name, row in result["kl"]["caches"].items():
        lines.append(f"| {name} | {row['mlx_kl']:.5f} | {row['torch_kl']:.5f} | {row['ratio']:.3f} |")
    found = result["retrieval"]
    lines += [
        "",
        f"Retrieval with {found['label']} in documents of {found['tokens']} tokens: {found['right']} of "
        f"{found['questions']} codes right.",
    ]
    return "\n".join(lines)
