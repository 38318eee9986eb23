"""`tqai eval`: what caches do to a model's predictions, each scored token reading the cache back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from tqai.cli.models import WRONG_USAGE, LoadedModel, check_torch, load_model
from tqai.cli.options import BackendOption, DeviceOption, DtypeOption, JsonOption, ModelOption
from tqai.cli.prompts import read_text
from tqai.cli.report import CommandError, print_json, steps, warn
from tqai.config import DEFAULT_PRESET, FALLBACK_PRESET

__all__ = ["evaluate"]

KINDS = ("single", "multi", "lookup")
"""Those of `tqai.evaluation.needles`, which imports torch."""
_SIZES, _NEEDLES = "Text", "Retrieval (codes hidden in a document, asked for at its end)"
DEFAULT_CACHES = (DEFAULT_PRESET,)


def evaluate(
    cache: Annotated[
        list[str] | None,
        typer.Option(
            "--cache",
            "-c",
            help="A cache, again for each: K3/V3,codec=trellis,window=128,sinks=4 or quanto-4, hqq-4, fp8, "
            "dynamic; with --backend mlx quantized-4.",
            show_default=f"{DEFAULT_PRESET}; with --backend mlx {FALLBACK_PRESET}",
        ),
    ] = None,
    model: ModelOption = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file, again for each.", show_default="the demo document", rich_help_panel=_SIZES
        ),
    ] = None,
    documents: Annotated[int, typer.Option(help="Documents cut from the text.", rich_help_panel=_SIZES)] = 4,
    document_tokens: Annotated[int, typer.Option(help="Tokens of each.", rich_help_panel=_SIZES)] = 2048,
    prefill: Annotated[
        int,
        typer.Option(help="Tokens of each that fill the cache and are not scored.", rich_help_panel=_SIZES),
    ] = 512,
    chunk: Annotated[
        int, typer.Option(help="Tokens per forward pass after that.", rich_help_panel=_SIZES)
    ] = 32,
    seeds: Annotated[int, typer.Option(help="Random rotations per cache.")] = 3,
    bits_at: Annotated[
        int | None,
        typer.Option(help="Count all-in bits at this many tokens too.", show_default="the document's"),
    ] = None,
    greedy: Annotated[int, typer.Option(help="Tokens to decode greedily until caches part; 0 for none.")] = 0,
    layers: Annotated[bool, typer.Option("--layers", help="Attention-output error of every layer.")] = False,
    retrieval: Annotated[
        list[int] | None,
        typer.Option(help="Prompt tokens, again for each.", show_default="none", rich_help_panel=_NEEDLES),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="single, multi, lookup.", show_default="all", rich_help_panel=_NEEDLES),
    ] = None,
    depth: Annotated[
        list[float] | None,
        typer.Option(
            help="Where a single code stands, 0 to 1, again for each.",
            show_default="anywhere",
            rich_help_panel=_NEEDLES,
        ),
    ] = None,
    questions: Annotated[int, typer.Option(help="Per kind, length and depth.", rich_help_panel=_NEEDLES)] = 8,
    plot: Annotated[
        str | None, typer.Option(help="Draw KL against all-in bits to this file (svg, png, pdf).")
    ] = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    json: JsonOption = False,
) -> None:
    """Measure KL, perplexity, agreement and retrieval of compressed caches against the uncompressed one."""
    mlx = backend == "mlx"
    if mlx and layers:
        raise CommandError("--layers: attention outputs of MLX models are not measured", WRONG_USAGE)
    if seeds < 1 or questions < 1 or greedy < 0:
        raise CommandError(
            f"--seeds {seeds} --questions {questions} --greedy {greedy}: allowed are whole numbers from 1 "
            "(--greedy from 0)",
            WRONG_USAGE,
        )
    _check_lengths(document_tokens, prefill, chunk, bits_at)
    _check_needles(retrieval or (), kind or (), depth or ())
    written = "".join(read_text(path, "--text") for path in text or ())
    loaded = load_model(model, device, dtype, backend)
    if mlx:
        loaded = _measurable(loaded)
    from tqai.cli.eval_work import Request, measured

    request = Request(
        caches=tuple(cache or ((FALLBACK_PRESET,) if mlx else DEFAULT_CACHES)),
        text=written,
        documents=documents,
        document_tokens=document_tokens,
        prefill_tokens=prefill,
        chunk_tokens=chunk,
        seeds=tuple(range(seeds)),
        bits_tokens=bits_at,
        greedy_tokens=greedy,
        layers=layers,
        lengths=tuple(retrieval or ()),
        kinds=tuple(kind or ()),
        depths=tuple(depth or ()),
        questions=questions,
        backend=None if mlx else backend,
    )
    result, points = _measured(loaded, request, measured)
    if plot is not None:
        _draw(points, Path(plot), loaded.name)
        warn(f"wrote {plot}")
    if json:
        print_json(result)
    else:
        from tqai.cli.eval_tables import print_result

        print_result(result)


def _check_lengths(document: int, prefill: int, chunk: int, bits_at: int | None) -> None:
    if not 0 <= prefill <= document - 2:
        raise CommandError(
            f"--document-tokens {document} --prefill {prefill}: allowed are prefills from 0 that leave 2 "
            "tokens of a document or more",
            WRONG_USAGE,
        )
    if chunk < 1 or (bits_at is not None and bits_at < 1):
        name, value = ("--chunk", chunk) if chunk < 1 else ("--bits-at", bits_at)
        raise CommandError(f"{name} {value}: allowed are whole numbers from 1", WRONG_USAGE)


def _check_needles(lengths: Sequence[int], kinds: Sequence[str], depths: Sequence[float]) -> None:
    for length in lengths:
        if length < 1:
            raise CommandError(f"--retrieval {length}: allowed are whole numbers from 1", WRONG_USAGE)
    for kind in kinds:
        if kind not in KINDS:
            raise CommandError(f"--kind {kind}: allowed are {', '.join(KINDS)}", WRONG_USAGE)
    for depth in depths:
        if not 0 <= depth <= 1:
            raise CommandError(f"--depth {depth}: allowed are numbers from 0 to 1", WRONG_USAGE)


def _measurable(loaded: LoadedModel) -> LoadedModel:
    """A model of mlx-lm as the measures take it; they compute their figures with torch."""
    check_torch()
    from transformers import AutoConfig

    from tqai import demo
    from tqai.evaluation.mlx_models import MlxCausalModel

    folder = demo.model_path() if loaded.embedded else Path(loaded.name).expanduser()
    model = MlxCausalModel(loaded.model.mlx, AutoConfig.from_pretrained(folder))
    return replace(loaded, model=model)


def _measured(loaded: LoadedModel, request: Any, work: Any) -> tuple[dict[str, Any], list[Any]]:
    """The result and the points of the plot; warnings of the measurement become lines on standard error."""
    import tqai

    with warnings.catch_warnings(record=True) as caught, steps(request.steps) as progress:
        warnings.simplefilter("always", UserWarning)
        try:
            result, points = work(loaded.model, loaded.tokenizer, loaded.name, request, progress)
        finally:
            if hasattr(loaded.model, "mlx"):  # patched for its caches, and with it the module of its kind
                tqai.unpatch(loaded.model.mlx)
    for message in dict.fromkeys(
        str(entry.message) for entry in caught if entry.category.__module__[:4] == "tqai"
    ):
        warn(message)
    return result, points


def _draw(points: list[Any], path: Path, name: str) -> None:
    if find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib: pip install 'tqai[plot]'")
    from tqai.evaluation import plot_kl_against_bits

    plot_kl_against_bits(points, path, f"KL against bits, {name}")
