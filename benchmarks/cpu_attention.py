"""How fast is decode attention on packed codes on this CPU?

    python benchmarks/cpu_attention.py [--lengths 4096 32768] [--plot docs/images/cpu_attention.svg]

One layer, batch 1, 8 KV heads, 32 query heads, head_dim 128, one new token. Every path attends to the
same tokens; a path is timed only after its result agrees with float64 attention to what it stores. The
packed paths are compared with the fastest of six torch formulations on bfloat16 and on float32. Ratios to
ggml, which is not measured here, come from benchmarks/peers/cpu_decode.json: another machine's figures.
Times are medians of interleaved runs; "best" is the least. Also measured in the same run, to say what is
left: the encoder; the machine's read bandwidth; at each length the time of reading the packed bytes once,
in turns with the rest; and what the kernels compute when all lies in the caches, per page and thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tqai.backends import load
from tqai.backends.base import ExactTokens, History
from tqai.cache.layer import page_format_for
from tqai.config import CacheConfig
from tqai.core.page import PAGE_TOKENS

KV_HEADS, GROUP, DIM = 8, 4, 128
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
PAIRS = ((4, 4), (4, 2), (3, 3), (2, 2), (8, 8))
SCALING = DIM**-0.5
ENCODED_PAGES = 512
PEERS = Path(__file__).parent / "peers" / "cpu_decode.json"
KERNEL_TOLERANCE = 2e-3
TORCH_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def packed(backend, bits, tokens, query):
    """(call, its decoded keys and values float64, its bytes) of a history of random tokens."""
    page_format = page_format_for(CacheConfig(bits_k=bits[0], bits_v=bits[1]), DIM, DIM)
    pages = tokens // PAGE_TOKENS
    slab = torch.empty((pages, KV_HEADS, page_format.page_bytes), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(tokens)
    # all at once up to 32k tokens, as a prefill does: memory for whole calls comes in large pages
    for start in range(0, pages, ENCODED_PAGES):
        shape = (min(ENCODED_PAGES, pages - start), KV_HEADS, PAGE_TOKENS, DIM)
        rows = [torch.randn(shape, generator=generator) for _ in range(2)]
        backend.encode(*rows, page_format, slab[start : start + ENCODED_PAGES])
    addresses = (slab.data_ptr() + torch.arange(pages) * slab.stride(0)).view(1, pages)
    history = History(page_format, [slab], [0], np.arange(pages, dtype=np.int32)[None], addresses)
    recent = ExactTokens(*(torch.randn(1, KV_HEADS, 1, DIM, generator=generator) for _ in range(2)))

    def call() -> torch.Tensor:
        return backend.attend(query, history, None, recent, None, SCALING).out

    def tokens64():
        decoded = backend.decode(slab, page_format, torch.float32)
        return [
            torch.cat([old.transpose(0, 1).flatten(1, 2)[None].double(), new.double()], 2)
            for old, new in zip(decoded, recent, strict=True)
        ]

    return call, tokens64, slab


def torch_paths(dtype, tokens):
    """Name -> call of every formulation of the same attention in torch, and its tokens."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, KV_HEADS * GROUP, 1, DIM, generator=generator).to(dtype)
    keys, values = (torch.randn(1, KV_HEADS, tokens, DIM, generator=generator).to(dtype) for _ in range(2))
    rows = query.view(1, KV_HEADS, GROUP, DIM)
    shape = query.shape

    def plain() -> torch.Tensor:
        weights = torch.softmax(torch.matmul(rows * SCALING, keys.transpose(-1, -2)), dim=-1)
        return torch.matmul(weights, values).view(shape)

    def batched() -> torch.Tensor:
        weights = torch.bmm(rows[0] * SCALING, keys[0].transpose(-1, -2)).softmax(-1)
        return torch.bmm(weights, values[0]).view(shape)

    paths = {
        "sdpa_gqa": lambda: F.scaled_dot_product_attention(query, keys, values, enable_gqa=True),
        "sdpa_rows": lambda: F.scaled_dot_product_attention(rows, keys, values).view(shape),
        "matmul": plain,
        "bmm": batched,
    }
    if tokens <= 32768:
        wide = [x.repeat_interleave(GROUP, dim=1) for x in (keys, values)]
        paths["sdpa_repeated"] = lambda: F.scaled_dot_product_attention(query, *wide)
    return paths, query, keys, values


@lru_cache(maxsize=1)
def compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex_path(query, keys, values):
    """(flex attention, compiled; None) or (None, the reason why torch cannot build it here)."""

    def call() -> torch.Tensor:
        return compiled_flex()(query, keys, values, enable_gqa=True)

    try:
        call()
    except Exception as error:
        return None, (str(error).splitlines() or [type(error).__name__])[0][:200]
    return call, None


