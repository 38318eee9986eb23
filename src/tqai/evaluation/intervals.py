"""Confidence intervals: bootstrap over documents, Wilson's for counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqai.errors import InputError

__all__ = ["Interval", "bootstrap", "wilson"]

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A measured value and its 95% confidence interval, in the unit of the value."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, fit for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


def bootstrap(
    documents: Sequence[NDArray[np.floating[Any]]],
    statistic: Callable[[NDArray[np.floating[Any]]], float],
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """`statistic` of all tokens together, with the 2.5% and 97.5% quantiles over resampled documents.

    Documents are drawn with replacement and kept whole, because tokens of one document are not
    independent. With one document the interval is that point: nothing is known about others.

    Args:
        documents: one array of per-token numbers for each document.
        statistic: of a one-dimensional array.
        resamples: how many times the documents are drawn, at least 1.
        seed: seed of the draws; the same arguments give the same interval.

    Raises:
        InputError: no documents, or an empty one.
    """
    if not documents or any(len(document) == 0 for document in documents):
        raise InputError("bootstrap wants at least one document, and none of them empty")
    value = float(statistic(np.concatenate(documents)))
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(documents), size=(resamples, len(documents)))
    results = [statistic(np.concatenate([documents[index] for index in row])) for row in drawn]
    low, high = np.quantile(results, (0.025, 0.975))
    return Interval(value, float(low), float(high))


def wilson(successes: int, trials: int) -> Interval:
    """Rate of success with Wilson's 95% score interval, which stays honest at 0 and at all.

    Raises:
        InputError: no trials, or successes outside 0 to trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise InputError(f"{successes} of {trials}: wanted 0 to trials, and at least 1 trial")
    rate = successes / trials
    spread = 1 + Z_95**2 / trials
    middle = (rate + Z_95**2 / (2 * trials)) / spread
    half = Z_95 * math.sqrt(rate * (1 - rate) / trials + Z_95**2 / (4 * trials**2)) / spread
    low = middle - half if successes else 0.0
    high = middle + half if successes < trials else 1.0
    return Interval(rate, low, high)
