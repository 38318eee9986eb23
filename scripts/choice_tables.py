"""Tables of docs/quality.md for `generate_docs.py`, from benchmarks/results/quality_choices.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from results import read

__all__ = ["balance_table", "choices_table", "layers_table"]

MODELS = ("demo", "llama-7m", "qwen2-6m")


def choices_table(root: Path) -> str:
    """Widths, scales, windows and so on, against K3/V3 with a window of 128."""
    result = read(root, "quality_choices")
    found = _by_name(result, "plain")
    names = [name for name in found if not name.startswith(("layer ", "balance"))]
    lines = [f"| choice | bits | {' | '.join(MODELS)} |", "|---" * (2 + len(MODELS)) + "|"]
    lines += [_line(name, found[name]) for name in names]
    return "\n".join([*lines, "", _note(result)])


def balance_table(root: Path) -> str:
    """Transforms of keys and values, on the models as trained and with scaled pairs."""
    result = read(root, "quality_choices")
    plain, pairs = _by_name(result, "plain"), _by_name(result, "pairs")
    head = [f"{model}, {copy}" for copy in ("plain", "pairs") for model in MODELS]
    lines = [f"| | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    for name in ("K3/V3", *(name for name in plain if name.startswith("balance"))):
        cells = [
            _kl(copy[name].get(model)) if name in copy else "" for copy in (plain, pairs) for model in MODELS
        ]
        lines.append(f"| {'none' if name == 'K3/V3' else name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _note(result)])


def layers_table(root: Path) -> str:
    """What 2 or 4 instead of 3 bits change, one layer and side at a time: the last layer, and all others."""
    found = _by_name(read(root, "quality_choices"), "plain")
    changes = [("bits_k", 2), ("bits_v", 2), ("bits_k", 4), ("bits_v", 4)]
    words = [f"{'K' if side == 'bits_k' else 'V'}{bits}" for side, bits in changes]
    lines = [f"| model | K3/V3 | layer | {' | '.join(words)} |", "|---" * (3 + len(words)) + "|"]
    for model in MODELS:
        base = found["K3/V3"][model]["kl_mean"]
        layers = 1 + max(
            int(name.split()[1]) for name in found if name.startswith("layer ") and model in found[name]
        )
        for layer in range(layers):
            cells = [
                f"{found[f'layer {layer} {side} {bits}'][model]['kl_mean'] - base:+.5f}"
                for side, bits in changes
            ]
            name = f"{layer}, the last" if layer == layers - 1 else str(layer)
            lines.append(f"| {model} | {base:.5f} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_name(result: dict[str, Any], copy: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        if row["copy"] == copy:
            found.setdefault(row["choice"]["name"], {})[row["model"]] = row
    return found


def _line(name: str, rows: dict[str, Any]) -> str:
    cells = [_kl(rows.get(model)) for model in MODELS]
    return f"| {name} | {rows[MODELS[0]]['bits_per_value']:.2f} | {' | '.join(cells)} |"


def _kl(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['kl_mean']:.5f}"


def _note(result: dict[str, Any]) -> str:
    where = result["provenance"]
    return (
        f"Simulated (`benchmarks/quality_choices.py`), {result['documents']} documents, all else as K3/V3: "
        "trellis, "
        f"window 128, 4 sinks, offsets, bfloat16 scales. Bits: of `demo` at 8,192 tokens. {where['device']}, "
        f"torch {where['versions']['torch']}."
    )