def ggml_ratios(tokens, times):
    """Name -> {"f16": ..., "q4_0": ...}: ggml's time on the peers' machine over ours on this one."""
    ggml = next(rows for name, rows in json.loads(PEERS.read_text()).items() if name.startswith("ggml"))
    return {
        name: {
            kind: round(rows[str(tokens)] / entry["median_ms"], 2)
            for kind, rows in ggml.items()
            if str(tokens) in rows
        }
        for name, entry in times.items()
        if name.startswith("native")
    }


def attention64(query, keys, values):
    rows = query.double().view(1, KV_HEADS, GROUP, DIM)
    weights = torch.softmax(rows @ keys.transpose(-1, -2) * SCALING, -1)
    return (weights @ values).view(query.shape)


def error_of(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def interleaved(calls, before, budget_s):
    """Times in ms of every call, taken in turns so that all see the same noise; `before` has what is to be
    done before some of them, untimed. Formulations of torch that are six times slower than its fastest after
    two turns, or three times after seven, get no further ones."""
    times = {name: [] for name in calls}
    for name, call in calls.items():
        before.get(name, int)()
        call()
    end, turns, calls = time.perf_counter() + budget_s, 0, dict(calls)
    while time.perf_counter() < end or turns < 15:
        turns += 1
        if turns in (3, 8):
            medians = {name: statistics.median(x) for name, x in times.items() if name.startswith("torch")}
            for name, median in medians.items():
                if name in calls and median > (6 if turns == 3 else 3) * min(medians.values()):
                    del calls[name]
        for name, call in calls.items():
            before.get(name, int)()
            call()  # the second of two in a row: threads awake, as within a model
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {"median_ms": statistics.median(x), "best_ms": min(x), "runs": len(x)}
        for name, x in times.items()
    }


