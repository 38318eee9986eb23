"""Per-token scores of one distribution against another, and their summary over documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tqai.errors import InputError
from tqai.evaluation.intervals import Interval, bootstrap

__all__ = ["QualitySummary", "TokenScores", "score_logits", "summarize"]


@dataclass(frozen=True)
class TokenScores:
    """Scores of the tokens of one document (or one chunk of it), each a float64 array.

    Attributes:
        nll: `[n - 1]` or `[n]`, negative log-likelihood in nats of the tokens that really follow; a
            document's last token has nothing after it.
        kl: `[n]`, KL(reference || this) in nats.
        agrees: `[n]`, 1 where the most likely token is the reference's, else 0.
    """

    nll: NDArray[np.float64]
    kl: NDArray[np.float64]
    agrees: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence[TokenScores]) -> TokenScores:
        """Scores of consecutive chunks as one."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True)
class QualitySummary:
    """What a cache does to a model's predictions; intervals are 95%, bootstrapped over documents.

    Attributes:
        documents: how many.
        tokens: scored tokens in all of them.
        perplexity: exp of the mean negative log-likelihood.
        kl_mean, kl_median, kl_p99: KL against the uncompressed model, nats per token.
        top1_agreement: fraction of tokens whose most likely successor is the uncompressed model's.
    """

    documents: int
    tokens: int
    perplexity: Interval
    kl_mean: Interval
    kl_median: Interval
    kl_p99: Interval
    top1_agreement: Interval

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON."""
        return {
            name: value.to_dict() if isinstance(value, Interval) else value
            for name, value in ((field.name, getattr(self, field.name)) for field in fields(self))
        }


def score_logits(reference: Tensor, logits: Tensor, targets: Tensor) -> TokenScores:
    """Scores of `logits` against `reference`, both `[n, vocabulary]`, computed in float64.

    Args:
        reference: logits of the uncompressed model.
        logits: logits of the model with the cache under test.
        targets: int64 `[n]` or `[n - 1]`, the tokens that follow.

    Raises:
        InputError: shapes that do not fit, or logits that are NaN (an error in a cache must not
            pass as a number).
    """
    if reference.shape != logits.shape or logits.dim() != 2:
        raise InputError(
            f"logits {list(logits.shape)} and reference {list(reference.shape)}: "
            "wanted the same [n, vocabulary]"
        )
    if not logits.shape[0] - 1 <= targets.numel() <= logits.shape[0]:
        raise InputError(
            f"{targets.numel()} targets for {logits.shape[0]} tokens: wanted as many, or one less"
        )
    if bool(logits.isnan().any()) or bool(reference.isnan().any()):
        raise InputError("the logits hold NaN")
    expected = torch.log_softmax(reference.double(), dim=-1)
    got = torch.log_softmax(logits.double(), dim=-1)
    # Zero probability in the reference contributes nothing, also where the logarithms are -inf.
    terms = torch.where(expected.isneginf(), 0.0, expected.exp() * (expected - got))
    followed = targets.to(got.device)
    nll = -got[: followed.numel()].gather(1, followed[:, None])[:, 0]
    agrees = (reference.argmax(-1) == logits.argmax(-1)).double()
    return TokenScores(nll.cpu().numpy(), terms.sum(-1).cpu().numpy(), agrees.cpu().numpy())


def summarize(documents: Sequence[TokenScores], resamples: int = 1000, seed: int = 0) -> QualitySummary:
    """Summary over documents; tokens weigh the same whichever document they are from.

    Raises:
        InputError: no documents.
    """
    kl = [document.kl for document in documents]

    def interval(values: Sequence[NDArray[np.float64]], statistic: Any) -> Interval:
        return bootstrap(values, statistic, resamples=resamples, seed=seed)

    return QualitySummary(
        documents=len(documents),
        tokens=sum(len(values) for values in kl),
        perplexity=interval(
            [document.nll for document in documents], lambda nll: float(np.exp(np.mean(nll)))
        ),
        kl_mean=interval(kl, np.mean),
        kl_median=interval(kl, np.median),
        kl_p99=interval(kl, lambda values: float(np.quantile(values, 0.99))),
        top1_agreement=interval([document.agrees for document in documents], np.mean),
    )
