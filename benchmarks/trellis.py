"""What do trellis codes cost? Vectors encoded and decoded per second by every backend, and attention on them.

    python benchmarks/trellis.py [--gpu] [--out benchmarks/results/trellis.json]

head_dim 128, one thread. A path is timed only after its codes have core's error to a thousandth (0.3 % on few
vectors), decode to core's numbers, and attention agrees with float64 to 2e-3. Attention: one layer, batch 1,
8 KV heads, one new token, 8 or 32 query heads, against scalar codes of the same bits in the same run; times
are the least of interleaved runs. Prefill: the embedded model reads 8,192 tokens on all cores, K3/V3.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance

from tqai.backends import load
from tqai.backends.base import ExactTokens, History
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PAGE_TOKENS, PageFormat

DIM, KV_HEADS = 128, 8
CODECS = ("scalar", "trellis", "trellis256")
BITS = (2, 3, 4)
TOLERANCE = 2e-3
CORE_VECTORS = 64
PARTS = ("codes", "reference", "attention", "prefill")
"""What is measured; `reference` is the codes of torch and core. Each takes 10 to 60 seconds."""


def format_of(name: str, bits: int) -> PageFormat:
    codec = make_codec(CodecSpec(name, DIM, bits))
    return PageFormat(codec, codec)


def relative_error(vectors: torch.Tensor, decoded: torch.Tensor) -> float:
    """Mean squared error per unit vector."""
    error = (vectors.double() - decoded.double()).square().sum(-1) / vectors.double().square().sum(-1)
    return float(error.mean())


def least_seconds(call: Any, seconds: float = 0.12, synchronize: Any = None) -> float:
    """Least time of repeated calls within a budget."""
    best, end = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if synchronize is not None:
            synchronize()
        best = min(best, time.perf_counter() - start)
    return float(best)


def codes_row(backend: Any, name: str, bits: int, device: str, pages: int) -> dict[str, Any]:
    """Rates of one backend and codec, after its error has been compared with core's."""
    page_format = format_of(name, bits)
    codec = page_format.key
    vectors = torch.randn(pages, 1, PAGE_TOKENS, DIM, generator=torch.Generator().manual_seed(bits))
    on_device = vectors.to(device)
    out = torch.empty(pages, 1, page_format.page_bytes, dtype=torch.uint8, device=device)
    backend.encode(on_device, on_device, page_format, out)
    decoded = backend.decode(out, page_format, torch.float32).keys.cpu()
    encoded = backend.to_canonical(out, page_format).key
    agree = torch.from_numpy(codec.decode(encoded))
    assert (agree - decoded).norm() < 1e-5 * agree.norm()
    some = vectors[: CORE_VECTORS // PAGE_TOKENS]
    wanted = core_error(name, bits, CORE_VECTORS // PAGE_TOKENS, pages)
    found = relative_error(some, decoded[: len(some)])
    assert abs(found / wanted - 1.0) < 3e-3, (name, bits, found, wanted)
    wait = torch.cuda.synchronize if device == "cuda" else None
    count = 2 * pages * PAGE_TOKENS
    encode = least_seconds(lambda: backend.encode(on_device, on_device, page_format, out), synchronize=wait)
    decode = least_seconds(lambda: backend.decode(out, page_format, torch.float32), synchronize=wait)
    return {
        "codec": name,
        "bits": bits,
        "vectors_encoded_per_second": round(count / encode),
        "vectors_decoded_per_second": round(count / decode),
        "squared_error": round(relative_error(vectors, decoded), 6),
    }


@cache
def core_error(name: str, bits: int, some: int, pages: int) -> float:
    """Of the first pages that `codes_row` encodes, by the reference."""
    codec = format_of(name, bits).key
    vectors = torch.randn(pages, 1, PAGE_TOKENS, DIM, generator=torch.Generator().manual_seed(bits))[:some]
    return relative_error(vectors, torch.from_numpy(codec.decode(codec.encode(vectors.numpy()))))


def core_row(name: str, bits: int) -> dict[str, Any]:
    """The same of the numpy reference."""
    codec = make_codec(CodecSpec(name, DIM, bits))
    vectors = np.random.default_rng(0).standard_normal((64, DIM))
    encoded = codec.encode(vectors)
    return {
        "codec": name,
        "bits": bits,
        "vectors_encoded_per_second": round(64 / least_seconds(lambda: codec.encode(vectors))),
        "vectors_decoded_per_second": round(64 / least_seconds(lambda: codec.decode(encoded), 0.2)),
    }


def history_of(backend: Any, page_format: PageFormat, tokens: int) -> History:
    """Pages whose codes are random bytes and whose scales are 1, one slab."""
    pages = tokens // PAGE_TOKENS
    generator = torch.Generator().manual_seed(tokens)
    slab = torch.randint(
        0, 256, (pages, KV_HEADS, page_format.page_bytes), dtype=torch.uint8, generator=generator
    )
    for at in (page_format.key_scales_at, page_format.value_scales_at):
        slab[..., at : at + 128] = torch.tensor([0x80, 0x3F], dtype=torch.uint8).repeat(PAGE_TOKENS)
    addresses = (slab.data_ptr() + torch.arange(pages) * slab.stride(0)).view(1, pages)
    return History(page_format, [slab], [0], np.arange(pages, dtype=np.int32)[None], addresses)


def attention_row(backend: Any, bits: int, tokens: int, group: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step on each codec, after comparison with float64."""
    histories = {name: history_of(backend, format_of(name, bits), tokens) for name in CODECS}
    query = torch.randn(1, KV_HEADS * group, 1, DIM)
    recent = ExactTokens(*(torch.randn(1, KV_HEADS, 1, DIM) for _ in range(2)))

    def step(history: History) -> torch.Tensor:
        out: torch.Tensor = backend.attend(query, history, None, recent, None, DIM**-0.5).out
        return out

    best = dict.fromkeys(CODECS, np.inf)
    for history in histories.values():
        check(backend, history, recent, query, step(history))
    for _ in range(rounds):
        for name, history in histories.items():
            start = time.perf_counter()
            step(history)
            best[name] = min(best[name], time.perf_counter() - start)
    return {
        "bits": bits,
        "tokens": tokens,
        "query_heads": KV_HEADS * group,
        **{f"{name}_ms": round(1e3 * best[name], 3) for name in CODECS},
        **{f"{name}_speed": round(best["scalar"] / best[name], 3) for name in CODECS[1:]},
    }


def prefill_row(tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds in which the embedded model reads `tokens` tokens, the least of `rounds`, by cache."""
    from transformers import DynamicCache

    from tqai import CacheConfig, TurboQuantCache
    from tqai.demo import load as load_demo

    model, _ = load_demo()
    text = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    caches = {
        "uncompressed": lambda: DynamicCache(config=model.config),
        **{
            name: lambda name=name: TurboQuantCache(
                model, config=CacheConfig(3, 3, codec=name, backend="native")
            )
            for name in CODECS[:2]
        },
    }
    best = dict.fromkeys(caches, np.inf)
    for length in (256, *[tokens] * rounds):
        for name, make in caches.items():
            start = time.perf_counter()
            with torch.no_grad():
                model(input_ids=text[:, :length], past_key_values=make(), logits_to_keep=1)
            if length == tokens:
                best[name] = min(best[name], time.perf_counter() - start)
    return {
        "tokens": tokens,
        **{f"{name}_seconds": round(seconds, 3) for name, seconds in best.items()},
        **{f"{name}_ratio": round(best[name] / best["uncompressed"], 3) for name in CODECS[:2]},
    }


def check(
    backend: Any, history: History, recent: ExactTokens, query: torch.Tensor, out: torch.Tensor
) -> None:
    """Head 0 against attention in float64 on core's decoding of the same pages."""
    pages = backend.to_canonical(history.slabs[0][:, :1], history.page_format)
    keys, values = (
        torch.cat([torch.from_numpy(codec.decode(part)).reshape(-1, DIM).double(), exact[0, 0].double()])
        for codec, part, exact in (
            (history.page_format.key, pages.key, recent.keys),
            (history.page_format.value, pages.value, recent.values),
        )
    )
    wanted = torch.softmax(query[0, 0].double() @ keys.T * DIM**-0.5, -1) @ values
    assert (out[0, 0].double() - wanted).norm() < TOLERANCE * wanted.norm()


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="codes of the torch backend on the GPU as well")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--prefill", type=int, default=8192, help="tokens")
    parser.add_argument("--rounds", type=int, default=2, help="of the prefill")
    parser.add_argument("--only", choices=PARTS, help="one part; the others stay")
    parser.add_argument("--isa", nargs="+", default=["avx512", "avx2", "neon", "scalar"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "trellis.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {"head_dim": DIM, "codes": {}, "attention": {}, "prefill": {}}
    if arguments.only:
        result |= json.loads(arguments.out.read_text(encoding="utf-8"))
    result["provenance"] = provenance()
    parts = (arguments.only,) if arguments.only else PARTS
    native, plain = load("native"), load("torch")
    best = native.isa
    for isa in arguments.isa:
        if not native.use_isa(isa):
            continue
        name = f"native {isa}"
        if "codes" in parts:
            result["codes"][name] = [codes_row(native, c, bits, "cpu", 2) for c in CODECS for bits in BITS]
        if "attention" in parts:
            result["attention"][name] = [
                attention_row(native, bits, tokens, group, max(40, 100_000 // tokens))
                for tokens in arguments.tokens[: 1 if isa == "scalar" else None]
                for bits in BITS
                for group in (1, 4)
            ]
        if "prefill" in parts and isa != "scalar":
            torch.set_num_threads(os.cpu_count() or 1)
            result["prefill"][name] = prefill_row(arguments.prefill, arguments.rounds)
            torch.set_num_threads(1)
    native.use_isa(best)
    if "reference" in parts:
        codes = result["codes"]
        codes["torch cpu"] = [codes_row(plain, c, bits, "cpu", 1) for c in CODECS for bits in BITS]
        if arguments.gpu:
            codes["torch cuda"] = [codes_row(plain, c, bits, "cuda", 256) for c in CODECS for bits in BITS]
            result["gpu"] = torch.cuda.get_device_name()
        codes["core"] = [core_row(c, bits) for c in CODECS for bits in BITS]
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("codes", "attention", "prefill")}, indent=1))


if __name__ == "__main__":
    main()