def read_bandwidth(size_bytes=1 << 28):
    """Bytes per second of summing a buffer larger than the caches with all threads."""
    buffer = torch.ones(size_bytes // 8, dtype=torch.int64)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        buffer.sum()
        times.append(time.perf_counter() - start)
    return size_bytes / min(times)


def at_length(backend, isas, pairs, tokens, budget_s, with_flex):
    query = torch.randn(1, KV_HEADS * GROUP, 1, DIM, generator=torch.Generator().manual_seed(2))
    calls, before, bytes_held, errors = {}, {}, {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        paths, torch_query, keys, values = torch_paths(dtype, tokens)
        wanted = attention64(torch_query, keys.double(), values.double())
        flex, why_not = flex_path(torch_query, keys, values) if with_flex else (None, "left out")
        if flex is None:
            print(f"no flex attention: {why_not}")
        else:
            paths["flex"] = flex
        for path, call in paths.items():
            full = f"torch {path} {name}"
            errors[full] = error_of(call(), wanted)
            assert errors[full] < TORCH_TOLERANCE[name], (full, errors[full])
            calls[full] = call
            bytes_held[full] = keys.nbytes + values.nbytes
    for pair in pairs:
        call, tokens64, slab = packed(backend, pair, tokens, query)
        wanted = attention64(query, *tokens64())
        for isa in isas:
            assert backend.use_isa(isa)
            full = f"native {isa} K{pair[0]}/V{pair[1]}"
            errors[full] = error_of(call(), wanted)
            assert errors[full] < KERNEL_TOLERANCE, (full, errors[full])
            calls[full], before[full] = call, partial(backend.use_isa, isa)
            bytes_held[full] = slab.numel()
        words = slab.view(-1).view(torch.int64)
        calls[f"read K{pair[0]}/V{pair[1]}"] = words.sum
        bytes_held[f"read K{pair[0]}/V{pair[1]}"] = slab.numel()
    times = interleaved(calls, before, budget_s)
    torch_best = min(v["median_ms"] for k, v in times.items() if k.startswith("torch"))
    for name, entry in times.items():
        entry["bytes_held"] = bytes_held[name]
        if name.startswith("read"):
            continue
        entry["relative_error"] = errors[name]
        entry["times_faster_than_fastest_torch"] = torch_best / entry["median_ms"]
    return times


def compute_us_per_page(backend, isas, pairs):
    """Microseconds that one thread computes for a page of 64 tokens of one KV head, codes in the caches: what
    16 pages more cost it, the least of many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    query = torch.randn(1, KV_HEADS * GROUP, 1, DIM)
    costs = {}
    for pair in pairs:
        short, long = (packed(backend, pair, tokens, query)[0] for tokens in (512, 1536))
        for isa in isas:
            assert backend.use_isa(isa)
            best = []
            for call in (short, long):
                times = []
                for _ in range(300):
                    start = time.perf_counter()
                    call()
                    times.append(time.perf_counter() - start)
                best.append(min(times))
            costs[f"{isa} K{pair[0]}/V{pair[1]}"] = 1e6 * (best[1] - best[0]) / (16 * KV_HEADS)
    torch.set_num_threads(before)
    return costs


def encode_rates(backend, isas, pairs):
    """MB of float32 input per second and core, one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rates = {}
    rows = [torch.randn(8, KV_HEADS, PAGE_TOKENS, DIM) for _ in range(2)]
    for isa in isas:
        assert backend.use_isa(isa)
        for bits_k, bits_v in pairs:
            page_format = page_format_for(CacheConfig(bits_k=bits_k, bits_v=bits_v), DIM, DIM)
            out = torch.empty(8, KV_HEADS, page_format.page_bytes, dtype=torch.uint8)
            times = []
            for _ in range(15):
                start = time.thread_time()
                backend.encode(*rows, page_format, out)
                times.append(time.thread_time() - start)
            rates[f"{isa} K{bits_k}/V{bits_v}"] = round(2 * rows[0].nbytes / min(times) / 1e6)
    torch.set_num_threads(before)
    return rates


def commit():
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or None


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        return f"{found.get('model name')} family {found.get('cpu family')} model {found.get('model')}"
    except OSError:
        return platform.processor()


def plot(result, path):
    """Time per call over tokens, log-log: the fastest torch formulation and the packed paths."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tqai"
    from matplotlib import pyplot

    lengths = [int(tokens) for tokens in result["lengths"]]
    runs = list(result["lengths"].values())
    lines = {
        "fastest torch formulation": [min(v["median_ms"] for k, v in r.items() if "torch" in k) for r in runs]
    }
    for name in runs[0]:
        if name.startswith("native") and name.split()[2] in ("K4/V4", "K4/V2"):
            lines[name.removeprefix("native ")] = [r[name]["median_ms"] for r in runs]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, values in lines.items():
        axes.loglog(lengths, values, marker="o", label=name)
    axes.set_xticks(lengths, [f"{x // 1024}k" for x in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds per layer and token")
    axes.set_title("decode attention, 8 KV heads, 32 query heads, head_dim 128")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def pair_of(text):
    """(4, 2) of "4/2"."""
    keys, values = text.split("/")
    return int(keys), int(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens")
    parser.add_argument(
        "--pairs", type=pair_of, nargs="+", default=PAIRS, help="bits of keys and values: 4/2"
    )
    parser.add_argument("--no-flex", action="store_true", help="leave out flex attention, which is compiled")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds per length")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_attention.json")
    parser.add_argument("--commit", help="what is measured, where there is no git history")
    parser.add_argument("--plot", type=Path, help="draw an SVG of time over tokens there")
    parser.add_argument("--from-results", action="store_true", help="draw from --out, measure nothing")
    options = parser.parse_args()
    if options.from_results:
        plot(json.loads(options.out.read_text()), options.plot)
        return
    torch.set_grad_enabled(False)
    backend = load("native")
    chosen = backend.isa
    isas = [isa for isa in ("avx512", "avx2", "neon") if backend.use_isa(isa)]
    result = {
        "question": __doc__.splitlines()[0],
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "instruction_set": chosen},
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
        "commit": options.commit or commit(),
        "shape": {
            "batch": 1,
            "kv_heads": KV_HEADS,
            "query_heads": KV_HEADS * GROUP,
            "head_dim": DIM,
            "new_tokens": 1,
        },
        "read_bytes_per_s": read_bandwidth(),
        "encode_MB_per_s_per_core": encode_rates(backend, isas, options.pairs),
        "compute_us_per_page": compute_us_per_page(backend, isas, options.pairs),
        "lengths": {},
        "ggml_elsewhere_over_here": {},
    }
    for tokens in options.lengths:
        times = at_length(backend, isas, options.pairs, tokens, options.budget, not options.no_flex)
        result["lengths"][tokens] = times
        if tokens in (4096, 32768, 131072):
            result["ggml_elsewhere_over_here"][tokens] = ggml_ratios(tokens, times)
        for name, entry in sorted(times.items(), key=lambda item: item[1]["median_ms"]):
            print(f"{tokens:7} {name:28} {entry['median_ms']:9.3f} ms  best {entry['best_ms']:9.3f}", end="")
            if name.startswith("read"):
                print()
                continue
            print(f"  {entry['times_faster_than_fastest_torch']:6.2f}x  error {entry['relative_error']:.1e}")
    result["read_bytes_per_s_at_the_end"] = read_bandwidth()
    for tokens, times in result["lengths"].items():
        pages = tokens // PAGE_TOKENS * KV_HEADS
        for name, entry in times.items():
            if name.startswith("native"):
                _, isa, pair = name.split()
                entry["of_the_time_to_read_its_bytes"] = (
                    entry["median_ms"] / times[f"read {pair}"]["median_ms"]
                )
                entry["compute_ms"] = (
                    result["compute_us_per_page"][f"{isa} {pair}"]
                    * pages
                    / 1e3
                    / result["machine"]["threads"]
                )
    backend.use_isa(chosen)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(result, options.plot)
    print(f"read {result['read_bytes_per_s'] / 1e9:.1f} GB/s; encode {result['encode_MB_per_s_per_core']}")


if __name__ == "__main__":
    main()
