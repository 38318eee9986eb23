"""Tokens per second and peak memory of a model of 8 billion parameters with a long cache on this GPU.

    python benchmarks/gpu_generate.py [--out benchmarks/results/gpu_generate.json]

The model has Llama 3's shape (32 layers, 32 query and 8 KV heads, head_dim 128, bfloat16) and random weights.
Caches are filled layer by layer with random keys and values through `cache.update`, as a prompt would fill
them; then tokens are decoded by the model. transformers' DynamicCache runs eagerly (its tensors grow, so it
cannot be captured), with torch's flash attention: cuDNN's would prepare a new plan at every length, which
takes 100 ms. transformers' StaticCache, of just the room that is needed, is captured as tqai's step is, where
it fits. tqai runs eagerly and as a CUDA graph (`DecodeGraph`). Before anything is timed, the first
step's logits with tqai eagerly and captured are compared; the bound allows for what another order of
summation, rounded to bfloat16, becomes in 32 layers of random weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_timing import gpu_provenance
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from tqai import TurboQuantCache
from tqai.integrations.transformers.decode_graph import DecodeGraph

LAYERS, HEADS, KV_HEADS, DIM = 32, 32, 8, 128
PACKED: dict[str, dict[str, Any]] = {
    "K4/V2": {"bits_k": 4, "bits_v": 2},
    "K4/V4": {"bits_k": 4, "bits_v": 4},
    "balanced": {"config": "balanced"},
}
SIZES = ((1, 2048), (1, 32768), (1, 131072), (8, 2048), (8, 32768), (8, 131072))
LARGEST_DYNAMIC = {(8, 131072): 6}
"""Where DynamicCache does not fit, the batch that does."""
WARM_UPS, STEPS = 4, 32
FILL_TOKENS = 8192
TOLERANCE = 6e-2


def make_model() -> Any:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=1 << 18,
        rope_theta=500000.0,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def fill(cache: Any, batch: int, tokens: int) -> None:
    """Random keys and values, seeded by layer, through the cache's own `update`."""
    for layer in range(LAYERS):
        generator = torch.Generator("cuda").manual_seed(layer)
        for start in range(0, tokens, FILL_TOKENS):
            shape = (batch, KV_HEADS, min(FILL_TOKENS, tokens - start), DIM)
            keys, values = (
                torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in "kv"
            )
            cache.update(keys, values, layer)


def timed(step: Callable[[torch.Tensor], torch.Tensor], batch: int) -> tuple[float, int]:
    """Seconds per step, and bytes of GPU memory at the peak of the timed steps."""
    ids = torch.zeros((batch, 1), dtype=torch.int64, device="cuda")
    for _ in range(WARM_UPS):
        ids = step(ids).argmax(-1, keepdim=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(STEPS):
        ids = step(ids).argmax(-1, keepdim=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS, torch.cuda.max_memory_allocated()


def row(
    kind: str, mode: str, batch: int, tokens: int, seconds: float, peak: int, held: int
) -> dict[str, Any]:
    made = {"cache": kind, "mode": mode, "batch": batch, "tokens": tokens, "step_ms": seconds * 1e3}
    made |= {"tokens_per_s": batch / seconds, "peak_bytes": peak, "cache_bytes": held}
    print(
        f"B{batch} {tokens:6d} {kind:12} {mode:6} {seconds * 1e3:7.2f} ms, {batch / seconds:7.1f} tokens/s, "
        f"peak {peak / 2**30:.1f} GiB, cache {held / 2**30:.2f} GiB",
        flush=True,
    )
    return made


def dynamic_row(model: Any, batch: int, tokens: int) -> dict[str, Any]:
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    fill(cache, batch, tokens)
    seconds, peak = timed(lambda ids: model(ids, past_key_values=cache, use_cache=True).logits[:, -1], batch)
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    return row("DynamicCache", "eager", batch, tokens, seconds, peak, held)


def static_row(model: Any, batch: int, tokens: int) -> dict[str, Any] | None:
    """StaticCache, captured; None where it does not fit or cannot be captured."""
    model.set_attn_implementation("sdpa")
    ids = torch.zeros((batch, 1), dtype=torch.int64, device="cuda")
    try:
        cache = StaticCache(config=model.config, max_cache_len=tokens + WARM_UPS + STEPS + 8)
        fill(cache, batch, tokens)

        def forward() -> torch.Tensor:
            return model(ids, past_key_values=cache, use_cache=True).logits[:, -1]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = forward()
    except Exception as error:  # out of memory, or an operation that waits for the device
        print(
            f"B{batch} {tokens} StaticCache: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True
        )
        return None

    def step(given: torch.Tensor) -> torch.Tensor:
        ids.copy_(given)
        graph.replay()
        return logits

    seconds, peak = timed(step, batch)
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    return row("StaticCache", "graph", batch, tokens, seconds, peak, held)


def packed_rows(model: Any, batch: int, tokens: int, kind: str) -> list[dict[str, Any]]:
    cache = TurboQuantCache(model, **PACKED[kind], backend="cuda")
    fill(cache, batch, tokens)
    rows: list[dict[str, Any]] = []
    ids = torch.zeros((batch, 1), dtype=torch.int64, device="cuda")

    def eager(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, past_key_values=cache, use_cache=True).logits[:, -1]

    first = eager(ids).double()
    cache.crop(-1)
    graph = DecodeGraph(model, cache)
    error = ((graph(ids).double() - first).norm() / first.norm()).item()
    if not error < TOLERANCE:
        raise SystemExit(
            f"{kind} B{batch} {tokens}: captured and eager logits differ by {error:.1e}: not timed"
        )
    for mode, step in (("graph", graph), ("eager", eager)):
        seconds, peak = timed(step, batch)
        rows.append(row(kind, mode, batch, tokens, seconds, peak, cache.memory().total_bytes))
        rows[-1]["captured_against_eager"] = error
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", help='such as "1x2048,8x32768"; all by default')
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_generate.json")
    arguments = parser.parse_args()
    sizes = SIZES
    if arguments.sizes:
        sizes = tuple(tuple(int(n) for n in size.split("x")) for size in arguments.sizes.split(","))
    torch.manual_seed(0)
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = make_model()
    weights = torch.cuda.memory_allocated()
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for batch, tokens in sizes:
            dynamic = dynamic_row(model, LARGEST_DYNAMIC.get((batch, tokens), batch), tokens)
            rows.append(dynamic)
            gc.collect()
            torch.cuda.empty_cache()
            static = static_row(model, batch, tokens) if dynamic["batch"] == batch else None
            if static is not None:
                rows.append(static)
            for kind in PACKED:
                gc.collect()
                torch.cuda.empty_cache()
                for found in packed_rows(model, batch, tokens, kind):
                    found["speedup"] = found["tokens_per_s"] / dynamic["tokens_per_s"]
                    if static is not None and found["mode"] == "graph":
                        found["against_static_graph"] = found["tokens_per_s"] / static["tokens_per_s"]
                    if dynamic["batch"] == batch:
                        saved = dynamic["cache_bytes"] - found["cache_bytes"]
                        found["peak_saved_over_bytes_saved"] = (
                            dynamic["peak_bytes"] - found["peak_bytes"]
                        ) / saved
                    rows.append(found)
            gc.collect()
            torch.cuda.empty_cache()
            # after every size: a run that is stopped has not been for nothing
            report = {"where": gpu_provenance(arguments.commit), "weights_bytes": weights, "rows": rows}
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
