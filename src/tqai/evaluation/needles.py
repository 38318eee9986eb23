"""Retrieval by kind, length and depth.

single   one code in a long text, among three others that are not asked for
multi    four codes in one text, asked for one at a time
lookup   a table of codes and nothing else, of which four are asked for: every line competes
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqai.demo.retrieval import CODE_DIGITS, fact, question, random_name
from tqai.errors import InputError
from tqai.evaluation.caches import CacheMaker
from tqai.evaluation.retrieval import RetrievalReport, RetrievalTask, evaluate_retrieval, make_tasks

__all__ = ["KINDS", "NeedleCell", "evaluate_needles", "lookup_tasks", "make_needles"]

KINDS = ("single", "multi", "lookup")
FACTS_PER_DOCUMENT = 4


@dataclass(frozen=True)
class NeedleCell:
    """Questions of one kind, length and depth.

    Attributes:
        kind: "single", "multi" or "lookup".
        prompt_tokens: a prompt has at most this many tokens.
        depth: where the codes stand, 0 (start) to 1 (end); None for anywhere.
        tasks: the documents with their questions.
    """

    kind: str
    prompt_tokens: int
    depth: float | None
    tasks: tuple[RetrievalTask, ...]

    @property
    def questions(self) -> int:
        """How many questions."""
        return sum(len(task.questions) for task in self.tasks)


def make_needles(
    tokenizer: Any,
    lengths: Sequence[int],
    kinds: Sequence[str] = KINDS,
    depths: Sequence[float | None] = (None,),
    questions: int = 8,
    seed: int = 0,
) -> list[NeedleCell]:
    """Cells for every kind and length; "single" at every depth, the others at depths of their own.

    Args:
        questions: per cell.
        seed: the same arguments give the same documents.

    Raises:
        InputError: an unknown kind, or a number below 1.
        ValueError: see `make_prompt`.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not lengths or not kinds:
        raise InputError(f"kinds {unknown or list(kinds)}, lengths {list(lengths)}: kinds are {KINDS}")
    cells = []
    for kind in kinds:
        for tokens in lengths:
            for depth in depths if kind == "single" else (None,):
                if kind == "lookup":
                    tasks = lookup_tasks(tokenizer, tokens, questions, seed)
                else:
                    per_document = 1 if kind == "single" else FACTS_PER_DOCUMENT
                    tasks = make_tasks(tokenizer, tokens, questions, per_document, seed, depth)
                cells.append(NeedleCell(kind, tokens, depth, tuple(tasks)))
    return cells


def lookup_tasks(tokenizer: Any, prompt_tokens: int, questions: int, seed: int = 0) -> list[RetrievalTask]:
    """Documents that are tables of codes, up to `prompt_tokens` with a question; four questions each.

    Raises:
        InputError: fewer than 1 question, or too few tokens for four lines.
    """
    if questions < 1:
        raise InputError(f"questions={questions}: allowed are whole numbers from 1")
    tasks = []
    for index, asked in enumerate(range(0, questions, FACTS_PER_DOCUMENT)):
        rng = random.Random(f"tqai-lookup-{seed + index}")
        lines: list[str] = []
        names: list[str] = []
        codes: list[str] = []
        used = 0
        while True:
            name, code = random_name(rng), "".join(rng.choices("0123456789", k=CODE_DIGITS))
            line = fact(name, code) + "\n"
            cost = len(tokenizer.encode(line))
            if used + cost + len(tokenizer.encode(question(name))) + 8 > prompt_tokens:
                break
            if name not in names and code not in codes:
                used += cost
                lines.append(line)
                names.append(name)
                codes.append(code)
        wanted = min(FACTS_PER_DOCUMENT, questions - asked)
        if len(lines) < wanted:
            raise InputError(f"prompt_tokens={prompt_tokens}: too few for {wanted} lines and a question")
        chosen = sorted(rng.sample(range(len(lines)), wanted))
        tasks.append(
            RetrievalTask(
                "".join(lines),
                tuple(question(names[i]) for i in chosen),
                tuple(codes[i] for i in chosen),
                tuple(i / len(lines) for i in chosen),
            )
        )
    return tasks


def evaluate_needles(
    model: Any,
    tokenizer: Any,
    cells: Sequence[NeedleCell],
    makers: Sequence[CacheMaker],
    on_cell: Callable[[int], None] | None = None,
) -> dict[str, list[RetrievalReport]]:
    """Reports of every cache, one per cell and in their order; see `evaluate_retrieval`."""
    found: dict[str, list[RetrievalReport]] = {maker.name: [] for maker in makers}
    for done, cell in enumerate(cells, start=1):
        for name, report in evaluate_retrieval(model, tokenizer, cell.tasks, makers).items():
            found[name].append(report)
        if on_cell is not None:
            on_cell(done)
    return found
