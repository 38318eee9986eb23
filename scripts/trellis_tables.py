"""Table of trellis codes on the GPU for `generate_docs.py`, from benchmarks/results/gpu_trellis.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["gpu_attention_table"]


def gpu_attention_table(root: Path) -> str:
    """Microseconds of attention by codec and bits, against SDPA and against scalar codes of the same bits."""
    text = (root / "benchmarks" / "results" / "gpu_trellis.json").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)["attention"]
    sizes = list(dict.fromkeys((row["batch"], row["tokens"]) for row in rows))
    lines = [
        "| us | " + " | ".join(f"B{batch} {tokens // 1024}k" for batch, tokens in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for codec, bits in dict.fromkeys((row["codec"], row.get("bits")) for row in rows):
        cells = []
        for batch, tokens in sizes:
            row = next(
                row
                for row in rows
                if (row["codec"], row.get("bits"), row["batch"], row["tokens"])
                == (codec, bits, batch, tokens)
            )
            cell = f"{row['graph_us']:.1f}"
            if bits is not None:
                cell += f" ({row['speedup']:.2f}"
                cell += ")" if codec == "scalar" else f"; {row['of_scalar']:.2f})"
            cells.append(cell)
        name = codec if bits is None else f"{codec}, {bits} bits"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
