"""The retrieval task: codes hidden in a document, asked for at its end.

A document is text from ``document.txt``, which was held out of training, with
lines ``The secret code for NAME is DIGITS.`` between its own lines.  Besides the
facts that are asked for there are always distractors: the same kind of line about
other names.  A model that keeps the whole context answers with the six digits; one
whose cache lost something does not.

Pure Python: needs a tokenizer only to count tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

CODE_DIGITS = 6
SLACK = 40  # a prompt is at most this many tokens shorter than asked for


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ONSETS = _words("b br d dr f g gr h j k kl l m n p pr qu r s sk st t tr v w y z")
_VOWELS = _words("a e i o u ai ea io ou")
_CODAS = ("", *_words("b d g k l m n p r s t x nd rk st"))


class Tokenizer(Protocol):
    """The one method that the task needs of a tokenizer."""

    def encode(self, text: str) -> Sequence[int]:
        """The token ids of ``text``, special tokens included if it adds any."""
        ...


@dataclass(frozen=True)
class RetrievalPrompt:
    """A document with hidden facts, and the questions about them.

    The prompt of question ``i`` is ``text + questions[i]``; the model's greedy
    continuation should begin with ``answers[i]`` (see :func:`is_correct`).

    Attributes:
        text: the document, facts and distractors included.
        questions: what to append to ``text``, one for each fact.
        answers: the codes, strings of six digits, in the order of ``questions``.
        names: the names asked for, in the same order.
        depths: where each fact stands, as a fraction of the document's characters.
    """

    text: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    names: tuple[str, ...]
    depths: tuple[float, ...]

    def prompt(self, index: int = 0) -> str:
        """The full prompt of one question."""
        return self.text + self.questions[index]


def random_name(rng: random.Random) -> str:
    """Two invented capitalised words; there are more than 10**10 of them."""

    def word() -> str:
        parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2)]
        return ("".join(parts) + rng.choice(_CODAS)).capitalize()

    return f"{word()} {word()}"


def fact(name: str, code: str) -> str:
    """The hidden line, without its line break."""
    return f"The secret code for {name} is {code}."


def question(name: str) -> str:
    """What follows the document; the answer follows it after one space."""
    return f"\n\nQuestion: What is the secret code for {name}?\nAnswer: The secret code for {name} is"


@cache
def document() -> str:
    """The held-out text that prompts are made of."""
    return (Path(__file__).resolve().parent / "document.txt").read_text(encoding="utf-8")


def _filler(start: int, n_chars: int) -> str:
    """About ``n_chars`` characters from ``start`` on, around the end if need be."""
    source = document()
    if not 0 < n_chars <= len(source):
        raise ValueError(
            f"the demo document has {len(source)} characters, {n_chars} are needed; ask for a shorter prompt"
        )
    text = (source + source)[start : start + n_chars]
    word_end = max(text.rfind(" "), text.rfind("\n"))
    return text[:word_end] if word_end > len(text) - 24 else text


def _insert(filler: str, lines: Sequence[tuple[float, str]]) -> str:
    """Put each (depth, line) at the line break nearest to its depth."""
    breaks = [0, *(m.end() for m in re.finditer(r"\n", filler)), len(filler)]
    placed = sorted(
        (min(breaks, key=lambda b: abs(b - d * len(filler))), i, line) for i, (d, line) in enumerate(lines)
    )
    out, last = [], 0
    for at, _, line in placed:
        piece = filler[last:at]
        out.append(piece if not piece or piece.endswith("\n") else piece + "\n")
        out.append(line + "\n")
        last = at
    return "".join([*out, filler[last:]])


def make_prompt(
    tokenizer: Tokenizer,
    n_tokens: int,
    seed: int,
    n_facts: int = 1,
    depth: float | None = None,
    n_distractors: int = 3,
) -> RetrievalPrompt:
    """Build one document of a given length, the same for the same arguments.

    Args:
        tokenizer: counts the tokens.
        n_tokens: each prompt (document and one question) has at most this many
            tokens, and the longest at least ``n_tokens - 40``.
        seed: chooses the text, the names, the codes and the places.
        n_facts: how many facts are asked for.
        depth: where the facts stand, 0 (start) to 1 (end); ``None`` means anywhere.
        n_distractors: how many further facts there are, always anywhere.

    Raises:
        ValueError: the facts do not fit into ``n_tokens``, or the demo document is
            too short for it, or an argument is out of range.
    """
    if n_facts < 1 or n_distractors < 0:
        raise ValueError("n_facts must be at least 1 and n_distractors at least 0")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth must be between 0 and 1, not {depth}")
    rng = random.Random(f"tqai-retrieval-{seed}")
    names: list[str] = []
    codes: list[str] = []
    while len(names) < n_facts + n_distractors:
        name, code = random_name(rng), "".join(rng.choices("0123456789", k=CODE_DIGITS))
        if name not in names and code not in codes:
            names.append(name)
            codes.append(code)
    depths = [rng.random() for _ in names]
    if depth is not None:
        depths[:n_facts] = [depth] * n_facts
    lines = [(d, fact(n, c)) for d, n, c in zip(depths, names, codes, strict=True)]
    start = rng.randrange(len(document()))
    questions = tuple(question(n) for n in names[:n_facts])
    longest = max(questions, key=lambda q: len(tokenizer.encode(q)))

    def size(text: str) -> int:
        return len(tokenizer.encode(text + longest))

    fixed = size(_insert("\n", lines))
    if fixed + 16 > n_tokens:
        raise ValueError(f"the facts and a question take {fixed} tokens: {n_tokens} tokens are too few")
    low, high = 1, min(len(document()), 12 * n_tokens)
    guess = 14 * (n_tokens - fixed) // 5
    while True:  # secant steps, kept inside a shrinking bracket
        guess = min(max(guess, low), high)
        text = _insert(_filler(start, guess), lines)
        got = size(text)
        if n_tokens - SLACK <= got <= n_tokens:
            break
        if got > n_tokens:
            high = guess - 1
        else:
            low = guess + 1
        if low > high:
            raise ValueError(f"the demo document is too short for {n_tokens} tokens")
        step = guess + round((n_tokens - SLACK // 2 - got) * guess / max(got - fixed, 1))
        guess = step if low <= step <= high else (low + high) // 2
    found = tuple(text.index(line) / len(text) for _, line in lines[:n_facts])
    return RetrievalPrompt(text, questions, tuple(codes[:n_facts]), tuple(names[:n_facts]), found)


def is_correct(generated_text: str, answer: str) -> bool:
    """Whether a continuation begins with exactly the code ``answer``."""
    match = re.match(r"\s*(\d+)", generated_text)
    return match is not None and match[1] == answer
