"""Attention on trellis codes in all forms of their tables (`trellis_lookup.cuh`), run on the CPU."""

from __future__ import annotations

import pytest
from tests.backends.cuda.test_attend_cpu import check, folder, gpu, make_case  # noqa: F401

from tqai.backends.cuda.plan import Shape

BOUND = 1e-4
"""Levels are exact; queries and weights have 16 bits."""


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_keys_and_values_in_two_candidates(gpu, dim):  # noqa: F811
    case = make_case(bits=(3, 3), dim=dim, codec="trellis", pages=3, recent=5, sinks=0, group=3, new_tokens=1)
    check(case, bound=BOUND, splits=1)


@pytest.mark.parametrize(
    ("bits", "dim", "codec"),
    [
        ((4, 4), 80, "trellis"),
        ((4, 4), 64, "trellis256"),
        ((4, 4), 128, "trellis"),
        ((4, 3), 112, "trellis"),
        ((3, 4), 112, "trellis"),
    ],
)
def test_codes_of_4_bits_in_parts_on_either_side(gpu, bits, dim, codec):  # noqa: F811
    case = make_case(bits=bits, dim=dim, codec=codec, pages=2, recent=5, sinks=0, group=3, new_tokens=1)
    check(case, bound=BOUND, splits=1)


@pytest.mark.parametrize(
    ("bits", "dim", "codec"),
    [
        ((2, 2), 80, "trellis"),  # pairs of bfloat16
        ((1, 2), 64, "trellis"),
        ((3, 2), 64, "trellis"),
        ((3, 3), 64, "trellis256"),  # float32
    ],
)
def test_levels_as_floats(gpu, bits, dim, codec):  # noqa: F811
    case = make_case(bits=bits, dim=dim, codec=codec, pages=2, recent=5, sinks=0, group=3, new_tokens=1)
    check(case, bound=BOUND, splits=1)


@pytest.mark.parametrize("stages", [1, 2])
def test_pages_of_a_warp_one_after_the_other(gpu, stages):  # noqa: F811
    """With one buffer, keys and values are fetched apart; cut as a line, pages are fetched whole."""
    case = make_case(bits=(3, 3), codec="trellis", pages=6, recent=17, sinks=2, first=9)
    for launch in ({"splits": 1}, {"splits": 2, "cluster": False}, {"blocks": 2}):
        check(case, bound=BOUND, shape=Shape(2, stages), **launch)
