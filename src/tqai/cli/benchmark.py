"""`tqai benchmark`: distortion and speed of one pair of bit widths on random vectors; needs no model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from tqai.cli.models import WRONG_USAGE, find_device
from tqai.cli.options import BackendOption, BitsK, BitsV, ConfigOption, DeviceOption, JsonOption, cache_config
from tqai.cli.report import CommandError, console, print_json, steps

__all__ = ["benchmark"]

LARGEST_HEAD_DIM = 1024


def benchmark(
    config: ConfigOption = None,
    bits_k: BitsK = None,
    bits_v: BitsV = None,
    head_dim: Annotated[int, typer.Option(help="Coordinates per vector.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens attended to; whole pages of 64 are used.")] = 4096,
    seed: Annotated[int, typer.Option(help="Seed of the vectors and of the rotation.")] = 0,
    backend: BackendOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Measure error and speed without a model: 8 KV heads, 32 query heads, one new token."""
    settings = cache_config(config, bits_k=bits_k, bits_v=bits_v, seed=seed, backend=backend)
    if not 1 <= head_dim <= LARGEST_HEAD_DIM:
        raise CommandError(
            f"--head-dim {head_dim}: allowed are whole numbers from 1 to {LARGEST_HEAD_DIM}", WRONG_USAGE
        )
    if tokens < 64:
        raise CommandError(f"--tokens {tokens}: allowed are whole numbers from 64", WRONG_USAGE)
    where = find_device(device)

    from tqai.cli.kernel_speed import KernelBench

    with steps(4) as progress:
        progress.begin("encoding")
        bench = KernelBench(settings, head_dim, tokens // 64, where)
        progress.done()
        progress.begin("checking against the reference")
        checks = bench.check()
        distortion = {"keys": bench.distortion("keys"), "values": bench.distortion("values")}
        progress.done()
        progress.begin("timing encode")
        encode = bench.time_encode()
        progress.done()
        progress.begin("timing attention")
        attention = bench.time_attention()
        progress.done()
    result = {
        "config": settings.to_dict(),
        "head_dim": head_dim,
        "tokens": bench.tokens,
        "device": str(where),
        "backend": bench.backend.name,
        "backend_reason": bench.reason,
        "bits_per_value": bench.bits_per_value,
        "checks": checks,
        "distortion": distortion,
        "encode": encode,
        "attention": attention,
    }
    if json:
        print_json(result)
    else:
        _print(result, settings.bits_k, settings.bits_v)


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
