"""What do trellis codes cost on this GPU: attention, encoding, the prefill of a model?

    python benchmarks/gpu_trellis.py [--parts attention,encode,prefill] [--out FILE]

Attention: as `gpu_attention.py`, with the scalar codes of the same bits and torch's SDPA in the same run; a
path is timed only after its result for the first sequence agrees with float64 attention to what its own pages
decode to. Pages are of random bits, which any codes may be, and of scales as those of normal vectors.
Encoding: keys and values of 2048 pages, after the error of a part has been compared with core's. Prefill: 32k
tokens of the model of `gpu_generate.py` in chunks, with trellis and scalar codes of 3 bits and with
DynamicCache. The file is written row by row; what it has of figures noted by hand is kept. Two minutes in
all, much of it for compiling.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_attention import DIM, HEADS, KV_HEADS, SCALING, error_of, sdpa_times
from gpu_timing import L2_ROTATION_BYTES, gpu_provenance, graph_us

from tqai.backends.base import ExactTokens, History
from tqai.backends.cuda import CudaBackend
from tqai.backends.cuda.attention import Exact, attend_pages
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PAGE_TOKENS, PageFormat

RESULTS = Path(__file__).parent / "results" / "gpu_trellis.json"
BY_HAND = ("profile", "tried")
ATTENTION = (
    ("scalar", 2),
    ("trellis", 2),
    ("scalar", 3),
    ("trellis", 3),
    ("trellis256", 3),
    ("scalar", (3, 2)),
    ("trellis", (3, 2)),
    ("scalar", 4),
    ("trellis", 4),
    ("trellis256", 4),
)
SIZES = ((1, 32768), (1, 131072), (8, 131072))
ENCODED = (("scalar", 3), ("trellis", 2), ("trellis", 3), ("trellis", 4), ("trellis256", 3))
PREFILL = (("scalar", 3), ("trellis", 3))
TOLERANCE = 4e-3
"""Codes that are all equally frequent are unlike real ones: scalar 3 bits were seen at 2.5e-3 with them, at
1.3e-3 in `gpu_attention.py`. Trellis codes are at 1e-6 to 3e-5 with either."""
PAGES = 2048
DISTORTION_TOLERANCE = 2e-3
CHECKED_HEADS = 8  # 512 vectors: with 4 bits their error scatters by 0.03 % from core's
PREFILL_TOKENS, CHUNK_TOKENS = 32768, 4096


Keep = Callable[[dict[str, Any]], None]
Bits = int | tuple[int, int]
"""Of keys and values."""


def format_of(name: str, bits: Bits) -> PageFormat:
    both = bits if isinstance(bits, tuple) else (bits, bits)
    return PageFormat(*(make_codec(CodecSpec(name, DIM, each)) for each in both))


def random_pages(page_format: PageFormat, batch: int, tokens: int) -> tuple[torch.Tensor, History]:
    """Pages of random codes, laid out as a cache has them."""
    pages = tokens // PAGE_TOKENS
    shape = (batch * pages, KV_HEADS)
    raw = torch.randint(0, 256, (*shape, page_format.page_bytes), dtype=torch.uint8, device="cuda")
    for at in (page_format.key_scales_at, page_format.value_scales_at):
        scales = DIM**0.5 * (0.8 + 0.4 * torch.rand(*shape, PAGE_TOKENS, device="cuda"))
        raw[..., at : at + 2 * PAGE_TOKENS] = scales.bfloat16().view(torch.uint8)
    ids = torch.arange(batch * pages, device="cuda").view(batch, pages)
    addresses = raw.data_ptr() + ids * raw.stride(0)
    return raw, History(page_format, [raw], [0], ids.cpu().int().numpy(), addresses)


def compile_all(backend: CudaBackend, codecs: Iterable[tuple[str, Bits]]) -> None:
    """Kernels of several formats at once, after the first, which loads the compiler; the rest is compiled
    where it is used."""

    def refused(each: PageFormat) -> str | None:
        return backend.refuses(each, "cuda", "bfloat16")

    first, *others = (format_of(name, bits) for name, bits in dict.fromkeys(codecs))
    with ThreadPoolExecutor(8) as pool:
        for reason in (refused(first), *pool.map(refused, others)):
            if reason is not None:
                sys.exit(reason)


def attention_rows(backend: CudaBackend, keep: Keep) -> None:
    for batch, tokens in SIZES:
        sdpa = min(times["graph_us"] for times in sdpa_times(batch, tokens).values())
        torch.cuda.empty_cache()
        keep({"codec": "torch SDPA bfloat16", "batch": batch, "tokens": tokens, "graph_us": sdpa})
        scalar: dict[Bits, float] = {}
        for name, bits in ATTENTION:
            page_format = format_of(name, bits)
            size = batch * KV_HEADS * (tokens // PAGE_TOKENS) * page_format.page_bytes
            sets = max(1, min(8, L2_ROTATION_BYTES // size + 1))
            caches = [random_pages(page_format, batch, tokens) for _ in range(sets)]
            query = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
            recent = ExactTokens(
                *(torch.randn(batch, KV_HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            )
            raw, first = caches[0]
            exact, _ = attend_pages(
                query,
                page_format,
                first.addresses,
                first.pages,
                SCALING,
                recent=Exact(*recent),
                out_dtype=torch.float32,
            )
            one = ExactTokens(recent.keys[:1], recent.values[:1])
            error = error_of(backend, raw[: first.pages], first, query[:1], one, exact[:1])
            if not error < TOLERANCE:
                sys.exit(f"{name} {bits} bits, batch {batch}, {tokens} tokens: error {error:.1e}: not timed")
            calls = [
                partial(backend.attend, query, history, None, recent, None, SCALING) for _, history in caches
            ]
            us = graph_us(calls)
            if name == "scalar":
                scalar[bits] = us
            keep(
                {
                    "codec": name,
                    "bits": "/".join(map(str, bits)) if isinstance(bits, tuple) else bits,
                    "batch": batch,
                    "tokens": tokens,
                    "graph_us": us,
                    "error": error,
                    "speedup": sdpa / us,
                    "of_scalar": scalar[bits] / us,
                }
            )
            del caches, raw, first, calls
            torch.cuda.empty_cache()


def squared_error(vectors: torch.Tensor, decoded: torch.Tensor) -> float:
    wrong = (decoded.double() - vectors.double()).square().sum(-1) / vectors.double().square().sum(-1)
    return float(wrong.mean())


def encode_rows(backend: CudaBackend, keep: Keep) -> None:
    keys, values = (
        torch.randn(PAGES, KV_HEADS, PAGE_TOKENS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    for name, bits in ENCODED:
        page_format = format_of(name, bits)
        out = torch.empty(PAGES, KV_HEADS, page_format.page_bytes, dtype=torch.uint8, device="cuda")
        backend.encode(keys, values, page_format, out)
        some = keys[:1, :CHECKED_HEADS]
        mine = backend.decode(out[:1, :CHECKED_HEADS], page_format, torch.float32).keys
        plain = some.float().cpu()
        codec = page_format.key
        wanted = squared_error(plain, torch.from_numpy(codec.decode(codec.encode(plain.numpy()))))
        found = squared_error(some, mine)
        if abs(found / wanted - 1.0) > DISTORTION_TOLERANCE:
            sys.exit(f"{name} {bits} bits: squared error {found:.5f}, core's {wanted:.5f}: not timed")
        us = graph_us([lambda p=page_format, o=out: backend.encode(keys, values, p, o)], replays=5)
        few = graph_us([lambda p=page_format, o=out: backend.encode(keys[:1], values[:1], p, o[:1])])
        keep(
            {
                "codec": name,
                "bits": bits,
                "vectors_per_second": 2 * PAGES * KV_HEADS * PAGE_TOKENS / (us * 1e-6),
                "one_page_of_8_heads_us": few,
                "squared_error": found,
                "of_core": found / wanted,
            }
        )


def prefill_rows(keep: Keep) -> None:
    from gpu_generate import make_model
    from transformers.cache_utils import DynamicCache

    import tqai

    model = make_model()
    ids = torch.randint(0, 1000, (1, PREFILL_TOKENS), device="cuda")

    def seconds_of(make: Any) -> float:
        best = np.inf
        for _ in range(3):
            cache = make()
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.no_grad():
                for at in range(0, PREFILL_TOKENS, CHUNK_TOKENS):
                    model(ids[:, at : at + CHUNK_TOKENS], past_key_values=cache, logits_to_keep=1)
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
            del cache
            torch.cuda.empty_cache()
        return float(best)

    plain = seconds_of(lambda: DynamicCache(config=model.config))
    keep({"cache": "DynamicCache", "seconds": plain})
    tqai.patch(model)
    for name, bits in PREFILL:
        config = tqai.CacheConfig(bits_k=bits, bits_v=bits, codec=name)
        seconds = seconds_of(lambda config=config: tqai.TurboQuantCache(model, config=config))
        keep({"codec": name, "bits": bits, "seconds": seconds, "of_dynamic": seconds / plain})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="attention,encode,prefill")
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    backend = CudaBackend()
    parts = arguments.parts.split(",")
    earlier = json.loads(RESULTS.read_text("utf-8"))
    report: dict[str, Any] = {"where": gpu_provenance(arguments.commit)}
    report |= {part: earlier[part] for part in BY_HAND if part in earlier}

    def keeper(part: str) -> Keep:
        def keep(row: dict[str, Any]) -> None:
            report.setdefault(part, []).append(row)
            print(row, flush=True)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")

        return keep

    codecs = {"attention": ATTENTION, "encode": ENCODED, "prefill": PREFILL}
    compile_all(backend, [each for part in parts for each in codecs[part]])
    for part in parts:
        if part == "prefill":
            prefill_rows(keeper(part))
        else:
            (attention_rows if part == "attention" else encode_rows)(backend, keeper(part))


if __name__ == "__main__":
    main()
