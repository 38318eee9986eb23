"""Tables of trellis codes for `generate_docs.py`, from benchmarks/results/{gpu_trellis,trellis}.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from results import read

__all__ = ["cpu_attention_table", "cpu_codes_table", "cpu_prefill_table", "gpu_attention_table"]


def gpu_attention_table(root: Path) -> str:
    """Microseconds of attention by codec and bits, against SDPA and against scalar codes of the same bits."""
    rows: list[dict[str, Any]] = read(root, "gpu_trellis")["attention"]
    sizes = list(dict.fromkeys((row["batch"], row["tokens"]) for row in rows))
    lines = [
        "| us | " + " | ".join(f"B{batch} {tokens // 1024}k" for batch, tokens in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for codec, bits in dict.fromkeys((row["codec"], row.get("bits")) for row in rows):
        cells = []
        for batch, tokens in sizes:
            key = codec, bits, batch, tokens
            found = [
                row for row in rows if (row["codec"], row.get("bits"), row["batch"], row["tokens"]) == key
            ]
            if not found:
                cells.append("-")
                continue
            row = found[0]
            cell = f"{row['graph_us']:.1f}"
            if bits is not None:
                cell += f" ({row['speedup']:.2f}"
                cell += ")" if codec == "scalar" or "of_scalar" not in row else f"; {row['of_scalar']:.2f})"
            cells.append(cell)
        name = codec if bits is None else f"{codec}, {bits} bits"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cpu_attention_table(root: Path) -> str:
    """Milliseconds of a step by instruction set, and speed against scalar codes of the same bits."""
    lines = [
        "| instruction set | tokens | query heads | bits | scalar, ms | trellis | trellis256 |",
        "|---|" + "---|" * 6,
    ]
    for name, rows in read(root, "trellis")["attention"].items():
        for row in rows:
            cells = [
                f"{row[f'{codec}_ms']:.2f} ({row[f'{codec}_speed']:.2f}x)"
                for codec in ("trellis", "trellis256")
            ]
            first = [
                name.removeprefix("native "),
                row["tokens"],
                row["query_heads"],
                row["bits"],
                f"{row['scalar_ms']:.2f}",
            ]
            lines.append("| " + " | ".join(map(str, [*first, *cells])) + " |")
    return "\n".join(lines)


def cpu_codes_table(root: Path) -> str:
    """Thousands of vectors of 128 that one core encodes and decodes a second."""
    result = read(root, "trellis")
    lines = ["| | codec | encode: 2, 3, 4 bits | decode: 2, 3, 4 bits |", "|---|---|---|---|"]
    for name, rows in result["codes"].items():
        for codec in dict.fromkeys(row["codec"] for row in rows):
            cells = [
                ", ".join(
                    f"{row[f'vectors_{what}_per_second'] / 1e3:,.1f}" for row in rows if row["codec"] == codec
                )
                for what in ("encoded", "decoded")
            ]
            lines.append(f"| {name} | {codec} | {cells[0]} | {cells[1]} |")
    about = result["provenance"]
    return "\n".join(
        [
            *lines,
            "",
            f"Thousands a second. {about['cpu']}, torch {about['versions']['torch']}; {about['date'][:10]}.",
        ]
    )


def cpu_prefill_table(root: Path) -> str:
    """Seconds in which the embedded model reads a prompt, by cache."""
    lines = [
        "| instruction set | tokens | uncompressed, s | scalar K3/V3 | trellis K3/V3 |",
        "|---|" + "---|" * 4,
    ]
    for name, row in read(root, "trellis")["prefill"].items():
        cells = [
            f"{row[f'{codec}_seconds']:.2f} ({row[f'{codec}_ratio']:.2f}x)" for codec in ("scalar", "trellis")
        ]
        first = [name.removeprefix("native "), str(row["tokens"]), f"{row['uncompressed_seconds']:.2f}"]
        lines.append("| " + " | ".join([*first, *cells]) + " |")
    return "\n".join(lines)
