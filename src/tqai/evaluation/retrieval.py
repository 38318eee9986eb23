"""Does the model still find a six-digit code in a long document? Exact match, greedy decoding.

The document fills the cache; the question, and the answer token by token, then go through it. So
nothing of the answer is computed while the document's raw keys and values are still at hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tqai.demo.retrieval import is_correct, make_prompt
from tqai.errors import InputError
from tqai.evaluation.caches import CacheMaker, cache_maker
from tqai.evaluation.greedy import first_divergence, greedy_decode
from tqai.evaluation.intervals import Interval, wilson
from tqai.evaluation.prefill import fork_cache, prefill_caches

__all__ = ["Answer", "RetrievalReport", "RetrievalTask", "evaluate_retrieval", "make_tasks", "split_prompt"]

ANSWER_TOKENS = 12
_SETTLED = re.compile(r"\s*(\d+\D|[^\d\s])")


@dataclass(frozen=True)
class RetrievalTask:
    """One document and the questions about it.

    Attributes:
        text: the document.
        questions: what to append to it, one at a time.
        answers: the codes, in the order of the questions.
        depths: where each fact stands, 0 (start) to 1 (end).
    """

    text: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    depths: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """What the model said with one cache to one question.

    Attributes:
        correct: the continuation begins with exactly the code.
        text: the continuation.
        expected: the code.
        prompt_tokens: document and question.
        depth: where the fact stands, 0 to 1.
        first_divergence: index of the first token that differs from the uncompressed model's, or None.
    """

    correct: bool
    text: str
    expected: str
    prompt_tokens: int
    depth: float
    first_divergence: int | None


@dataclass(frozen=True)
class RetrievalReport:
    """Answers with one cache to all questions.

    Attributes:
        name: the cache.
        correct, questions: how many of how many.
        rate: correct / questions, with Wilson's 95% interval.
        same_as_uncompressed: answers equal to the uncompressed model's token by token.
        answers: one per question.
    """

    name: str
    correct: int
    questions: int
    rate: Interval
    same_as_uncompressed: int
    answers: tuple[Answer, ...]

    def to_dict(self) -> dict[str, Any]:
        """Counts, interval and the depths of the facts that were missed, fit for JSON."""
        return {
            "correct": self.correct,
            "questions": self.questions,
            "rate": self.rate.to_dict(),
            "same_as_uncompressed": self.same_as_uncompressed,
            "missed_depths": [round(answer.depth, 3) for answer in self.answers if not answer.correct],
        }


def make_tasks(
    tokenizer: Any,
    prompt_tokens: int,
    questions: int,
    questions_per_document: int = 1,
    seed: int = 0,
    depth: float | None = None,
) -> list[RetrievalTask]:
    """`questions` questions about documents made by `tqai.demo.retrieval`, the last maybe with fewer.

    Args:
        tokenizer: of the model.
        prompt_tokens: length of document and question.
        questions: how many in all, at least 1.
        questions_per_document: facts hidden in one document, at least 1.
        seed: document i has seed `seed + i`.
        depth: where the facts stand, or None for anywhere.

    Raises:
        InputError: a number below 1.
        ValueError: see `make_prompt`.
    """
    if questions < 1 or questions_per_document < 1:
        raise InputError(f"questions={questions}, questions_per_document={questions_per_document}: from 1")
    tasks = []
    for index, asked in enumerate(range(0, questions, questions_per_document)):
        facts = min(questions_per_document, questions - asked)
        made = make_prompt(tokenizer, prompt_tokens, seed + index, n_facts=facts, depth=depth)
        tasks.append(RetrievalTask(made.text, made.questions, made.answers, made.depths))
    return tasks


def evaluate_retrieval(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[RetrievalTask],
    makers: Sequence[CacheMaker],
    on_question: Callable[[int], None] | None = None,
) -> dict[str, RetrievalReport]:
    """Ask every question with every cache; each document is read by the model once.

    Args:
        model, tokenizer: a transformers causal language model and its tokenizer.
        tasks: from `make_tasks`, or made by hand.
        makers: the caches, with different names.
        on_question: called with the number of questions done, for progress bars.

    Returns:
        name -> report, in the order of `makers`.

    Raises:
        InputError: no questions.
    """
    if not any(task.questions for task in tasks):
        raise InputError("no questions")
    everyone = [cache_maker("dynamic", model, label="reference"), *makers]
    answers: dict[str, list[Answer]] = {maker.name: [] for maker in makers}
    done = 0
    for task in tasks:
        document, questions = split_prompt(tokenizer, task)
        batch = torch.tensor([document], device=model.device)
        filled = prefill_caches(model, batch, everyone)
        for index, question in enumerate(questions):
            said = [
                _decode(model, tokenizer, question, fork_cache(cache, maker, filled[0]))
                for cache, maker in zip(filled, everyone, strict=True)
            ]
            for maker, got in zip(makers, said[1:], strict=True):
                text = tokenizer.decode(got, skip_special_tokens=True)
                answers[maker.name].append(
                    Answer(
                        correct=is_correct(text, task.answers[index]),
                        text=text,
                        expected=task.answers[index],
                        prompt_tokens=len(document) + len(question),
                        depth=task.depths[index],
                        first_divergence=first_divergence(said[0], got),
                    )
                )
            done += 1
            if on_question is not None:
                on_question(done)
    return {name: _report(name, given) for name, given in answers.items()}


def split_prompt(tokenizer: Any, task: RetrievalTask) -> tuple[list[int], list[list[int]]]:
    """Token ids of the part that all prompts of a document share, and of the rest of each prompt.

    The whole prompt is tokenized and then cut, so that the ids are those of an undivided prompt. A
    special token that a tokenizer puts at the end is not part of a prompt and is left away.
    """
    prompts = [list(tokenizer.encode(task.text + question)) for question in task.questions]
    end = getattr(tokenizer, "eos_token_id", None)
    prompts = [ids[:-1] if end is not None and ids[-1] == end else ids for ids in prompts]
    alone = list(tokenizer.encode(task.text))
    shared = min(len(alone), *(len(ids) - 1 for ids in prompts))
    for ids in prompts:
        differing = first_divergence(alone[:shared], ids[:shared])
        shared = shared if differing is None else differing
    return prompts[0][:shared], [ids[shared:] for ids in prompts]


def _decode(model: Any, tokenizer: Any, question: list[int], cache: Any) -> list[int]:
    """The continuation of what `cache` holds and the question. Changes the cache."""

    def finished(ids: list[int]) -> bool:
        ended = ids[-1] == getattr(tokenizer, "eos_token_id", None)
        return ended or _SETTLED.match(tokenizer.decode(ids)) is not None

    return greedy_decode(model, torch.tensor([question], device=model.device), cache, ANSWER_TOKENS, finished)


def _report(name: str, answers: Sequence[Answer]) -> RetrievalReport:
    correct = sum(answer.correct for answer in answers)
    same = sum(answer.first_divergence is None for answer in answers)
    return RetrievalReport(name, correct, len(answers), wilson(correct, len(answers)), same, tuple(answers))
