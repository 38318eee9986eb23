"""`tqai chat`: a conversation in the terminal, with a local model or a server."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tqai.cli.models import WRONG_USAGE, load_model
from tqai.cli.options import (
    BackendOption,
    BitsK,
    BitsV,
    Codec,
    DeviceOption,
    DtypeOption,
    LastLayerBits,
    ModelOption,
    Offsets,
    ResidualWindow,
    ScaleFormat,
    ServedConfigOption,
    SinkTokens,
    cache_config,
)
from tqai.cli.report import CommandError, console, format_bytes, warn
from tqai.cli.serve import EMBEDDED_TEMPLATE, KEY_VARIABLE, NEEDED

if TYPE_CHECKING:
    from tqai.server.engine.engine import Engine

__all__ = ["chat"]

HELP = "/stats shows the cache, /reset forgets the conversation, /quit or Ctrl-D ends"
SECONDS = 600.0


def chat(
    model: ModelOption = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Server to talk to, such as http://127.0.0.1:8000, instead of a local model.",
            show_default="none",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help=f"Key for the server; also read from ${KEY_VARIABLE}.", show_default="none"),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.", show_default="none")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=2.0, help="0 takes the most likely token.")
    ] = 0.7,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.", show_default="none")] = None,
    config: ServedConfigOption = None,
    bits_k: BitsK = None,
    bits_v: BitsV = None,
    sink_tokens: SinkTokens = None,
    residual_window: ResidualWindow = None,
    codec: Codec = None,
    offsets: Offsets = None,
    scale_format: ScaleFormat = None,
    last_layer_bits: LastLayerBits = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Talk to a model over several turns; the answer appears as it comes. /stats shows the cache."""
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        **({} if seed is None else {"seed": seed}),
    }
    if url is not None:
        if model is not None:
            raise CommandError("--url: the server has its model, so it excludes --model", WRONG_USAGE)
        key = api_key or os.environ.get(KEY_VARIABLE, "").split(",")[0]
        with _Remote(url.rstrip("/"), key) as partner:
            _converse(partner, system, sampling)
        return
    from tqai.server.engine.settings import SERVER_PRESET

    settings = cache_config(
        config,
        default=SERVER_PRESET,
        bits_k=bits_k,
        bits_v=bits_v,
        sink_tokens=sink_tokens,
        residual_window=residual_window,
        codec=codec,
        offsets=offsets,
        scale_format=scale_format,
        last_layer_bits=last_layer_bits,
        backend=backend,
    )
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise CommandError(f"chat needs {', '.join(missing)}: pip install 'tqai[serve]'")
    loaded = load_model(model, device, dtype)
    template = EMBEDDED_TEMPLATE if loaded.embedded else getattr(loaded.tokenizer, "chat_template", None)
    if template is None:
        raise CommandError(f"model {loaded.name} has no chat template; `tqai run` continues plain text")

    from tqai.server.engine.engine import Engine
    from tqai.server.engine.settings import EngineSettings

    settings = settings.by_layer(loaded.model.config.get_text_config(decoder=True).num_hidden_layers)
    engine = Engine(
        loaded.model, loaded.tokenizer, EngineSettings(cache=settings, max_running=1, max_waiting=0)
    )
    engine.start()
    try:
        _converse(_Local(engine, template), system, sampling)
    finally:
        engine.stop()


def _converse(partner: _Local | _Remote, system: str | None, sampling: dict[str, Any]) -> None:
    screen = console()
    messages = [] if system is None else [{"role": "system", "content": system}]
    opening = len(messages)
    if sys.stdin.isatty():
        warn(HELP)
    while True:
        try:
            text = screen.input("[bold]> [/bold]") if sys.stdin.isatty() else input()
        except EOFError:
            return
        word = text.strip()
        if not word:
            continue
        if word in ("/quit", "/exit"):
            return
        if word == "/reset":
            del messages[opening:]
        elif word == "/stats":
            screen.print(partner.stats(), markup=False, highlight=False, soft_wrap=True)
        elif word.startswith("/"):
            warn(HELP)
        else:
            messages.append({"role": "user", "content": text})
            try:
                answer = _show(screen, partner.answer(messages, sampling))
            except CommandError as error:
                messages.pop()
                warn(str(error))
                continue
            messages.append({"role": "assistant", "content": answer})


def _show(screen: Any, pieces: Iterator[str]) -> str:
    """Print the pieces as they come. Ctrl-C ends the answer, not the conversation."""
    answer = ""
    try:
        for piece in pieces:
            answer += piece
            screen.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
    screen.print()
    return answer


