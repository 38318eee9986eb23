"""The README's table of attention on codes, from the results that docs/performance-*.md show whole."""

from __future__ import annotations

from pathlib import Path

from results import read

__all__ = ["short_table"]

ON_GPU = ((1, 4096), (1, 32768), (1, 131072), (8, 32768), (8, 131072))
ON_CPU = ("4096", "32768", "131072")
PAIRS = ("K4/V2", "K4/V4")


def short_table(root: Path) -> str:
    """Times of one layer's decode step on a GPU and on a CPU, and ratios to the fastest uncompressed one."""
    gpu, cpu = (read(root, name) for name in ("gpu_attention", "cpu_attention"))
    lines = [
        f"| batch, tokens | fastest uncompressed | tqai {' | tqai '.join(PAIRS)} |",
        "|---|---|" + "---|" * len(PAIRS),
    ]
    gpu_name = gpu["where"]["gpu"].removeprefix("NVIDIA ")
    for batch, tokens in ON_GPU:
        rows = [row for row in gpu["rows"] if (row["batch"], row["tokens"]) == (batch, tokens)]
        (base,) = (row for row in rows if row["backend"].startswith("torch"))
        cells = [f"{gpu_name}: {batch}, {tokens // 1024}k", f"{base['graph_us']:.1f} us"]
        for pair in PAIRS:
            (row,) = (row for row in rows if pair == f"K{row.get('bits_k')}/V{row.get('bits_v')}")
            cells.append(f"{row['graph_us']:.1f} us ({base['graph_us'] / row['graph_us']:.1f}x)")
        lines.append(f"| {' | '.join(cells)} |")
    for name in ON_CPU:
        timed = cpu["lengths"][name]
        fastest = min(row["median_ms"] for path, row in timed.items() if path.startswith("torch"))
        cells = [f"CPU: 1, {int(name) // 1024}k", f"{fastest:.2f} ms"]
        for pair in PAIRS:
            ours = timed[f"native avx512 {pair}"]["median_ms"]
            cells.append(f"{ours:.2f} ms ({fastest / ours:.1f}x)")
        lines.append(f"| {' | '.join(cells)} |")
    machine = cpu["machine"]
    lines += [
        "",
        "One new token, one layer: 32 query heads, 8 KV heads, head size 128. "
        f"{gpu_name}: bfloat16, CUDA graph replays, against the fastest of the attention kernels of torch "
        f"{gpu['where']['versions']['torch']}. CPU: {machine['cpu']}, {machine['threads']} threads, AVX-512, "
        f"against the fastest formulation of torch {cpu['versions']['torch']} in float32 or bfloat16. Errors "
        "against attention to decoded codes are in [docs/performance-gpu.md](docs/performance-gpu.md) and "
        "[docs/performance-cpu.md](docs/performance-cpu.md).",
    ]
    return "\n".join(lines)
