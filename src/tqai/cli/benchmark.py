"""`tqai benchmark`: distortion and speed of one pair of bit widths on random vectors; needs no model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any

import typer

from tqai.cli.cache_options import refused_by_mlx
from tqai.cli.mlx_model import NEEDS_MLX
from tqai.cli.models import WRONG_USAGE, find_device
from tqai.cli.options import BackendOption, BitsK, BitsV, ConfigOption, DeviceOption, JsonOption, cache_config
from tqai.cli.report import CommandError, Steps, console, print_json, steps
from tqai.config import PRESETS, CacheConfig

__all__ = ["benchmark"]

LARGEST_HEAD_DIM = 1024
KV_HEADS = 8


def benchmark(
    config: ConfigOption = None,
    bits_k: BitsK = None,
    bits_v: BitsV = None,
    head_dim: Annotated[int, typer.Option(help="Coordinates per vector.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens attended to; whole pages of 64 are used.")] = 4096,
    n_vectors: Annotated[
        int | None,
        typer.Option(help="Vectors whose error is measured.", show_default="those of 8 KV heads"),
    ] = None,
    all_configs: Annotated[
        bool, typer.Option("--all-configs", help="Every preset of the cache, one after another.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the vectors and of the rotation.")] = 0,
    backend: BackendOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Measure error and speed without a model: 8 KV heads, 32 query heads, one new token."""
    chosen: dict[str, Any] = {"bits_k": bits_k, "bits_v": bits_v, "seed": seed, "backend": backend}
    if all_configs and (config, bits_k, bits_v) != (None, None, None):
        raise CommandError("--all-configs: leave --config, --bits-k and --bits-v out", WRONG_USAGE)
    names = list(PRESETS) if all_configs else [config]
    # one layer is measured, which is not the last
    refuses = refused_by_mlx if backend == "mlx" else None
    configs = [cache_config(name, refuses, **chosen).with_changes(last_layer_bits=None) for name in names]
    if not 1 <= head_dim <= LARGEST_HEAD_DIM:
        raise CommandError(
            f"--head-dim {head_dim}: allowed are whole numbers from 1 to {LARGEST_HEAD_DIM}", WRONG_USAGE
        )
    if tokens < 64:
        raise CommandError(f"--tokens {tokens}: allowed are whole numbers from 64", WRONG_USAGE)
    if n_vectors is not None and n_vectors < 1:
        raise CommandError(f"--n-vectors {n_vectors}: allowed are whole numbers from 1", WRONG_USAGE)
    where = _mlx_device(device) if backend == "mlx" else find_device(device)
    results = {}
    with steps(4 * len(configs)) as progress:
        for settings in configs:
            results[settings.label] = _measure(settings, head_dim, tokens, n_vectors, where, progress)
    if json:
        print_json({"configs": results} if all_configs else next(iter(results.values())))
    elif all_configs:
        _print_all(results)
    else:
        _print(next(iter(results.values())), configs[0].bits_k, configs[0].bits_v)


def _measure(
    settings: CacheConfig, head_dim: int, tokens: int, n_vectors: int | None, where: Any, progress: Steps
) -> dict[str, Any]:
    progress.begin(f"{settings.label}: encoding")
    bench = _bench(settings, head_dim, tokens // 64, where)
    progress.done()
    progress.begin(f"{settings.label}: checking against the reference")
    checks = bench.check()
    distortion = {part: bench.distortion(part, n_vectors) for part in ("keys", "values")}
    progress.done()
    progress.begin(f"{settings.label}: timing encode")
    encode = bench.time_encode()
    progress.done()
    progress.begin(f"{settings.label}: timing attention")
    attention = bench.time_attention()
    progress.done()
    return {
        "config": settings.to_dict(),
        "head_dim": head_dim,
        "tokens": bench.tokens,
        "n_vectors": n_vectors if n_vectors is not None else bench.tokens * KV_HEADS,
        "device": str(where),
        "backend": bench.backend.name,
        "backend_reason": bench.reason,
        "bits_per_value": bench.bits_per_value,
        "checks": checks,
        "distortion": distortion,
        "encode": encode,
        "attention": attention,
    }


def _bench(settings: CacheConfig, head_dim: int, pages: int, where: Any) -> Any:
    if settings.backend == "mlx":
        from tqai.cli.mlx_speed import MlxBench

        return MlxBench(settings, head_dim, pages)
    from tqai.cli.kernel_speed import KernelBench

    return KernelBench(settings, head_dim, pages, where)


def _mlx_device(device: str | None) -> str:
    """What to call MLX's default device, which cannot be chosen here."""
    if find_spec("mlx") is None or find_spec("mlx_lm") is None:
        raise CommandError(NEEDS_MLX)
    if device is not None:
        raise CommandError(
            f"--device {device}: MLX computes on its default device, leave it out", WRONG_USAGE
        )
    import mlx.core as mx

    return f"mlx {'gpu' if mx.default_device().type == mx.DeviceType.gpu else 'cpu'}"


def _print_all(results: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    first = next(iter(results.values()))
    title = f"head_dim {first['head_dim']}, {first['tokens']} tokens, {first['device']}"
    columns = ("", "bits per value", "NMSE keys", "NMSE values", "encode, vectors/s", "attention", "ratio")
    table = Table(*columns, "backend", title=title)
    for label, result in results.items():
        attention = result["attention"]
        table.add_row(
            label,
            f"{result['bits_per_value']:.3f}",
            *(f"{result['distortion'][part]['nmse']:.5f}" for part in ("keys", "values")),
            f"{result['encode']['vectors_per_second']:,.0f}",
            f"{attention['ms']:.3f} ms",
            f"{attention['speedup']:.2f}x",
            result["backend"],
        )
    out = console()
    out.print(table)
    out.print("ratio: time of the fastest attention of torch on uncompressed tensors over that on codes")


def _print(result: dict[str, Any], bits_k: int, bits_v: int) -> None:
    from rich.table import Table

    out = console()
    title = f"head_dim {result['head_dim']}, {result['device']}, backend {result['backend']}"
    table = Table("", f"keys, {bits_k} bits", f"values, {bits_v} bits", title=title)
    parts = [result["distortion"]["keys"], result["distortion"]["values"]]
    table.add_row("NMSE", *(f"{part['nmse']:.5f}" for part in parts))
    table.add_row("SNR", *(f"{part['snr_db']:.2f} dB" for part in parts))
    table.add_row("cosine", *(f"{part['cosine']:.5f}" for part in parts))
    out.print(table)
    out.print(f"{result['bits_per_value']:.3f} bits per value with scales, whole pages")
    encode = result["encode"]
    out.print(
        f"encode: {encode['vectors_per_second']:,.0f} vectors/s, {encode['mb_per_second']:.0f} MB/s of input"
    )
    attention = result["attention"]
    out.print(
        f"attention, {result['tokens']} tokens: {attention['ms']:.3f} ms; "
        f"{attention['best_torch']} without compression: {attention['best_torch_ms']:.3f} ms; "
        f"ratio {attention['speedup']:.2f}x"
    )
    checks = result["checks"]
    out.print(
        f"checked first: decoding differs from the reference by {checks['decode_error']:.1e}, "
        f"attention by {checks['attention_error']:.1e} (relative L2)"
    )
