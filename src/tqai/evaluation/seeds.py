"""One cache with several random rotations: scores of all of them together, and of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tqai.evaluation.caches import CacheMaker, cache_maker
from tqai.evaluation.quality import QualityReport
from tqai.evaluation.scores import TokenScores, summarize
from tqai.evaluation.specs import parse_spec

__all__ = ["SEEDS", "combine_seeds", "makers_of_seeds"]

SEEDS = (0, 1, 2)


def makers_of_seeds(spec: str, model: Any, seeds: Sequence[int] = SEEDS) -> list[CacheMaker]:
    """One maker for each seed of the cache `spec` (see `evaluation.specs`), named "... seed=N".

    A single one, named as it is, where the cache has no rotation (all but tqai's) or names its seed.

    Raises:
        ConfigError, UnsupportedError: see `cache_maker`.
    """
    name, settings = parse_spec(spec)
    label = settings.pop("label", None) or spec.replace(" ", "")
    first = cache_maker(name, model, label=label, **settings)
    if first.family != "tqai" or "seed" in settings:
        return [first]
    return [cache_maker(name, model, label=f"{label} seed={seed}", **settings, seed=seed) for seed in seeds]


def combine_seeds(
    name: str, reports: Mapping[int, QualityReport], resamples: int = 1000, seed: int = 0
) -> QualityReport:
    """The report of all seeds: each document's scores are those with every seed, one after another.

    Documents are resampled, with all their seeds; `kl_by_seed` holds the mean KL of each seed.

    Args:
        reports: seed -> report on the same documents in the same order.
        resamples, seed: of the bootstrap.
    """
    every = list(reports.values())
    documents = tuple(
        TokenScores.joined(of_seeds) for of_seeds in zip(*(r.documents for r in every), strict=True)
    )
    settings = {key: value for key, value in every[0].settings.items() if key != "seed"}
    return replace(
        every[0],
        name=name,
        settings=settings,
        summary=summarize(documents, resamples, seed),
        bits_per_value=sum(report.bits_per_value for report in every) / len(every),
        documents=documents,
        kl_by_seed={key: report.summary.kl_mean.value for key, report in reports.items()},
    )
