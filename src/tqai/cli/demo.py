"""`tqai demo`: the embedded model reads a long document and answers, uncompressed and compressed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tqai.cli.cache_options import NO_OPTIONS, CacheOptions, with_cache_options
from tqai.cli.measure import (
    CacheFigures,
    Decoded,
    compressed_cache,
    decode,
    figures_of,
    fill,
    speed_of,
    stop_ids,
    uncompressed_cache,
)
from tqai.cli.models import WRONG_USAGE, LoadedModel, load_model
from tqai.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
)
from tqai.cli.prompts import check_new_tokens
from tqai.cli.report import CommandError, Steps, console, print_json, steps
from tqai.cli.tables import cache_columns, cache_rows

if TYPE_CHECKING:
    import torch

    from tqai.demo import RetrievalPrompt

__all__ = ["demo"]

WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Reader:
    """What one cache made of the document.

    Attributes:
        figures: what the cache held after the document.
        prefill_seconds: time to read the document.
        answers: one per question.
        texts: the answers' text.
        right: whether each begins with the hidden code.
    """

    figures: CacheFigures
    prefill_seconds: float
    answers: list[Decoded]
    texts: list[str]
    right: list[bool]


@with_cache_options
def demo(
    tokens: Annotated[int, typer.Option(help="Length of the document, in tokens.")] = 8000,
    facts: Annotated[int, typer.Option(help="Hidden facts that are asked for.")] = 5,
    seed: Annotated[int, typer.Option(help="Chooses the document, the facts and their places.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 16,
    model: ModelOption = None,
    cache: CacheOptions = NO_OPTIONS,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = False,
) -> None:
    """Let the embedded model find facts in a long document, with and without compression of its cache."""
    cache.settings()  # what is wrong is said before a model is loaded
    check_new_tokens(max_tokens)
    if facts < 1:
        raise CommandError(f"--facts {facts}: allowed are whole numbers from 1", WRONG_USAGE)
    loaded = load_model(cache.model_source(model), device, dtype, cache.backend)
    settings = cache.settings_for(loaded.model)
    prompt, document_ids, question_ids = _document(loaded, tokens, facts, seed, max_tokens)
    with steps(2 * (facts + 1)) as progress:
        progress.begin("warming up")
        fill(loaded.model, document_ids[:, :WARM_UP_TOKENS], uncompressed_cache(loaded.model))
        plain = _read(
            loaded,
            uncompressed_cache(loaded.model),
            "uncompressed",
            prompt,
            document_ids,
            question_ids,
            max_tokens,
            progress,
        )
        with compressed_cache(loaded.model, settings) as held:
            packed = _read(
                loaded, held, settings.label, prompt, document_ids, question_ids, max_tokens, progress
            )
    differences = _differences(plain, packed)
    if json:
        print_json(_as_json(loaded, prompt, document_ids.shape[1], plain, packed, differences))
    else:
        _print_tables(loaded, prompt, document_ids.shape[1], plain, packed, differences)


def _document(
    loaded: LoadedModel, tokens: int, facts: int, seed: int, max_tokens: int
) -> tuple[RetrievalPrompt, torch.Tensor, list[torch.Tensor]]:
    """The prompt, the ids `[1, n]` that all questions share, and the ids `[1, m]` of each question."""
    from tqai.demo import make_prompt

    limit = loaded.context_tokens
    if limit is not None and tokens + max_tokens > limit:
        raise CommandError(
            f"--tokens {tokens} and {max_tokens} for an answer: {loaded.name} has only {limit} positions",
            WRONG_USAGE,
        )
    try:
        prompt = make_prompt(loaded.tokenizer, tokens, seed, n_facts=facts)
    except ValueError as error:
        raise CommandError(f"--tokens {tokens} --facts {facts}: {error}", WRONG_USAGE) from error
    full = [loaded.tokenizer.encode(prompt.prompt(index)) for index in range(facts)]
    shared = _common_length([*full, loaded.tokenizer.encode(prompt.text)])
    return prompt, loaded.batch(full[0][:shared]), [loaded.batch(ids[shared:]) for ids in full]


def _common_length(sequences: Sequence[Sequence[int]]) -> int:
    """How many first items all sequences share."""
    shared = 0
    for items in zip(*sequences, strict=False):
        if len(set(items)) > 1:
            break
        shared += 1
    return shared


def _read(
    loaded: LoadedModel,
    cache: Any,
    label: str,
    prompt: RetrievalPrompt,
    document_ids: torch.Tensor,
    question_ids: list[torch.Tensor],
    max_tokens: int,
    progress: Steps,
) -> Reader:
    """Read the document once, then answer each question on a copy of the cache."""
    from tqai.demo import is_correct

    progress.begin(f"{label}: reading")
    seconds = fill(loaded.model, document_ids, cache)
    figures = figures_of(cache, label)
    progress.done()
    stop = stop_ids(loaded.model, loaded.tokenizer)
    answers = []
    for number, ids in enumerate(question_ids, start=1):
        progress.begin(f"{label}: question {number}")
        answers.append(decode(loaded.model, ids, copy.deepcopy(cache), max_tokens, stop))
        progress.done()
    texts = [loaded.tokenizer.decode(answer.ids, skip_special_tokens=True) for answer in answers]
    right = [is_correct(text, code) for text, code in zip(texts, prompt.answers, strict=True)]
    return Reader(figures, seconds, answers, texts, right)


def _differences(plain: Reader, packed: Reader) -> list[int | None]:
    from tqai.evaluation.greedy import first_divergence

    pairs = zip(plain.answers, packed.answers, strict=True)
    return [first_divergence(left.ids, right.ids) for left, right in pairs]


def _as_json(
    loaded: LoadedModel,
    prompt: RetrievalPrompt,
    tokens: int,
    plain: Reader,
    packed: Reader,
    differences: list[int | None],
) -> dict[str, Any]:
    questions = []
    for index, name in enumerate(prompt.names):
        questions.append(
            {
                "name": name,
                "code": prompt.answers[index],
                "depth": prompt.depths[index],
                "uncompressed": {"text": plain.texts[index], "right": plain.right[index]},
                "compressed": {"text": packed.texts[index], "right": packed.right[index]},
                "first_difference": differences[index],
            }
        )
    sides = {"uncompressed": plain, "compressed": packed}
    return {
        "model": loaded.name,
        "document_tokens": tokens,
        "questions": questions,
        **{
            name: {
                "right": sum(reader.right),
                "prefill_seconds": reader.prefill_seconds,
                "tokens_per_second": speed_of(reader.answers),
                "cache": reader.figures.to_dict(),
            }
            for name, reader in sides.items()
        },
    }


def _print_tables(
    loaded: LoadedModel,
    prompt: RetrievalPrompt,
    tokens: int,
    plain: Reader,
    packed: Reader,
    differences: list[int | None],
) -> None:
    from rich.table import Table

    out = console()
    readers = (plain, packed)
    title = f"{loaded.name}: {len(prompt.names)} facts hidden in {tokens} tokens"
    table = Table(
        "What is the secret code for ...",
        "hidden at",
        "code",
        *(r.figures.label for r in readers),
        title=title,
    )
    for index, name in enumerate(prompt.names):
        answers = [_answer_cell(reader.texts[index], reader.right[index]) for reader in readers]
        table.add_row(name, f"{prompt.depths[index]:.0%}", prompt.answers[index], *answers)
    out.print(table)

    table = Table("The cache after the document", *cache_columns(loaded.model, plain.figures, packed.figures))
    for row in cache_rows([reader.figures for reader in readers]):
        table.add_row(*row)
    table.add_row("reading the document", *(f"{reader.prefill_seconds:.1f} s" for reader in readers))
    speeds = [speed_of(reader.answers) for reader in readers]
    table.add_row("answering", *("-" if speed is None else f"{speed:.1f} tokens/s" for speed in speeds))
    table.add_row("right answers", *(f"{sum(reader.right)} of {len(reader.right)}" for reader in readers))
    out.print(table)
    out.print(_difference_sentence(differences, sum(len(answer.ids) for answer in plain.answers)))


def _answer_cell(text: str, right: bool) -> str:
    from rich.markup import escape

    words = text.split("\n")[0].strip()[:24] or "(nothing)"
    return f"[green]✓[/] {escape(words)}" if right else f"[red]✗[/] {escape(words)}"


def _difference_sentence(differences: list[int | None], tokens: int) -> str:
    for question, token in enumerate(differences, start=1):
        if token is not None:
            return f"The first token that differs is number {token + 1} of answer {question}."
    return f"All {tokens} decoded tokens are the same."
