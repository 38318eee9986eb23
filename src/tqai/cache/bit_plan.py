"""Bits where they matter: 2, 3 or 4 per layer and side, within a budget that counts everything.

`allocate` picks the widths whose errors add up to the least, exactly (a knapsack by dynamic programming);
errors come from a calibration (`cache.calibration`) or, without data, from the first prefill (`BitPlan`).
The budget is bits per value all-in at a stated context: codes, scales, exact window, sinks, offsets and
tables, the same bytes that `memory()` counts (tests/cache/test_bit_plan.py holds one to the other), as the
mean while a page's 64 tokens come in, because windows fill and empty again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

from tqai.cache.page_format import page_format_for
from tqai.cache.window import ROOM_TOKENS
from tqai.config import CacheConfig
from tqai.core.page import PAGE_TOKENS
from tqai.errors import ConfigError

__all__ = ["WIDTHS", "LayerShape", "SideErrors", "all_in_bits", "allocate"]

WIDTHS = (2, 3, 4)
TABLE_BYTES_PER_PAGE = 4 + 8
MOST_UNITS = 1 << 14
PARTS = 2 * PAGE_TOKENS
"""Costs are counted in so many parts of a byte, of which a mean over a page's 64 tokens is a whole number."""


@dataclass(frozen=True)
class LayerShape:
    """What the size of a layer follows from.

    Attributes:
        kv_heads, key_dim, value_dim: as the model has them.
        value_bytes: bytes of a number in the model's dtype.
        sliding_window: tokens that the layer sees, or None for all.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    value_bytes: int
    sliding_window: int | None = None


@dataclass(frozen=True)
class SideErrors:
    """What each width costs a layer, in any unit that adds up: width -> error."""

    keys: Mapping[int, float]
    values: Mapping[int, float]


def all_in_bits(config: CacheConfig, shapes: Sequence[LayerShape], bits: Sequence[tuple[int, int]]) -> float:
    """Bits per value of one sequence of `config.budget_tokens` tokens with these widths per layer."""
    held = sum(_layer_bytes(config, shape, *pair) for shape, pair in zip(shapes, bits, strict=True))
    return 8 * held / _values(config, shapes)


def allocate(
    config: CacheConfig, shapes: Sequence[LayerShape], errors: Sequence[SideErrors], budget: float
) -> tuple[tuple[int, int], ...]:
    """Bits of keys and of values per layer, of least total error with `all_in_bits` at most `budget`.

    Raises:
        ConfigError: not even 2 bits everywhere fit the budget.
    """
    least = all_in_bits(config, shapes, [(WIDTHS[0], WIDTHS[0])] * len(shapes))
    if least > budget:
        raise ConfigError(
            f"bits_budget={budget}: {WIDTHS[0]} bits everywhere take {least:.3f} bits per value at "
            f"{config.budget_tokens} tokens, window and scales included: allowed is that or more"
        )
    costs, worths = [], []
    for shape, error in zip(shapes, errors, strict=True):
        base = _layer_bytes(config, shape, WIDTHS[0], WIDTHS[0])
        for side, by_width in enumerate((error.keys, error.values)):
            pairs = [(width, WIDTHS[0]) if side == 0 else (WIDTHS[0], width) for width in WIDTHS]
            costs.append([round(PARTS * (_layer_bytes(config, shape, *pair) - base)) for pair in pairs])
            worths.append([float(by_width[width]) for width in WIDTHS])
    room = int(PARTS * (budget - least) * _values(config, shapes) / 8 + 1e-6)
    chosen = [WIDTHS[index] for index in _knapsack(costs, worths, room)]
    return tuple(zip(chosen[::2], chosen[1::2], strict=True))


def _knapsack(costs: list[list[int]], errors: list[list[float]], room: int) -> list[int]:
    """One option per item, of least total error and total cost at most `room`; option 0 costs nothing."""
    room = min(room, sum(row[-1] for row in costs))
    unit = max(gcd(*(cost for row in costs for cost in row)), -(-room // MOST_UNITS), 1)
    units = room // unit
    best = [0.0] * (units + 1)
    taken = []
    for row, worth in zip(costs, errors, strict=True):
        steps = [-(-cost // unit) for cost in row]
        new, choice = [float("inf")] * (units + 1), [0] * (units + 1)
        for have in range(units + 1):
            for option, step in enumerate(steps):
                if step <= have and best[have - step] + worth[option] < new[have]:
                    new[have], choice[have] = best[have - step] + worth[option], option
        best = new
        taken.append((steps, choice))
    have, options = units, []
    for steps, choice in reversed(taken):
        options.append(choice[have])
        have -= steps[choice[have]]
    return options[::-1]


def _layer_bytes(config: CacheConfig, shape: LayerShape, bits_k: int, bits_v: int) -> float:
    one = config.with_changes(
        bits_budget=None, layer_bits=None, last_layer_bits=None, bits_k=bits_k, bits_v=bits_v
    )
    page_format = page_format_for(one, shape.key_dim, shape.value_dim)
    sliding = shape.sliding_window is not None
    tokens = _tokens(config, shape)
    sinks = 0 if sliding else min(config.sink_tokens, tokens)
    exact = _exact_tokens(config, tokens - sinks)
    pages = (tokens - sinks - exact) / PAGE_TOKENS
    vector_bytes = shape.value_bytes * (shape.key_dim + shape.value_dim)
    offsets = 0 if config.offsets == "off" else 1
    whole = sinks + offsets + exact + ROOM_TOKENS / 2
    return (
        shape.kv_heads * (pages * page_format.page_bytes + whole * vector_bytes)
        + pages * TABLE_BYTES_PER_PAGE
    )


def _exact_tokens(config: CacheConfig, tokens: int) -> float:
    """Tokens of `tokens` after the sinks that are in the window, mean while it fills and empties again."""
    return min(config.window_tokens + (PAGE_TOKENS - 1) / 2, tokens)


def _values(config: CacheConfig, shapes: Sequence[LayerShape]) -> int:
    return sum(
        _tokens(config, shape) * shape.kv_heads * (shape.key_dim + shape.value_dim) for shape in shapes
    )


def _tokens(config: CacheConfig, shape: LayerShape) -> int:
    """Tokens that the layer holds of a sequence of `budget_tokens`."""
    return min(config.budget_tokens, shape.sliding_window or config.budget_tokens)
