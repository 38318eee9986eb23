"""The measurements of `tqai eval`, in order, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tqai.cli.report import CommandError, Steps
from tqai.errors import InputError
from tqai.evaluation import (
    KINDS,
    CacheMaker,
    PlotPoint,
    QualityReport,
    attention_errors,
    combine_seeds,
    evaluate_needles,
    evaluate_quality,
    greedy_divergence,
    make_needles,
    makers_of_seeds,
    parse_spec,
    size_at,
    split_documents,
)
from tqai.evaluation.caches import is_tqai

__all__ = ["Request", "measured"]

WRONG_USAGE = 2


@dataclass(frozen=True)
class Request:
    """What to measure; see the options of `tqai eval`. No `text` means the demo document."""

    caches: tuple[str, ...]
    text: str
    documents: int
    document_tokens: int
    prefill_tokens: int
    chunk_tokens: int
    seeds: tuple[int, ...]
    bits_tokens: int | None
    greedy_tokens: int
    layers: bool
    lengths: tuple[int, ...]
    kinds: tuple[str, ...]
    depths: tuple[float, ...]
    questions: int
    backend: str | None

    @property
    def steps(self) -> int:
        """Steps of the progress bar."""
        return self.documents + bool(self.greedy_tokens) + self.layers + bool(self.lengths)


def measured(
    model: Any, tokenizer: Any, name: str, request: Request, progress: Steps
) -> tuple[dict[str, Any], list[PlotPoint]]:
    """Everything that was asked for.

    Raises:
        CommandError: the text is too short for the documents.
        ConfigError, InputError, UnsupportedError: a cache or a length that does not do.
    """
    by_seed = {spec: _makers(spec, model, request) for spec in request.caches}
    makers = [maker for of_seeds in by_seed.values() for maker in of_seeds]
    firsts = {spec: of_seeds[0] for spec, of_seeds in by_seed.items()}
    documents = _documents(tokenizer, request)
    progress.begin("chunks that read the cache back")
    reports = evaluate_quality(
        model,
        documents,
        makers,
        request.prefill_tokens,
        request.chunk_tokens,
        on_document=lambda _: progress.done(),
    )
    caches: dict[str, Any] = {}
    points = []
    for spec, of_seeds in by_seed.items():
        report = _combined(spec, of_seeds, reports, request)
        family = of_seeds[0].family
        caches[spec] = {**report.to_dict(), "family": family, **_bits(of_seeds[0], model, request)}
        bits = caches[spec].get("bits_per_value_at", {}).get("mean", report.bits_per_value)
        points.append(PlotPoint(spec, family, bits, report.summary.kl_mean))
    if request.greedy_tokens:
        progress.begin("greedy decoding")
        prompts = [document[: request.prefill_tokens] for document in documents]
        parted = greedy_divergence(model, prompts, list(firsts.values()), request.greedy_tokens)
        for spec, maker in firsts.items():
            caches[spec]["first_divergence"] = parted[maker.name]
        progress.done()
    if request.layers:
        progress.begin("attention outputs")
        errors = attention_errors(
            model, documents[0], list(firsts.values()), request.prefill_tokens, request.chunk_tokens
        )
        for spec, maker in firsts.items():
            caches[spec]["attention_error"] = errors[maker.name].to_dict()
        progress.done()
    if request.lengths:
        progress.begin("retrieval")
        _retrieval(model, tokenizer, request, firsts, caches)
        progress.done()
    return {"model": name, "request": _plain(request), "caches": caches}, points


def _makers(spec: str, model: Any, request: Request) -> list[CacheMaker]:
    name, settings = parse_spec(spec)
    if is_tqai(name) and request.backend is not None and "backend" not in settings:
        spec = f"{spec},backend={request.backend},label={settings.get('label', spec.replace(',', ' '))}"
    return makers_of_seeds(spec, model, request.seeds)


def _documents(tokenizer: Any, request: Request) -> list[torch.Tensor]:
    if request.text:
        text = request.text
    else:
        from tqai.demo.retrieval import document

        text = document()
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False), dtype=torch.long)
    try:
        return split_documents(ids, request.document_tokens, request.documents)
    except InputError as error:
        raise CommandError(f"--text, --documents, --document-tokens: {error}", WRONG_USAGE) from error


def _combined(
    spec: str, of_seeds: list[CacheMaker], reports: dict[str, QualityReport], request: Request
) -> QualityReport:
    if len(of_seeds) == 1:
        return reports[of_seeds[0].name]
    named = dict(zip(request.seeds, (reports[maker.name] for maker in of_seeds), strict=True))
    return combine_seeds(spec, named)


def _bits(maker: CacheMaker, model: Any, request: Request) -> dict[str, Any]:
    if request.bits_tokens is None:
        return {}
    size = size_at(maker, model.config, request.bits_tokens, model.dtype, model.device)
    return {"bits_per_value_at": {"tokens": size.tokens, "mean": size.mean, "most": size.most}}


def _retrieval(
    model: Any, tokenizer: Any, request: Request, firsts: dict[str, CacheMaker], caches: dict[str, Any]
) -> None:
    cells = make_needles(
        tokenizer,
        request.lengths,
        request.kinds or KINDS,
        request.depths or (None,),
        request.questions,
    )
    found = evaluate_needles(model, tokenizer, cells, list(firsts.values()))
    for spec, maker in firsts.items():
        caches[spec]["retrieval"] = [
            {"kind": cell.kind, "prompt_tokens": cell.prompt_tokens, "depth": cell.depth, **report.to_dict()}
            for cell, report in zip(cells, found[maker.name], strict=True)
        ]


def _plain(request: Request) -> dict[str, Any]:
    fields = {key: list(v) if isinstance(v, tuple) else v for key, v in request.__dict__.items()}
    fields["text"] = "given" if request.text else "the demo document"
    return fields
