"""What the study of quality measures: models, hard copies, caches, in the order of their importance."""

from __future__ import annotations

from dataclasses import dataclass

from pathological import COPIES
from provenance import ROOT

MODELS = {
    "demo": ROOT / "src" / "tqai" / "demo" / "model",
    "llama-7m": ROOT / "benchmarks" / "models" / "llama-7m",
    "qwen2-6m": ROOT / "benchmarks" / "models" / "qwen2-6m",
}

PEERS = ("fp8", "quanto-4", "quanto-2", "hqq-4", "turboquant-4", "turboquant-3")
UNIFORM = "codec=trellis,window=128,sinks=4,offsets=auto"
# Measured with every seed; the others with the first. What single choices cost is told by
# `quality_choices.py`.
MAIN = ("balanced", "quality", "small")
OTHERS = (
    *(f"{bits},{UNIFORM}" for bits in ("K3/V3", "K4/V4", "K2/V2")),
    "K4/V2",
    "K4/V4",
    "K3/V3",
    "K3/V3,window=128,sinks=4,offsets=auto",
    "K3/V3,codec=trellis",
)


@dataclass(frozen=True)
class Study:
    """Sizes of one run.

    Attributes:
        models, copies, peers, main, others: names and cache specs.
        seeds: of the rotation, for the main settings; the first for all others.
        documents, document_tokens, prefill_tokens, chunk_tokens: of the KL.
        bits_tokens: length at which all-in bits are counted.
        questions: per kind of retrieval (single, multi, lookup), at `retrieval_tokens`.
        resamples: of the bootstrap.
        numbers: which of the documents, counted from 0; none for all.
    """

    models: tuple[str, ...] = tuple(MODELS)
    copies: tuple[str, ...] = tuple(COPIES)
    peers: tuple[str, ...] = PEERS
    main: tuple[str, ...] = MAIN
    others: tuple[str, ...] = OTHERS
    seeds: tuple[int, ...] = (0, 1, 2)
    documents: int = 8
    document_tokens: int = 2048
    prefill_tokens: int = 512
    chunk_tokens: int = 32
    bits_tokens: int = 8192
    questions: int = 4
    retrieval_tokens: int = 2048
    resamples: int = 1000
    numbers: tuple[int, ...] = ()


QUICK = Study(
    models=("qwen2-6m",),
    copies=("plain", "key bias"),
    peers=("quanto-4",),
    main=(MAIN[0],),
    others=("K3/V3",),
    seeds=(0, 1),
    documents=2,
    document_tokens=640,
    prefill_tokens=320,
    bits_tokens=1024,
    questions=4,
    retrieval_tokens=600,
    resamples=100,
)