class _Local:
    """A model in this process."""

    def __init__(self, engine: Engine, template: str) -> None:
        self._engine, self._template = engine, template
        self._last: Any = None

    def answer(self, messages: list[dict[str, str]], sampling: dict[str, Any]) -> Iterator[str]:
        """The answer, piece by piece."""
        import queue

        from tqai.server.engine.sampling import SamplingParams
        from tqai.server.engine.sequence import Delta, Finished, GenerationRequest

        tokenizer = self._engine.tokenizer
        text = tokenizer.apply_chat_template(
            messages, chat_template=self._template, add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer.encode(text, add_special_tokens=False)
        room = max(self._engine.max_model_len - len(prompt), 1)
        params = SamplingParams(**{**sampling, "max_tokens": min(sampling["max_tokens"], room)})
        events: queue.Queue[Any] = queue.Queue()
        try:
            sequence = self._engine.submit(GenerationRequest(prompt, params), events.put)
        except ValueError as error:
            raise CommandError(f"{error}; /reset starts anew") from error
        try:
            while True:
                event = events.get()
                if isinstance(event, Delta):
                    yield event.text
                    continue
                if not isinstance(event, Finished):
                    raise CommandError(event.message)
                self._last = event
                return
        finally:
            if sequence.outcome is None:
                self._engine.cancel(sequence)

    def stats(self) -> str:
        """The cache in a few lines."""
        figures = self._engine.figures()
        return _stats(
            {
                **{name: getattr(figures, name) for name in figures.__dataclass_fields__},
                "cache": self._engine.settings.label,
                "backend": self._engine.store.codes[0].name,
            },
            self._last and (self._last.prompt_tokens, self._last.output_tokens, self._last.cached_tokens),
            self._engine.store.pool.page_bytes,
            self._engine.bf16_bytes_per_token,
        )


class _Remote:
    """A server."""

    def __init__(self, url: str, key: str) -> None:
        try:
            import httpx
        except ImportError as error:
            raise CommandError("--url needs httpx: pip install httpx") from error
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=SECONDS)
        self._url, self._failed = url, httpx.HTTPError
        self._usage: dict[str, Any] | None = None
        try:
            self._model = self._read(lambda: self._http.get("/v1/models"))["data"][0]["id"]
        except CommandError:
            self._http.close()
            raise

    def __enter__(self) -> _Remote:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def answer(self, messages: list[dict[str, str]], sampling: dict[str, Any]) -> Iterator[str]:
        """The answer, piece by piece."""
        body = {"model": self._model, "messages": messages, "stream": True, **sampling}
        body["stream_options"] = {"include_usage": True}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    raise CommandError(_message(answer))
                for line in answer.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise CommandError(event["error"]["message"])
                    self._usage = event.get("usage") or self._usage
                    for choice in event.get("choices", []):
                        yield choice["delta"].get("content") or ""
        except self._failed as error:
            raise CommandError(f"{self._url}: {type(error).__name__}") from error

    def stats(self) -> str:
        """The server's cache in a few lines."""
        figures = self._read(lambda: self._http.get("/status.json"))
        last = None
        if self._usage is not None:
            details = self._usage.get("prompt_tokens_details") or {}
            last = (
                self._usage["prompt_tokens"],
                self._usage["completion_tokens"],
                details.get("cached_tokens", 0),
            )
        return _stats(figures, last, figures["page_bytes"], figures["bf16_bytes_per_token"])

    def _read(self, ask: Callable[[], Any]) -> Any:
        try:
            answer = ask()
        except self._failed as error:
            raise CommandError(f"{self._url}: {type(error).__name__}") from error
        if answer.status_code != 200:
            raise CommandError(_message(answer))
        return answer.json()


def _message(answer: Any) -> str:
    try:
        return f"{answer.status_code}: {answer.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"the server answered {answer.status_code}"


def _stats(
    figures: dict[str, Any], last: tuple[int, int, int] | None, page_bytes: int, bf16_per_token: float
) -> str:
    per_token = page_bytes / 64
    lines = []
    if last is not None:
        prompt, output, cached = last
        tokens = prompt + output
        lines += [
            f"last turn     {prompt} prompt tokens, {cached} of them from the cache, {output} generated",
            f"conversation  {tokens} tokens: {format_bytes(round(tokens * per_token))}, "
            f"{format_bytes(round(tokens * bf16_per_token))} in bfloat16",
        ]
    pages = figures["request_pages"] + figures["cached_pages"]
    lines += [
        f"cache         {figures['cache']} on {figures['backend']}: {per_token:.0f} bytes per token, "
        f"{bf16_per_token / per_token:.2f} times less than bfloat16",
        f"pool          {pages} of {figures['pages']} pages held, {format_bytes(pages * page_bytes)}",
    ]
    return "\n".join(lines)
