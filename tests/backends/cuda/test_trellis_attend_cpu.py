"""Attention on trellis codes in all forms of their tables (`trellis_lookup.cuh`), run on the CPU."""

from __future__ import annotations

import pytest
from tests.backends.cuda.test_attend_cpu import check, folder, gpu, make_case  # noqa: F401

from tqai.backends.cuda.plan import Shape

# pages come straight into registers: there are no copies that might arrive late
pytestmark = pytest.mark.parametrize("gpu", [True], ids=[""], indirect=True)
BOUND = 1e-4
"""Levels are exact; queries and weights have 16 bits."""


@pytest.mark.parametrize(
    ("bits", "dim", "codec"),
    [
        ((3, 3), 64, "trellis"),
        ((3, 3), 80, "trellis"),
        ((3, 3), 128, "trellis"),
        ((3, 2), 64, "trellis"),
        ((3, 2), 128, "trellis"),
        ((3, 3), 64, "trellis256"),  # by sums of bits
        ((3, 3), 128, "trellis256"),
        ((3, 4), 128, "trellis256"),
        ((4, 3), 64, "trellis256"),
    ],
)
def test_levels_in_two_candidates(gpu, bits, dim, codec):  # noqa: F811
    case = make_case(bits=bits, dim=dim, codec=codec, pages=2, recent=5, sinks=0, group=3, new_tokens=1)
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
        ((2, 2), 80, "trellis"),  # pairs
        ((1, 2), 64, "trellis"),
        ((4, 2), 64, "trellis"),
        ((3, 2), 80, "trellis"),  # values as floats
        ((3, 3), 80, "trellis256"),  # both
        ((2, 3), 64, "trellis"),  # keys
    ],
)
def test_levels_without_candidates(gpu, bits, dim, codec):  # noqa: F811
    case = make_case(bits=bits, dim=dim, codec=codec, pages=2, recent=5, sinks=0, group=3, new_tokens=1)
    check(case, bound=BOUND, splits=1)


@pytest.mark.parametrize("bits", [(3, 3), (4, 2)])
def test_pages_of_a_warp_one_after_the_other(gpu, bits):  # noqa: F811
    """The next page's keys are asked for all at once or, of 4 bits, in turn; on a line, the next piece's."""
    case = make_case(bits=bits, codec="trellis", pages=6, recent=17, sinks=2, first=9)
    for launch in ({"splits": 1}, {"splits": 2, "cluster": False}, {"blocks": 2}):
        check(case, bound=BOUND, shape=Shape(2, 1), **launch)
