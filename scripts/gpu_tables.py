"""Tables of the GPU's figures for `generate_docs.py`, from benchmarks/results/gpu_*.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from results import read

__all__ = [
    "attention_table",
    "eager_table",
    "encode_table",
    "floor_table",
    "generate_table",
    "roofline_table",
    "triton_table",
]

PAIRS = ((4, 2), (4, 4), (3, 3), (8, 8))


def attention_table(root: Path) -> str:
    """Graph replays of decode attention against the fastest torch SDPA."""
    return _attention(root, "graph")


def eager_table(root: Path) -> str:
    """The same, called one by one from Python."""
    return _attention(root, "eager")


def triton_table(root: Path) -> str:
    """Graph replays of decode attention by the Triton backend, in a run of its own."""
    return _attention(root, "graph", "gpu_attention_triton", "triton")


def roofline_table(root: Path) -> str:
    """The largest case against the rate at which torch's kernel reads."""
    result = read(root, "gpu_attention")
    rate = result["read_bytes_per_s"]
    lines = [
        f"| B8 128k | packed bytes | at {rate / 1e12:.2f} TB/s | measured | share of the rate |",
        "|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        row = _row(result, 8, 131072, pair)
        lines.append(
            f"| K{pair[0]}/V{pair[1]} | {row['packed_bytes'] / 1e6:.1f} MB "
            f"| {row['packed_bytes'] / rate * 1e6:.0f} us | {row['graph_us']:.1f} us "
            f"| {row['of_read_rate']:.0%} |"
        )
    return "\n".join(lines)


def floor_table(root: Path) -> str:
    """The least times of kernels that read the packed bytes, and what ratios they would be."""
    rows = read(root, "gpu_floor")["rows"]
    sizes = list(dict.fromkeys((row["batch"], row["tokens"]) for row in rows))
    lines = [
        "| us | " + " | ".join(f"B{batch} {tokens // 1024}k" for batch, tokens in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for bits_k, bits_v in dict.fromkeys((row["bits_k"], row["bits_v"]) for row in rows):
        mine = [row for row in rows if (row["bits_k"], row["bits_v"]) == (bits_k, bits_v)]
        for kind, name in (("floor_us", "read"), ("merged_floor_us", "read and merged")):
            cells = (f"{row[kind]:.1f} ({row['sdpa_us'] / row[kind]:.1f})" for row in mine)
            lines.append(f"| K{bits_k}/V{bits_v} {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def encode_table(root: Path) -> str:
    """Encoding, in bytes of input."""
    result = read(root, "gpu_encode")
    lines = [
        "| | us for 1.07 GB | input | share of the copy rate | general kernel, us |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| K{row['bits_k']}/V{row['bits_v']} | {row['graph_us']:.0f} "
            f"| {row['input_bytes_per_s'] / 1e12:.2f} TB/s | {row['of_copy_bandwidth']:.0%} "
            f"| {row['general_us']:.0f} |"
        )
    return "\n".join(lines)


def generate_table(root: Path) -> str:
    """Tokens per second of a model of 8 billion parameters."""
    result = read(root, "gpu_generate")
    lines = [
        "| batch, tokens | DynamicCache eager | StaticCache graph | K4/V2 eager | K4/V2 graph | K4/V4 graph "
        "| balanced graph | cache, GiB: bfloat16, K4/V2, balanced |",
        "|---|---|---|---|---|---|---|---|",
    ]
    sizes = list(dict.fromkeys((row["batch"], row["tokens"]) for row in result["rows"]))
    dynamic: dict[str, Any] = {}
    for batch, tokens in sizes:
        found = {
            (row["cache"], row["mode"]): row
            for row in result["rows"]
            if (row["batch"], row["tokens"]) == (batch, tokens)
        }
        if ("DynamicCache", "eager") in found:
            dynamic = found["DynamicCache", "eager"]
            if ("K4/V2", "eager") not in found:
                continue  # a batch that DynamicCache alone was run at: its row comes with the next
        base = f"{dynamic['tokens_per_s']:.1f}"
        if dynamic["batch"] != batch:
            base += f" (batch {dynamic['batch']})"
        cells = []
        columns = (("StaticCache", "graph"), ("K4/V2", "eager"))
        columns += tuple((kind, "graph") for kind in ("K4/V2", "K4/V4", "balanced"))
        for key in columns:
            row = found.get(key)
            cells.append("-" if row is None else f"{row['tokens_per_s']:.1f}" + _times(row))
        held = dynamic["cache_bytes"] * batch / dynamic["batch"] / 2**30
        packed = [found[key]["cache_bytes"] for key in (columns[2], columns[4]) if key in found]
        shown = ", ".join(f"{size:.2f}" for size in (held, *(size / 2**30 for size in packed)))
        lines.append(f"| {batch}, {tokens // 1024}k | {base} | {' | '.join(cells)} | {shown} |")
    return "\n".join(lines)


def _times(row: dict[str, Any]) -> str:
    return f" ({row['speedup']:.2f}x)" if "speedup" in row else ""


def _attention(root: Path, mode: str, name: str = "gpu_attention", backend: str = "cuda") -> str:
    result = read(root, name)
    fastest = [row for row in result["rows"] if row["backend"].startswith("torch")]
    names = [f"B{row['batch']} {row['tokens'] // 1024}k" for row in fastest]
    lines = [
        "| us | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
        "| torch SDPA, bfloat16 | " + " | ".join(f"{row[f'{mode}_us']:.1f}" for row in fastest) + " |",
    ]
    for pair in PAIRS:
        cells = []
        for base in fastest:
            row = _row(result, base["batch"], base["tokens"], pair, backend)
            cells.append(f"{row[f'{mode}_us']:.1f} ({row[f'speedup_{mode}']:.2f})")
        lines.append(f"| K{pair[0]}/V{pair[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _row(
    result: dict[str, Any], batch: int, tokens: int, pair: tuple[int, int], backend: str = "cuda"
) -> dict[str, Any]:
    wanted = {"backend": backend, "batch": batch, "tokens": tokens, "bits_k": pair[0], "bits_v": pair[1]}
    found: dict[str, Any] = next(
        row for row in result["rows"] if all(row.get(name) == value for name, value in wanted.items())
    )
    return found
