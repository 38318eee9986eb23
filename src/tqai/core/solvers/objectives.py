"""How good a codebook is, by three measures.

Let x be a unit vector, c its codes' levels, x^ = s c with the least-squares scale s = <x,c> / <c,c>.

    mse        E |x - c|^2 (scale 1), integrated over the density of a coordinate
    cosine     1 - E cos(x, c). <x,c> and <c,c> are sums over d coordinates and close to their means A and
               B, so this is 1 - A / sqrt(B) but for O(1/d)
    attention  mean KL(softmax(l) || softmax(l^)), l = sharpness * <q, k> / sqrt d of Gaussian q and k,
               l^ with coded keys; on samples, sharpness 2

Why one optimum serves all: for given cells the cosine is greatest where the levels are proportional to
the cells' means (Cauchy-Schwarz), and then 1 - cos^2 = E|x - mean|^2, which Lloyd-Max makes least. Under a
random rotation x - x^ has no direction but that of x, so logits depend on the codebook through cos alone.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tqai.core.lloyd_max import cell_moments
from tqai.errors import ConfigError

__all__ = ["OBJECTIVES", "attention_value", "objective_value"]

OBJECTIVES = ("mse", "cosine", "attention")
SAMPLED_KEYS, SAMPLED_QUERIES = 256, 32
SHARPNESS = 2.0

Floats = NDArray[np.float64]


def objective_value(
    half: NDArray[np.floating], d: int, objective: str, n_samples: int = SAMPLED_KEYS, seed: int = 0
) -> float:
    """The objective of a symmetric codebook whose positive half is `half`; less is better.

    Args:
        half: `[2**(bits-1)]`, ascending, positive.
        d: coordinates per vector, at least 2.
        objective: one of `OBJECTIVES`.
        n_samples, seed: of "attention": keys per sample of 32 queries, and which sample.

    Raises:
        ConfigError: an unknown objective.
    """
    levels = np.asarray(half, dtype=np.float64)
    if objective == "attention":
        return attention_value(levels, d, n_samples, seed)
    edges = np.concatenate([[0.0], 0.5 * (levels[1:] + levels[:-1]), [1.0]])
    mass, first, second = cell_moments(d, np.clip(edges, 0.0, 1.0), levels)
    total = mass.sum()
    if objective == "mse":
        return float(d * second.sum() / total)
    if objective != "cosine":
        raise ConfigError(f"objective={objective!r}: allowed are {', '.join(OBJECTIVES)}")
    # E[x c] = sum over cells of c (mean deviation + c)
    along = d * float((levels * (first + levels * mass)).sum() / total)
    size = d * float((levels * levels * mass).sum() / total)
    return 1.0 - along / float(np.sqrt(size))


def attention_value(half: Floats, d: int, n_samples: int, seed: int) -> float:
    """Mean KL divergence, in nats, of a sample of queries; see the module's text."""
    queries, keys = _sample(d, n_samples, seed)
    inner = 0.5 * (half[1:] + half[:-1])
    magnitudes = half[np.searchsorted(inner, np.abs(keys), side="right")]
    codes = np.where(keys < 0.0, -magnitudes, magnitudes)
    scale = (keys * codes).sum(-1) / (codes * codes).sum(-1)
    exact = SHARPNESS * queries @ keys.T
    coded = SHARPNESS * queries @ (codes * scale[:, None]).T
    log_p, log_q = _log_softmax(exact), _log_softmax(coded)
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


@lru_cache(maxsize=8)
def _sample(d: int, n_samples: int, seed: int) -> tuple[Floats, Floats]:
    """Queries of length about sqrt(d) and unit keys: logits of variance SHARPNESS squared."""
    generator = np.random.Generator(np.random.Philox(seed))
    keys = generator.standard_normal((n_samples, d))
    return generator.standard_normal((SAMPLED_QUERIES, d)), keys / np.linalg.norm(
        keys, axis=-1, keepdims=True
    )


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    out: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return out
