"""`tqai serve`: the OpenAI-compatible server, also as `turboquant-server`."""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tqai.cli.models import WRONG_USAGE, LoadedModel, load_model
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
from tqai.cli.report import CommandError, format_bytes, warn

__all__ = ["check_address", "serve", "turboquant_server"]

EMBEDDED_NAME = "tqai-demo"
EMBEDDED_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{{ '' if loop.last else '\n\n' }}{% endfor %}"
)
"""The embedded model continues text and knows no roles: the messages are its text."""
KEY_VARIABLE = "TQAI_API_KEYS"
NEEDED = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "llguidance")
UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}

_LIMITS, _ACCESS = "Limits", "Access"


def serve(
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to bind to.", rich_help_panel=_ACCESS)] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port to bind to.", rich_help_panel=_ACCESS)
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Key that clients must bring; may be repeated. Also read from ${KEY_VARIABLE} (by commas).",
            show_default="none",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File with one key per line.", show_default="none", rich_help_panel=_ACCESS),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin that browsers may call from; may be repeated.",
            show_default="none: CORS off",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model in requests.", show_default="the model's own")
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(help="Jinja file in place of the tokenizer's template.", show_default="none"),
    ] = None,
    max_kv_memory: Annotated[
        str | None,
        typer.Option(
            help="Size of the page pool, such as 8GiB.",
            show_default="from the free memory",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_running: Annotated[
        int, typer.Option(help="Requests that generate at a time.", rich_help_panel=_LIMITS)
    ] = 32,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait; more get 429.", rich_help_panel=_LIMITS)
    ] = 256,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of prompt and output.",
            show_default="what the model reaches",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_output_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens of one output.", show_default="none", rich_help_panel=_LIMITS),
    ] = None,
    max_choices: Annotated[
        int, typer.Option(help="Most outputs of one request.", rich_help_panel=_LIMITS)
    ] = 16,
    max_body: Annotated[
        str, typer.Option(help="Longest request body, such as 4MiB; more gets 413.", rich_help_panel=_LIMITS)
    ] = "4MiB",
    chunk_tokens: Annotated[
        int | None,
        typer.Option(
            help="Prompt tokens per step, a multiple of 64: bounds the pause of running requests.",
            show_default="256 on a CPU, 2048 on a GPU",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(help="How long SIGTERM lets requests in flight go on.", rich_help_panel=_LIMITS)
    ] = 60.0,
    no_prefix_caching: Annotated[
        bool, typer.Option("--no-prefix-caching", help="Do not share pages between requests.")
    ] = False,
    no_tqai: Annotated[bool, typer.Option("--no-tqai", help="Leave the cache uncompressed.")] = False,
    config: ServedConfigOption = None,
    bits: Annotated[
        int | None,
        typer.Option(help="Bits for keys and values alike.", show_default="none", rich_help_panel="Cache"),
    ] = None,
    bits_k: BitsK = None,
    bits_v: BitsV = None,
    sink_tokens: SinkTokens = None,
    residual_window: ResidualWindow = None,
    codec: Codec = None,
    offsets: Offsets = None,
    scale_format: ScaleFormat = None,
    last_layer_bits: LastLayerBits = None,
    backend: BackendOption = None,
    seed: Annotated[int, typer.Option(help="Seed of requests that bring none.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Serve a model over OpenAI's interface; requests are batched and share a pool of compressed pages."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise CommandError(f"the server needs {', '.join(missing)}: pip install 'tqai[serve]'")
    if bits is not None and (bits_k is not None or bits_v is not None or config is not None):
        raise CommandError(
            "--bits: sets both sides, so it excludes --bits-k, --bits-v and --config", WRONG_USAGE
        )
    from tqai.server.engine.settings import SERVER_PRESET

    cache = cache_config(
        config,
        default=SERVER_PRESET,
        bits_k=bits if bits is not None else bits_k,
        bits_v=bits if bits is not None else bits_v,
        sink_tokens=sink_tokens,
        residual_window=residual_window,
        codec=codec,
        offsets=offsets,
        scale_format=scale_format,
        last_layer_bits=last_layer_bits,
        backend=backend,
    )
    keys = _keys(api_key, api_key_file)
    template = None if chat_template is None else _read(chat_template, "--chat-template")
    pool_bytes = None if max_kv_memory is None else parse_bytes(max_kv_memory, "--max-kv-memory")
    body_bytes = parse_bytes(max_body, "--max-body")
    check_address(host, port)

    from tqai.server.api.allocator import use_few_arenas

    use_few_arenas()
    loaded = load_model(model, device, dtype)

    from tqai.server.api.app import create_app
    from tqai.server.api.lifecycle import is_loopback
    from tqai.server.api.lifecycle import serve as serve_app
    from tqai.server.api.settings import ApiSettings
    from tqai.server.engine.engine import Engine
    from tqai.server.engine.settings import EngineSettings

    if chunk_tokens is None:
        chunk_tokens = 2048 if loaded.model.device.type == "cuda" else 256
    cache = cache.by_layer(loaded.model.config.get_text_config(decoder=True).num_hidden_layers)
    engine = Engine(
        loaded.model,
        loaded.tokenizer,
        EngineSettings(
            cache=None if no_tqai else cache,
            max_running=max_running,
            max_waiting=max_waiting,
            chunk_tokens=chunk_tokens,
            max_kv_bytes=pool_bytes,
            max_model_len=max_model_len,
            prefix_caching=not no_prefix_caching,
            seed=seed,
        ),
    )
    if template is None and loaded.embedded:
        template = EMBEDDED_TEMPLATE
    name = served_model_name or _served_name(loaded)
    app = create_app(
        engine,
        ApiSettings(
            model_name=name,
            api_keys=keys,
            max_body_bytes=body_bytes,
            max_choices=max_choices,
            max_output_tokens=max_output_tokens,
            chat_template=template,
            allowed_origins=tuple(allow_origin or ()),
        ),
    )
    if not is_loopback(host) and not keys:
        warn(f"--host {host} without --api-key: anybody who reaches this machine can use the model")
    pool = engine.store.pool
    size, tokens = format_bytes(engine.store.pool_bytes), pool.pages * 64
    label = engine.settings.label
    warn(f"{name}: {label} on {engine.store.codes[0].name}, {pool.pages} pages, {size}: {tokens} tokens")
    warn(f"http://{host}:{port}/v1 (status page: http://{host}:{port}/)")
    engine.start()
    serve_app(app, engine, host, port, drain_seconds)


def check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be bound to, before a model is loaded for it.

    Raises:
        CommandError: the port is in use or not allowed, or the host is not this machine's.
    """
    told = f"--host {host} --port {port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise CommandError(f"{told}: {error.strerror}") from error
    bound, elsewhere = False, None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            with socket.socket(family, kind, protocol) as probe:
                if os.name == "posix":  # on Windows the option would let two servers have one port
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
        except OSError as error:
            # a name such as localhost may stand for an address of IPv6 that this machine does not have
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise CommandError(f"{told}: {os.strerror(error.errno or 0)}") from error
            elsewhere = error
        else:
            bound = True
    if not bound:
        raise CommandError(f"{told}: {os.strerror((elsewhere and elsewhere.errno) or 0)}")


def turboquant_server() -> int:
    """`turboquant-server`: `tqai serve` under the name of an older project, with its flags."""
    from tqai.cli.app import main

    return main(["serve", *sys.argv[1:]])


def parse_bytes(text: str, option: str) -> int:
    """Bytes of a size such as "8GiB", "500MB" or "1048576".

    Raises:
        CommandError: it is no such size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise CommandError(f"{option} {text}: allowed are sizes such as 8GiB, 500MB and 1048576", WRONG_USAGE)
    return int(float(match[1]) * UNITS[match[2]])


def _keys(given: list[str] | None, file: Path | None) -> tuple[str, ...]:
    keys = list(given or [])
    keys += [key.strip() for key in os.environ.get(KEY_VARIABLE, "").split(",") if key.strip()]
    if file is not None:
        lines = [line.strip() for line in _read(file, "--api-key-file").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise CommandError(f"--api-key-file {file}: holds no key", WRONG_USAGE)
        keys += found
    return tuple(dict.fromkeys(keys))


def _read(file: Path, option: str) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no UTF-8 text"
        raise CommandError(f"{option} {file}: {reason}", WRONG_USAGE) from error


def _served_name(loaded: LoadedModel) -> str:
    if loaded.embedded:
        return EMBEDDED_NAME
    folder = Path(loaded.name)
    return folder.name if folder.is_dir() else loaded.name
