"""How fast is decode attention on packed codes on this GPU, and is it right?

    python benchmarks/gpu_attention.py [--backends cuda,triton] [--out benchmarks/results/gpu_attention.json]

One layer: 32 query heads, 8 KV heads, head_dim 128, bfloat16, one new token (the only exact one). The
alternative is torch's scaled_dot_product_attention on bfloat16 keys and values, the fastest of its
backends, in the same run. A packed path is timed only after its result agrees with float64 attention to
what its own pages decode to. Calls rotate among several caches, so that none is found in the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import L2_ROTATION_BYTES, eager_us, gpu_provenance, graph_us, read_rate
from torch.nn.attention import SDPBackend, sdpa_kernel

from tqai.backends.base import ExactTokens, History
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PAGE_TOKENS, PageFormat

HEADS, KV_HEADS, DIM = 32, 8, 128
SCALING = DIM**-0.5
BATCHES = (1, 8)
PAIRS = ((4, 2), (4, 4), (3, 3), (8, 8))
TOLERANCE = 2e-3
ROUNDED_TOLERANCE = 3e-3
STEEP = 8.0
"""Logits have standard deviation 1; the error is also recorded with queries so many times as large."""
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "default": None}


def sdpa_times(batch: int, length: int) -> dict[str, dict[str, float]]:
    """Graph and eager microseconds of each backend of torch that serves this."""
    shape = (batch, KV_HEADS, length, DIM)
    sets = max(1, min(8, L2_ROTATION_BYTES // (4 * batch * KV_HEADS * length * DIM) + 1))
    pairs = [
        tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)) for _ in range(sets)
    ]
    query = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    times = {}
    for name, kind in SDPA.items():

        def call(keys: torch.Tensor, values: torch.Tensor, kind: Any = kind) -> torch.Tensor:
            if kind is None:
                return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

        calls = [lambda pair=pair, call=call: call(*pair) for pair in pairs]
        try:
            times[name] = {"graph_us": graph_us(calls), "eager_us": eager_us(calls)}
        except RuntimeError as error:
            print(f"  sdpa {name} does not serve this: {str(error).splitlines()[0]}", file=sys.stderr)
    return times


def filled(backend: Any, page_format: PageFormat, batch: int, length: int) -> tuple[torch.Tensor, History]:
    """Pages of random keys and values, laid out as a cache has them."""
    pages = length // PAGE_TOKENS
    raw = torch.empty(batch * pages, KV_HEADS, page_format.page_bytes, dtype=torch.uint8, device="cuda")
    for part in raw.split(1024):
        shape = (len(part), KV_HEADS, PAGE_TOKENS, DIM)
        keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        backend.encode(keys, values, page_format, part)
    ids = torch.arange(batch * pages, device="cuda").view(batch, pages)
    addresses = raw.data_ptr() + ids * raw.stride(0)
    return raw, History(page_format, [raw], [0], ids.cpu().int().numpy(), addresses)


def error_of(
    backend: Any,
    raw: torch.Tensor,
    history: History,
    query: torch.Tensor,
    recent: ExactTokens,
    out: torch.Tensor,
) -> float:
    """Relative L2 error of `out` against float64 attention to the decoded pages and the recent token."""
    batch, group = query.shape[0], HEADS // KV_HEADS
    pages = raw.view(batch, -1, *raw.shape[1:])
    wrong = total = 0.0
    for b in range(batch):
        for h in range(KV_HEADS):
            keys, values = backend.decode(pages[b, :, h].contiguous(), history.page_format, torch.float32)
            keys = torch.cat([keys.reshape(-1, DIM), recent.keys[b, h].float()]).double()
            values = torch.cat([values.reshape(-1, DIM), recent.values[b, h].float()]).double()
            mine = slice(h * group, (h + 1) * group)
            weights = torch.softmax(query[b, mine, 0].double() @ keys.T * SCALING, -1)
            wanted = weights @ values
            wrong += (out[b, mine, 0].double() - wanted).square().sum().item()
            total += wanted.square().sum().item()
    return float((wrong / total) ** 0.5)


def exact_result(backend: Any, query: torch.Tensor, history: History, recent: ExactTokens) -> torch.Tensor:
    """The result before it is rounded to the query's dtype, where the backend can give it."""
    if backend.name == "cuda":
        from tqai.backends.cuda.attention import Exact, attend_pages

        result = attend_pages(
            query,
            history.page_format,
            history.addresses,
            history.pages,
            SCALING,
            recent=Exact(*recent),
            out_dtype=torch.float32,
        )
        return result[0]
    return backend.attend(query, history, None, recent, None, SCALING).out


