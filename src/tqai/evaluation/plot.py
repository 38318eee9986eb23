"""KL against bits per value, all-in: one picture that compares caches of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqai.errors import InputError
from tqai.evaluation.intervals import Interval

__all__ = ["PlotPoint", "draw_points", "lower_edge", "plot_kl_against_bits"]

LEAST_KL = 1e-6
_STYLES = {
    "tqai": ("#1b6ca8", "o"),
    "tqai, the same bits in all layers": ("#7fb3d9", "o"),
    "dynamic": ("#555555", "*"),
    "quanto": ("#c8553d", "s"),
    "hqq": ("#7a9e3a", "^"),
    "fp8": ("#8c6bb1", "D"),
}


@dataclass(frozen=True)
class PlotPoint:
    """One cache in the picture.

    Attributes:
        name: label beside the point.
        family: "tqai", "quanto", ...: colour and legend.
        bits_per_value: all-in.
        kl: mean KL with its interval, nats per token.
    """

    name: str
    family: str
    bits_per_value: float
    kl: Interval


def plot_kl_against_bits(points: Sequence[PlotPoint], path: Path, title: str) -> None:
    """Draw the points and save them; the suffix of `path` chooses the format (svg, png, pdf).

    Raises:
        InputError: no points, or a suffix that names no format.
    """
    if not points:
        raise InputError("no points to draw")
    import matplotlib
    from matplotlib.figure import Figure

    # Fixed ids and no date, so that an unchanged result is an unchanged file.
    with matplotlib.rc_context({"svg.hashsalt": "tqai", "font.size": 10}):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        if path.suffix.lstrip(".") not in figure.canvas.get_supported_filetypes():
            raise InputError(f"plot {path}: the suffix names no format; svg, png and pdf do")
        axes = figure.subplots()
        draw_points(axes, points)
        axes.set_xlabel("bits per value held, everything included")
        axes.set_ylabel("KL against the uncompressed cache, nats per token")
        axes.set_title(title)
        axes.legend(loc="upper right")
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"dpi": 150}
        figure.savefig(path, **options)


def draw_points(axes: Any, points: Sequence[PlotPoint], labels: bool = True) -> None:
    """Put the points into a matplotlib axes, logarithmic in KL, one colour per family.

    A thin line joins the points of a family of ours (its lower left edge: what no other of its points beats
    in both bits and KL). `labels` puts the names beside the points.
    """
    for family in dict.fromkeys(point.family for point in points):
        colour, marker = _STYLES.get(family, ("#555555", "x"))
        chosen = sorted((p for p in points if p.family == family), key=lambda p: p.bits_per_value)
        middle = [max(point.kl.value, LEAST_KL) for point in chosen]
        below = [max(m - max(point.kl.low, LEAST_KL), 0) for m, point in zip(middle, chosen, strict=True)]
        above = [max(point.kl.high - m, 0) for m, point in zip(middle, chosen, strict=True)]
        axes.errorbar(
            [point.bits_per_value for point in chosen],
            middle,
            yerr=[below, above],
            color=colour,
            marker=marker,
            linestyle="none",
            capsize=2,
            label=family,
        )
        if family.startswith("tqai"):
            edge = lower_edge(chosen)
            axes.plot(
                [point.bits_per_value for point in edge],
                [max(point.kl.value, LEAST_KL) for point in edge],
                color=colour,
                linewidth=1,
            )
        for point, height in zip(chosen, middle, strict=True) if labels else ():
            axes.annotate(
                point.name,
                (point.bits_per_value, height),
                textcoords="offset points",
                xytext=(7, 4),
                color=colour,
            )
    axes.set_yscale("log")
    axes.margins(x=0.14, y=0.1)
    axes.grid(True, which="both", alpha=0.25)


def lower_edge(points: Sequence[PlotPoint]) -> list[PlotPoint]:
    """The points that no other beats or equals with fewer bits, by bits."""
    edge: list[PlotPoint] = []
    for point in sorted(points, key=lambda p: (p.bits_per_value, p.kl.value)):
        if not edge or point.kl.value < edge[-1].kl.value:
            edge.append(point)
    return edge
