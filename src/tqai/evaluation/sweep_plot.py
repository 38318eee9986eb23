"""Figures of `context_sweep` against the length of the context, drawn. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqai.errors import InputError
from tqai.evaluation.context_sweep import BranchReport

__all__ = ["plot_sweep"]

PANELS = (
    ("bytes held by the cache, MiB", "held_bytes", 2.0**-20),
    ("peak memory above the model, MiB", "peak_bytes", 2.0**-20),
    ("tokens per second", "tokens_per_second", 1.0),
    ("KL against uncompressed, nats per token", "kl_mean", 1.0),
)


def plot_sweep(reports: Sequence[BranchReport], path: Path, title: str) -> None:
    """Draw four panels and save them; the suffix of `path` chooses the format (svg, png, pdf).

    Raises:
        InputError: no reports.
    """
    if not reports:
        raise InputError("no branches to draw")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "tqai", "font.size": 9}):
        figure = Figure(figsize=(9.0, 6.4), layout="constrained")
        for axes, (label, field, unit) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            for cache in dict.fromkeys(report.cache for report in reports):
                own = [report for report in reports if report.cache == cache]
                known = [(r.context_tokens, getattr(r, field)) for r in own if getattr(r, field) is not None]
                if known and not (field == "kl_mean" and cache == "dynamic"):
                    tokens, values = zip(*known, strict=True)
                    name = "uncompressed" if cache == "dynamic" else cache
                    axes.plot(tokens, [value * unit for value in values], marker="o", label=name)
            axes.set_xlabel("context, tokens")
            axes.set_title(label, fontsize=9)
            axes.set_ylim(bottom=0)
            axes.grid(True, alpha=0.25)
        figure.axes[0].legend()
        figure.suptitle(title)
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 150}
        figure.savefig(path, **options)
