"""Perplexity, KL and agreement of several caches against the uncompressed model, in one walk.

All caches go through a document side by side, chunk by chunk, next to an uncompressed one. The
reference logits are thus computed once, and no more than one chunk of logits per cache is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tqai.errors import InputError
from tqai.evaluation.caches import CacheMaker, cache_maker
from tqai.evaluation.chunked import CHUNK_TOKENS, as_batch, chunk_bounds, run_tokens, warn_if_never_read
from tqai.evaluation.held import bits_per_value
from tqai.evaluation.prefill import prefill_caches
from tqai.evaluation.scores import QualitySummary, TokenScores, score_logits, summarize

__all__ = ["QualityReport", "evaluate_quality", "split_documents"]

PREFILL_TOKENS = 512


@dataclass(frozen=True)
class QualityReport:
    """Quality of one cache on one model and some documents.

    Attributes:
        name: the cache.
        settings: what it was made with.
        summary: perplexity, KL and agreement with intervals.
        bits_per_value: all-in, at the end of a document, mean over documents.
        document_tokens: shortest and longest document.
        prefill_tokens, chunk_tokens: how the documents were read.
        history_read_back: mean fraction of a scored token's history that came from the cache.
        documents: per-token scores of each document, for other statistics.
        kl_by_seed: mean KL with each seed of the rotation, where several are in this report.
    """

    name: str
    settings: dict[str, Any]
    summary: QualitySummary
    bits_per_value: float
    document_tokens: tuple[int, int]
    prefill_tokens: int
    chunk_tokens: int
    history_read_back: float
    documents: tuple[TokenScores, ...]
    kl_by_seed: Mapping[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-token scores, fit for JSON."""
        return {
            "name": self.name,
            "settings": self.settings,
            **self.summary.to_dict(),
            "bits_per_value": self.bits_per_value,
            "document_tokens": list(self.document_tokens),
            "prefill_tokens": self.prefill_tokens,
            "chunk_tokens": self.chunk_tokens,
            "history_read_back": self.history_read_back,
            "kl_by_seed": {str(seed): kl for seed, kl in self.kl_by_seed.items()},
        }


def evaluate_quality(
    model: Any,
    documents: Sequence[Tensor],
    makers: Sequence[CacheMaker],
    prefill_tokens: int = PREFILL_TOKENS,
    chunk_tokens: int = CHUNK_TOKENS,
    resamples: int = 1000,
    seed: int = 0,
    on_document: Callable[[int], None] | None = None,
    documents_at_once: int = 1,
) -> dict[str, QualityReport]:
    """Quality of each cache on `documents`, every scored token reading its history from the cache.

    Args:
        model: a transformers causal language model in evaluation mode.
        documents: int64 `[tokens]` each, longer than `prefill_tokens` + 1.
        makers: the caches, with different names; "dynamic" among them checks the measure itself.
        prefill_tokens, chunk_tokens: see `chunked_logits`.
        resamples, seed: of the bootstrap over documents.
        on_document: called with the number of documents done, for progress bars.
        documents_at_once: how many documents of one length are a batch, which suits a GPU. A cache that
            shares something between the sequences of a batch (fp8 its scale) measures another thing then.

    Returns:
        name -> report, in the order of `makers`.

    Raises:
        InputError: no documents, lengths or a batch that do not fit, equal names, or NaN among the logits.

    Warns:
        CacheNeverReadWarning: see `chunked_logits`.
    """
    names = [maker.name for maker in makers]
    if len(set(names)) != len(names):
        raise InputError(f"caches of the same name: {', '.join(names)}")
    if not documents:
        raise InputError("no documents")
    if documents_at_once < 1:
        raise InputError(f"documents_at_once={documents_at_once}: allowed are whole numbers from 1")
    lengths = [int(document.numel()) for document in documents]
    if min(lengths) < prefill_tokens + 2:
        raise InputError(f"a document of {min(lengths)} tokens: wanted at least prefill_tokens + 2")
    fractions = [warn_if_never_read(length, prefill_tokens, chunk_tokens) for length in sorted(set(lengths))]
    everyone = [cache_maker("dynamic", model, label="reference"), *makers]
    scores: dict[str, list[TokenScores]] = {name: [] for name in names}
    bits: dict[str, list[float]] = {name: [] for name in names}
    done = 0
    for batch in _batches(documents, documents_at_once):
        batch = as_batch(batch, model)
        rows, length = batch.shape
        caches = prefill_caches(model, batch[:, :prefill_tokens], everyone)
        parts: dict[str, list[list[TokenScores]]] = {name: [[] for _ in range(rows)] for name in names}
        for start, stop in chunk_bounds(length, prefill_tokens, chunk_tokens):
            chunk, followed = batch[:, start:stop], batch[:, start + 1 : stop + 1]
            reference = run_tokens(model, chunk, caches[0])
            for name, cache in zip(names, caches[1:], strict=True):
                got = run_tokens(model, chunk, cache)
                for row in range(rows):
                    parts[name][row].append(score_logits(reference[row], got[row], followed[row]))
        for name, cache in zip(names, caches[1:], strict=True):
            scores[name] += [TokenScores.joined(part) for part in parts[name]]
            bits[name] += [bits_per_value(cache, model.config, length, rows)] * rows
        done += rows
        if on_document is not None:
            on_document(done)
    return {
        maker.name: QualityReport(
            name=maker.name,
            settings=maker.settings,
            summary=summarize(scores[maker.name], resamples, seed),
            bits_per_value=sum(bits[maker.name]) / len(documents),
            document_tokens=(min(lengths), max(lengths)),
            prefill_tokens=prefill_tokens,
            chunk_tokens=chunk_tokens,
            history_read_back=sum(fractions) / len(fractions),
            documents=tuple(scores[maker.name]),
        )
        for maker in makers
    }


def _batches(documents: Sequence[Tensor], at_once: int) -> Iterator[Tensor]:
    """Consecutive documents of one length, `[rows, tokens]`, at most `at_once` together."""
    together: list[Tensor] = []
    for document in documents:
        if together and (len(together) == at_once or together[0].numel() != document.numel()):
            yield torch.stack(together)
            together = []
        together.append(document)
    yield torch.stack(together)


def split_documents(input_ids: Tensor, document_tokens: int, count: int) -> list[Tensor]:
    """`count` stretches of `document_tokens` tokens, evenly spread over `input_ids` `[tokens]`.

    Raises:
        InputError: the text is too short for that many without overlap.
    """
    tokens = int(input_ids.numel())
    if count < 1 or document_tokens < 1 or tokens < count * document_tokens:
        raise InputError(
            f"{count} documents of {document_tokens} tokens from a text of {tokens}: it is too short, "
            f"or one of the numbers is below 1"
        )
    step = tokens // count
    return [input_ids[index * step : index * step + document_tokens] for index in range(count)]