def packed_row(backend: Any, batch: int, length: int, bits_k: int, bits_v: int) -> dict[str, Any]:
    """One checked and timed row."""
    page_format = PageFormat(*(make_codec(CodecSpec("scalar", DIM, bits)) for bits in (bits_k, bits_v)))
    refusal = backend.refuses(page_format, "cuda", "bfloat16")
    if refusal is not None:
        raise SystemExit(f"{backend.name}: {refusal}")
    size = batch * KV_HEADS * (length // PAGE_TOKENS) * page_format.page_bytes
    caches = [
        filled(backend, page_format, batch, length)
        for _ in range(max(1, min(8, L2_ROTATION_BYTES // size + 1)))
    ]
    query = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    recent = ExactTokens(
        *(torch.randn(batch, KV_HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    )
    raw, history = caches[0]
    error = error_of(backend, raw, history, query, recent, exact_result(backend, query, history, recent))
    rounded = backend.attend(query, history, None, recent, None, SCALING).out
    rounded_error = error_of(backend, raw, history, query, recent, rounded)
    if not (error < TOLERANCE or backend.name != "cuda") or not rounded_error < ROUNDED_TOLERANCE:
        raise SystemExit(
            f"{backend.name} K{bits_k}/V{bits_v}: error {error:.2e}, rounded {rounded_error:.2e}: not timed"
        )
    steep = STEEP * query
    steep_error = error_of(
        backend, raw, history, steep, recent, exact_result(backend, steep, history, recent)
    )
    calls = [lambda h=h: backend.attend(query, h, None, recent, None, SCALING) for _, h in caches]
    graph = graph_us(calls)
    return {
        "backend": backend.name,
        "batch": batch,
        "tokens": length,
        "bits_k": bits_k,
        "bits_v": bits_v,
        "packed_bytes": size,
        "error": error,
        "error_bfloat16": rounded_error,
        "error_at_deviation_8": steep_error,
        "graph_us": graph,
        "eager_us": eager_us(calls),
        "bytes_per_s": size / (graph * 1e-6),
    }


def backends(names: str) -> list[Any]:
    """The named backends, straight from their packages, so that none stands in for another."""
    found: list[Any] = []
    for name in names.split(","):
        if name == "cuda":
            from tqai.backends.cuda import CudaBackend

            found.append(CudaBackend())
        elif name == "triton":
            from tqai.backends.triton import TritonBackend

            found.append(TritonBackend())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default="cuda")
    parser.add_argument("--lengths", default="4096,32768,131072", help="tokens, in turn for batch 1 and 8")
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_attention.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    served = backends(arguments.backends)
    rate = read_rate()
    torch.cuda.empty_cache()
    print(f"reading {rate / 1e12:.2f} TB/s", flush=True)
    rows: list[dict[str, Any]] = []
    lengths = [int(length) for length in arguments.lengths.split(",")]
    for batch, length in product(BATCHES, lengths):
        sdpa = sdpa_times(batch, length)
        torch.cuda.empty_cache()
        fastest = {kind: min(t[kind] for t in sdpa.values()) for kind in ("graph_us", "eager_us")}
        rows.append(
            {"backend": "torch SDPA bfloat16", "batch": batch, "tokens": length, "times": sdpa, **fastest}
        )
        print(
            f"B{batch} {length:6d} SDPA  graph {fastest['graph_us']:7.1f} "
            f"eager {fastest['eager_us']:7.1f} us",
            flush=True,
        )
        for backend in served:
            for bits_k, bits_v in PAIRS:
                row = packed_row(backend, batch, length, bits_k, bits_v)
                torch.cuda.empty_cache()
                row["speedup_graph"] = fastest["graph_us"] / row["graph_us"]
                row["speedup_eager"] = fastest["eager_us"] / row["eager_us"]
                row["of_read_rate"] = row["bytes_per_s"] / rate
                rows.append(row)
                name = f"B{batch} {length:6d} {backend.name:6} K{bits_k}/V{bits_v}"
                print(
                    f"{name} graph {row['graph_us']:7.1f} ({row['speedup_graph']:.2f}x) eager "
                    f"{row['eager_us']:7.1f} ({row['speedup_eager']:.2f}x) {row['of_read_rate']:.0%} "
                    f"error {row['error']:.1e} bf16 {row['error_bfloat16']:.1e} "
                    f"steep {row['error_at_deviation_8']:.1e}",
                    flush=True,
                )
        # after every size: a run that is stopped has not been for nothing
        report = {"where": gpu_provenance(arguments.commit), "read_bytes_per_s": rate, "rows": rows}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
