"""`tqai run`: generate from a prompt with a compressed cache, token by token."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from tqai.cli.cache_options import NO_OPTIONS, CacheOptions, with_cache_options
from tqai.cli.measure import CacheFigures, compressed_cache, figures_of, stop_ids, uncompressed_cache
from tqai.cli.models import WRONG_USAGE, LoadedModel, load_model
from tqai.cli.options import (
    DeviceOption,
    DtypeOption,
    FileOption,
    JsonOption,
    ModelOption,
)
from tqai.cli.prompts import check_new_tokens, read_text, token_ids
from tqai.cli.report import CommandError, format_bytes, print_json, warn

__all__ = ["run"]


@with_cache_options
def run(
    prompt: Annotated[str, typer.Argument(help="What the model continues.")],
    model: ModelOption = None,
    file: FileOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.", show_default="none")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the chat template.")] = False,
    no_tqai: Annotated[bool, typer.Option("--no-tqai", help="Leave the cache uncompressed.")] = False,
    cache: CacheOptions = NO_OPTIONS,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = False,
) -> None:
    """Generate text with a compressed cache; tokens appear as they come, the cache's figures on stderr."""
    cache.settings()  # what is wrong is said before a model is loaded
    check_new_tokens(max_tokens)
    if not temperature >= 0 or temperature == float("inf"):
        raise CommandError(f"--temperature {temperature}: allowed are numbers from 0", WRONG_USAGE)
    text = read_text(file)
    loaded = load_model(cache.model_source(model), device, dtype, cache.backend)
    settings = cache.settings_for(loaded.model)
    input_ids = token_ids(loaded, prompt, text, chat, max_tokens)
    with ExitStack() as stack:
        if no_tqai:
            held, label = uncompressed_cache(loaded.model), "uncompressed"
        else:
            held, label = stack.enter_context(compressed_cache(loaded.model, settings)), settings.label
        streamer = _streamer(loaded, silent=json)
        ids = _generate(loaded, input_ids, held, streamer, max_tokens, temperature, seed)
        figures = figures_of(held, label)
    speed = streamer.tokens_per_second()
    if json:
        print_json(
            {
                "model": loaded.name,
                "text": loaded.tokenizer.decode(ids, skip_special_tokens=True),
                "token_ids": ids,
                "prompt_tokens": input_ids.shape[1],
                "new_tokens": len(ids),
                "first_token_seconds": streamer.first_token_seconds(),
                "tokens_per_second": speed,
                "cache": figures.to_dict(),
            }
        )
    else:
        warn(_summary(figures, input_ids.shape[1], len(ids), speed))


def _generate(
    loaded: LoadedModel,
    input_ids: Any,
    cache: Any,
    streamer: Any,
    max_tokens: int,
    temperature: float,
    seed: int | None,
) -> list[int]:
    stop = sorted(stop_ids(loaded.model, loaded.tokenizer))
    if hasattr(loaded.model, "mlx"):
        found: list[int] = loaded.model.generate(
            input_ids, cache, streamer, max_tokens, temperature, seed, stop
        )
        return found
    import torch

    if seed is not None:
        torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    output = loaded.model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        past_key_values=cache,
        max_new_tokens=max_tokens,
        streamer=streamer,
        eos_token_id=stop or None,
        pad_token_id=stop[0] if stop else None,
        **sampling,
    )
    ids: list[int] = output[0, input_ids.shape[1] :].tolist()
    return ids


def _streamer(loaded: LoadedModel, silent: bool) -> Any:
    """A streamer that prints words as they are complete (unless `silent`) and keeps the time."""
    from transformers import TextStreamer

    class TimedStreamer(TextStreamer):
        def __init__(self) -> None:
            super().__init__(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if not silent:
                print(text, end="\n" if stream_end else "", flush=True)

        def first_token_seconds(self) -> float | None:
            # the first call hands over the prompt, before the prefill
            return self.times[1] - self.times[0] if len(self.times) > 1 else None

        def tokens_per_second(self) -> float | None:
            if len(self.times) < 3:
                return None
            return (len(self.times) - 2) / (self.times[-1] - self.times[1])

    return TimedStreamer()


def _summary(figures: CacheFigures, prompt_tokens: int, new_tokens: int, speed: float | None) -> str:
    parts = [f"{prompt_tokens} + {new_tokens} tokens"]
    if speed is not None:
        parts.append(f"{speed:.1f} tokens/s")
    held = format_bytes(figures.held_bytes)
    parts.append(f"cache {figures.label}: {held}, {figures.bits_per_value:.2f} bits per value")
    if figures.details is not None:
        parts.append(f"backend {figures.details['backend']}")
    return "; ".join(parts)
