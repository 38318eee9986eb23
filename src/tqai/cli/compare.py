"""`tqai compare`: one prompt, uncompressed and compressed, side by side."""

from __future__ import annotations

from typing import Annotated, Any

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
from tqai.cli.models import LoadedModel, load_model
from tqai.cli.options import (
    DeviceOption,
    DtypeOption,
    FileOption,
    JsonOption,
    ModelOption,
)
from tqai.cli.prompts import check_new_tokens, read_text, token_ids
from tqai.cli.report import console, print_json, steps
from tqai.cli.tables import cache_columns, cache_rows, describe_difference

__all__ = ["compare"]


@with_cache_options
def compare(
    prompt: Annotated[str, typer.Argument(help="What the model continues.")],
    model: ModelOption = None,
    file: FileOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template.")] = False,
    cache: CacheOptions = NO_OPTIONS,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = False,
) -> None:
    """Decode the most likely tokens with an uncompressed and with a compressed cache, and compare."""
    cache.settings()  # what is wrong is said before a model is loaded
    check_new_tokens(max_tokens)
    text = read_text(file)
    loaded = load_model(cache.model_source(model), device, dtype, cache.backend)
    settings = cache.settings_for(loaded.model)
    input_ids = token_ids(loaded, prompt, text, chat, max_tokens)
    with steps(2) as progress:
        progress.begin("uncompressed")
        plain = _one_side(loaded, input_ids, uncompressed_cache(loaded.model), "uncompressed", max_tokens)
        progress.done()
        progress.begin(settings.label)
        with compressed_cache(loaded.model, settings) as held:
            packed = _one_side(loaded, input_ids, held, settings.label, max_tokens)
        progress.done()

    from tqai.evaluation.greedy import first_divergence

    difference = first_divergence(plain[1].ids, packed[1].ids)
    if json:
        print_json(
            {
                "model": loaded.name,
                "prompt_tokens": input_ids.shape[1],
                "uncompressed": _side_json(loaded, *plain),
                "compressed": _side_json(loaded, *packed),
                "first_difference": difference,
            }
        )
    else:
        _print_tables(loaded, plain, packed, difference)


Side = tuple[CacheFigures, Decoded, float]


def _one_side(loaded: LoadedModel, input_ids: Any, cache: Any, label: str, max_tokens: int) -> Side:
    """Figures of the cache at the end, the decoded tokens, and the seconds of the prefill."""
    stop = stop_ids(loaded.model, loaded.tokenizer)
    prefill_seconds = fill(loaded.model, input_ids[:, :-1], cache)
    decoded = decode(loaded.model, input_ids[:, -1:], cache, max_tokens, stop)
    return figures_of(cache, label), decoded, prefill_seconds


def _side_json(
    loaded: LoadedModel, figures: CacheFigures, decoded: Decoded, prefill_seconds: float
) -> dict[str, Any]:
    return {
        "text": loaded.tokenizer.decode(decoded.ids, skip_special_tokens=True),
        "token_ids": decoded.ids,
        "prefill_seconds": prefill_seconds,
        "tokens_per_second": speed_of([decoded]),
        "cache": figures.to_dict(),
    }


def _print_tables(loaded: LoadedModel, plain: Side, packed: Side, difference: int | None) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    for figures, decoded, _ in (plain, packed):
        out.rule(figures.label, align="left")
        out.print(Text(loaded.tokenizer.decode(decoded.ids, skip_special_tokens=True)))
    table = Table("", *cache_columns(loaded.model, plain[0], packed[0]))
    for row in cache_rows([side[0] for side in (plain, packed)]):
        table.add_row(*row)
    table.add_row("prefill", *(f"{side[2]:.2f} s" for side in (plain, packed)))
    speeds = [speed_of([side[1]]) for side in (plain, packed)]
    table.add_row("decoding", *("-" if speed is None else f"{speed:.1f} tokens/s" for speed in speeds))
    out.print(table)
    out.print(describe_difference(difference, len(plain[1].ids)))
