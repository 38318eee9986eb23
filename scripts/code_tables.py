"""The table of docs/performance.md for `generate_docs.py`, from benchmarks/results/codes.json."""

from __future__ import annotations

from pathlib import Path

from results import read

__all__ = ["codes_table"]

DEVICES = ("cpu", "mlx", "cuda")
NAMES = {"torch cpu": "torch", "torch cuda": "torch", "core": "core (numpy)"}
BITS = (2, 3, 4, 8)


def codes_table(root: Path) -> str:
    """Vectors encoded and decoded per second, a line for every backend and codec."""
    result = read(root, "codes")
    lines = ["| on | backend | codec | encode: 2, 3, 4, 8 bits | decode: 2, 3, 4, 8 bits |", "|---" * 5 + "|"]
    machines = []
    for device in (name for name in DEVICES if name in result):
        about = result[device]["provenance"]
        where = about.get("gpu") or about["cpu"]
        machines.append(f"{where}, torch {about['versions']['torch']}")
        rows = result[device]["rows"]
        for backend, codec in dict.fromkeys((row["backend"], row["codec"]) for row in rows):
            of_both = {r["bits"]: r for r in rows if (r["backend"], r["codec"]) == (backend, codec)}
            if all("refused" in row for row in of_both.values()):
                continue
            cells = [
                ", ".join(_rate(of_both.get(bits, {}).get(f"vectors_{verb}_per_second")) for bits in BITS)
                for verb in ("encoded", "decoded")
            ]
            on = "GPU" if device == "cuda" else "CPU"
            lines.append(f"| {on} | {NAMES.get(backend, backend)} | {codec} | {cells[0]} | {cells[1]} |")
    told = "; ".join(dict.fromkeys(machines))
    return "\n".join([*lines, "", f"Thousands a second, head_dim 128; on a CPU one thread. {told}."])


def _rate(per_second: float | None) -> str:
    if per_second is None:
        return "-"
    thousands = per_second / 1e3
    return f"{thousands:,.0f}" if thousands >= 10 else f"{thousands:.1f}"
