"""The picture is written, names every cache, and does not change when the numbers do not."""

import pytest

from tqai.errors import InputError
from tqai.evaluation import Interval, PlotPoint, plot_kl_against_bits
from tqai.evaluation.plot import lower_edge

pytest.importorskip("matplotlib")

POINTS = [
    PlotPoint("K4/V2", "tqai", 3.2, Interval(0.05, 0.04, 0.06)),
    PlotPoint("quanto-4", "quanto", 5.2, Interval(0.001, 0.001, 0.001)),
    PlotPoint("nothing lost", "tqai", 32.0, Interval(0.0, 0.0, 0.0)),
]


def test_svg_is_the_same_twice(tmp_path):
    paths = [tmp_path / "a" / "one.svg", tmp_path / "two.svg"]
    for path in paths:
        plot_kl_against_bits(POINTS, path, "title of it")
    first, second = (path.read_text("utf-8") for path in paths)
    assert first == second
    for name in ("K4/V2", "quanto-4", "nothing lost", "title of it", "bits per value"):
        assert f"<!-- {name}" in first


def test_png(tmp_path):
    plot_kl_against_bits(POINTS, tmp_path / "x.png", "t")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(InputError):
        plot_kl_against_bits([], tmp_path / "x.svg", "t")


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(InputError, match="names no format"):
        plot_kl_against_bits(POINTS, tmp_path / "x.doc", "t")


def test_the_edge_leaves_out_what_is_beaten_in_bits_and_kl():
    figures = ((4.0, 0.3), (2.0, 0.5), (3.0, 0.6), (3.5, 0.3), (5.0, 0.1))
    points = [PlotPoint(str(bits), "tqai", bits, Interval(kl, kl, kl)) for bits, kl in figures]
    assert [point.name for point in lower_edge(points)] == ["2.0", "3.5", "5.0"]
