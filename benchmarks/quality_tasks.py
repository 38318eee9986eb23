"""The pieces that the study is cut into, each small enough for one worker process, and their results.

A task is a tuple of plain values; `perform` does it in a worker, which keeps models and copies it has made.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from pathological import COPIES, SINK_TOKENS, Copy, largest_difference, make_copy
from quality_cpu import CPU_SETTINGS
from quality_peers import turboquant_maker
from quality_settings import MODELS, Study

from tqai.config import NAMED_PRESETS
from tqai.demo.retrieval import document
from tqai.evaluation import (
    CacheMaker,
    RetrievalTask,
    evaluate_needles,
    evaluate_quality,
    make_needles,
    maker_from_spec,
    parse_spec,
    size_at,
    split_documents,
)
from tqai.evaluation.chunked import run_tokens

TOGETHER = 8  # caches that go through a text beside one reference
CALIBRATION_TOKENS = 2048
CHECKED_TOKENS = 1024


@dataclass(frozen=True)
class Task:
    """One piece of work.

    Attributes:
        kind: "copy" (how good is it), "size", "kl" or "retrieval".
        model, copy: which; a size is the same for all copies.
        specs: caches.
        seed: of the rotation.
    """

    kind: str
    model: str
    copy: str
    specs: tuple[str, ...] = ()
    seed: int = 0


def all_tasks(study: Study) -> list[Task]:
    """Everything, the most important first."""
    places = [(model, copy) for copy in study.copies for model in study.models]
    first = study.seeds[0]
    main, others = _groups(study.main), _groups(study.others)
    groups = [*main, *((peer,) for peer in study.peers), *others]
    tasks = [Task("copy", model, copy) for model, copy in places]
    tasks += [Task("size", model, "plain", group) for group in groups for model in study.models]
    best = groups[: len(main) + len(study.peers)]
    tasks += [Task("kl", *place, group, first) for group in best for place in places]
    tasks += [Task("retrieval", *place, group, first) for group in best for place in places]
    tasks += [Task("kl", *place, group, first) for group in others for place in places]
    for seed in study.seeds[1:]:
        tasks += [Task("kl", *place, group, seed) for group in main for place in places]
    tasks += [Task("retrieval", *place, group, first) for group in others for place in places]
    return tasks


def _groups(specs: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [specs[i : i + TOGETHER] for i in range(0, len(specs), TOGETHER)]


def perform(task: Task, study: Study, device: str, backend: str | None) -> dict[str, Any]:
    """The result of a task: spec -> plain values (a refusal is one, too); for a copy, its figures."""
    work = {"copy": _describe_copy, "size": _sizes, "kl": _quality, "retrieval": _retrieval}[task.kind]
    return work(task, study, device, backend)


@functools.cache
def _loaded(name: str, device: str) -> tuple[Any, Any, torch.Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(MODELS[name], dtype=torch.float32).eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(MODELS[name])
    return model, tokenizer, torch.tensor(tokenizer.encode(document()))


@functools.cache
def _copied(name: str, copy: str, device: str) -> Copy:
    model, _, text = _loaded(name, device)
    return make_copy(copy, model, text[:CALIBRATION_TOKENS])


def _makers(
    specs: tuple[str, ...], model: Any, seed: int, backend: str | None, device: str, of_tokens: bool = True
) -> tuple[list[CacheMaker], dict[str, Any]]:
    """Makers of the caches that work here, and what the others say instead; `of_tokens`: they are to be
    read, not only counted."""
    makers, refused = [], {}
    for spec in specs:
        name = parse_spec(spec)[0]
        ours = name in NAMED_PRESETS or name[:1] in "Kk"
        more = {"seed": seed, "backend": backend} if ours else {}
        if ours and of_tokens and device == "cpu":
            more |= CPU_SETTINGS
        try:
            if name.startswith("turboquant-"):
                makers.append(turboquant_maker(name))
            else:
                makers.append(maker_from_spec(spec, model, **more))
        except Exception as error:  # whatever a foreign package raises is a reason
            refused[spec] = {"not_measured": f"{type(error).__name__}: {error}"}
    return makers, refused


def _describe_copy(task: Task, study: Study, device: str, backend: str | None) -> dict[str, Any]:
    model, _, text = _loaded(task.model, device)
    copy = _copied(task.model, task.copy, device)
    piece = text[-CHECKED_TOKENS:]
    batch = piece[None].to(device)
    with torch.inference_mode():
        trained, original = (
            torch.log_softmax(net(batch, use_cache=False).logits[0].double(), -1)
            for net in (model, copy.original)
        )
    targets = batch[0, 1:, None]
    return {
        "relative_logit_difference": largest_difference(copy, piece),
        "original_against_trained_kl": float((trained.exp() * (trained - original)).sum(-1).mean()),
        "perplexity": math.exp(-float(original[:-1].gather(1, targets).mean())),
        "trained_perplexity": math.exp(-float(trained[:-1].gather(1, targets).mean())),
        "parameters": sum(p.numel() for p in copy.model.parameters()),
        "head_dim": copy.model.config.head_dim,
    }


def _sizes(task: Task, study: Study, device: str, backend: str | None) -> dict[str, Any]:
    model = _loaded(task.model, device)[0]
    makers, found = _makers(task.specs, model, task.seed, backend, device, of_tokens=False)
    for maker in makers:
        # one layer stands for all, but where the last has other bits
        layers = 1 if maker.settings.get("last_layer_bits") is None else None
        size = size_at(maker, model.config, study.bits_tokens, torch.bfloat16, device, layers)
        found[maker.name] = {
            "bits_per_value": size.mean,
            "bits_per_value_most": size.most,
            "settings": maker.settings,
            "family": maker.family,
        }
    return found


def _quality(task: Task, study: Study, device: str, backend: str | None) -> dict[str, Any]:
    copy, text = _copied(task.model, task.copy, device), _loaded(task.model, device)[2]
    makers, found = _makers(task.specs, copy.model, task.seed, backend, device)
    prefix = torch.tensor(copy.prefix, dtype=text.dtype)
    pieces = split_documents(text, study.document_tokens - len(prefix), study.documents)
    numbers = study.numbers or tuple(range(study.documents))
    documents = [torch.cat([prefix, pieces[number]]) for number in numbers]
    # fp8 has one scale for a whole batch, hqq one grouping: these go one by one.
    alone = any(maker.family in ("fp8", "hqq") for maker in makers)
    at_once = 1 if alone or device == "cpu" else study.documents
    reports = (
        evaluate_quality(
            copy.model,
            documents,
            makers,
            study.prefill_tokens,
            study.chunk_tokens,
            resamples=1,
            documents_at_once=at_once,
        )
        if makers
        else {}
    )
    for name, report in reports.items():
        found[name] = {
            "documents": list(numbers),
            "kl_by_document": [float(scores.kl.mean()) for scores in report.documents],
            "nll_by_document": [float(scores.nll.mean()) for scores in report.documents],
            "kl_median": report.summary.kl_median.value,
            "kl_p99": report.summary.kl_p99.value,
            "top1_agreement": report.summary.top1_agreement.value,
            "tokens": report.summary.tokens,
            "bits_per_value_here": report.bits_per_value,
        }
    return found


def _retrieval(task: Task, study: Study, device: str, backend: str | None) -> dict[str, Any]:
    copy, tokenizer = _copied(task.model, task.copy, device), _loaded(task.model, device)[1]
    makers, found = _makers(task.specs, copy.model, task.seed, backend, device)
    if not makers:
        return found
    start = "<s>" * len(copy.prefix)
    cells = make_needles(tokenizer, (study.retrieval_tokens - SINK_TOKENS,), questions=study.questions)
    if start:
        cells = [
            type(cell)(
                cell.kind,
                cell.prompt_tokens,
                cell.depth,
                tuple(RetrievalTask(start + t.text, t.questions, t.answers, t.depths) for t in cell.tasks),
            )
            for cell in cells
        ]
    reports = evaluate_needles(copy.model, tokenizer, cells, makers)
    for name, of_cells in reports.items():
        found[name] = {
            cell.kind: {"correct": report.correct, "questions": report.questions}
            for cell, report in zip(cells, of_cells, strict=True)
        }
    return found


def warm_up(device: str) -> None:
    """One small pass, so that loading a GPU's libraries is not part of a task."""
    if device != "cpu":
        model, _, text = _loaded("demo", device)
        from transformers import DynamicCache

        run_tokens(model, text[None, :8].to(device), DynamicCache(config=model.config))


assert set(COPIES) >= {"plain"}
