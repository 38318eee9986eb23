"""How does the server do on a GPU with a model of Llama 3's 8B shape and long prompts?

    python benchmarks/serve_gpu.py [--parts check,kernels,steps,first,load] [--out FILE]

Random weights, bfloat16, a vocabulary of 4,096. Parts; nothing is timed where the first does not hold:

check   the embedded model: 32 concurrent greedy requests get what each gets alone (float32; in bfloat16 as
        far as the logits tell tokens apart); replayed decode steps against ones that are launched
kernels attention on uncompressed pages against torch's own on tensors that lie side by side
steps   a decode step at 32k tokens: transformers' DynamicCache, tqai uncompressed, tqai K4/V2; bytes; how
        many contexts one pool holds and decodes
first   time to the first token, and the gaps of four requests that decode while a prompt of 32k joins
load    the open-loop client over HTTP against tqai, tqai uncompressed and `transformers serve`, each in this
        process with the same weights, with the client in another
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import serve_check
import serve_steps
import torch
from gpu_timing import gpu_provenance
from serve import SHAPE_8B, prompts_of
from serve_load import Load, run_load_apart, summary

from tqai import demo
from tqai.integrations.transformers.patching import release_attention

RESULT = Path(__file__).parent / "results" / "serve_gpu.json"
KINDS = ("uncompressed", "K4/V2")
SERVERS = (
    "tqai K4/V2",
    "transformers serve",
    "transformers serve without cuDNN",
    "transformers serve continuous",
    "tqai balanced",
    "tqai uncompressed",
)
PORT = 8741
LONG = 32768


def make_model(layers: int) -> Any:
    """Random weights, made on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(**{**SHAPE_8B, "num_hidden_layers": layers}, architectures=["LlamaForCausalLM"])
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def steps_part(model: Any, tokenizer: Any, options: Any) -> dict[str, Any]:
    rows = []
    for batch in options.batches:
        if batch * LONG * 2**17 < 40 << 30:
            rows.append(serve_steps.dynamic_row(model, batch, LONG))
        rows += [serve_steps.decode_row(model, tokenizer, kind, batch, LONG) for kind in KINDS]
        for row in rows[-3:]:
            print(json.dumps(row), flush=True)
    if options.eager:
        rows += [serve_steps.decode_row(model, tokenizer, kind, 8, LONG, graphs=False) for kind in KINDS]
        print(json.dumps(rows[-2:]), flush=True)
    # one pool: what eight uncompressed contexts take
    few = next(row for row in rows if row["kind"] == "uncompressed" and row["contexts"] == 8)
    pages = -(-(LONG + 256) // 64)
    per_context = {row["kind"]: pages * row["page_bytes"] for row in rows if "page_bytes" in row}
    many = 8 * per_context["uncompressed"] // per_context["K4/V2"]
    full = serve_steps.decode_row(model, tokenizer, "K4/V2", many, LONG)
    print(json.dumps(full), flush=True)
    assert full["pages"] * full["page_bytes"] <= few["pages"] * few["page_bytes"]
    pool = {"pool_bytes": few["pages"] * few["page_bytes"], "uncompressed": few, "K4/V2": full}
    pool |= {"contexts_ratio": many / 8, "throughput_ratio": full["tokens_per_s"] / few["tokens_per_s"]}
    by_bytes = (few["allocated_bytes"] / 8) / (full["allocated_bytes"] / many)
    return {"rows": rows, "pool": {**pool, "bytes_per_context_ratio": by_bytes}}


def first_part(model: Any, tokenizer: Any, options: Any) -> dict[str, Any]:
    first, gaps = [], []
    lengths = {8192: token_prompts(tokenizer, 8192, 1)[0], LONG: token_prompts(tokenizer, LONG, 1)[0]}
    others = token_prompts(tokenizer, 2048, 5)[1:]
    for chunk in options.chunks:
        for kind in (*KINDS, "balanced"):
            engine = serve_steps.make_engine(
                model,
                tokenizer,
                kind,
                max_running=8,
                chunk_tokens=chunk,
                max_kv_bytes=16 << 30,
                max_model_len=2 * LONG,
                prefix_caching=False,
            )
            engine.start()
            serve_steps.first_token_rows(engine, kind, {640: lengths[8192][:640]})
            found = serve_steps.first_token_rows(engine, kind, lengths)
            first += [{**row, "chunk_tokens": chunk} for row in found]
            gaps.append(serve_steps.gap_row(engine, kind, others, lengths[LONG]))
            print(json.dumps([*found, gaps[-1]]), flush=True)
            engine.stop()
            del engine
            serve_steps._clean()
    for cudnn in (False, True):
        first += serve_steps.generate_rows(model, lengths, cudnn)
    print(json.dumps(first[-4:]), flush=True)
    return {"first": first, "gaps": gaps}


def token_prompts(tokenizer: Any, tokens: int, count: int) -> list[list[int]]:
    ids = tokenizer.encode(demo.retrieval.document() * (1 + tokens * count // 40_000), verbose=False)
    return [ids[997 * n : 997 * n + tokens] for n in range(count)]


def load_part(model: Any, tokenizer: Any, options: Any) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for server in options.servers:
            try:
                with started(server, model, tokenizer, folder, options) as url:
                    for tokens, requests, output in options.loads:
                        texts = prompts_of(tokens, requests + 1)
                        run_load_apart(url, server, folder, Load([texts[-1][: 2 * tokens]], 4, None))
                        STEPS.clear()
                        load = Load(texts[:-1], output, None)
                        seconds, measured = run_load_apart(url, server, folder, load)
                        row = {"server": server, "prompt_tokens": tokens, "output_tokens": output}
                        rows.append(row | summary(seconds, measured, output))
                        rows[-1]["correct"] = rows[-1]["failed"] == 0
                        # a server that ends early would look fast
                        rows[-1]["fewest_pieces"] = min(one.pieces for one in measured)
                        rows[-1]["engine"] = taken(url)
                        print(json.dumps(rows[-1]), flush=True)
            except Exception as error:  # one server that cannot be measured is a result too
                rows.append({"server": server, "unavailable": f"{type(error).__name__}: {str(error)[:400]}"})
                print(json.dumps(rows[-1]), flush=True)
            serve_steps._clean()
            options.keep("load", rows)
    return rows


STEPS: list[tuple[float, int, int]] = []
"""Of each step of the engine that is measured: seconds, prompt tokens, output tokens."""


def watch(scheduler: Any) -> None:
    """Have `STEPS` filled."""
    step = scheduler.step

    def timed() -> None:
        counters = scheduler.counters
        prompt, output, start = counters.prompt_tokens, counters.generated_tokens, time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        STEPS.append((seconds, counters.prompt_tokens - prompt, counters.generated_tokens - output))

    scheduler.step = timed


def taken(url: str) -> dict[str, Any] | None:
    """Where the engine's time went since the last call."""
    steps = list(STEPS)
    STEPS.clear()
    if not steps:
        return None
    prompts, decode = [s for s in steps if s[1]], [s[0] for s in steps if not s[1]]
    found = {"steps": len(steps), "seconds": sum(s[0] for s in steps), "longest_ms": 1e3 * max(steps)[0]}
    found |= {"prompt_steps": len(prompts), "prompt_seconds": sum(s[0] for s in prompts)}
    found["prompt_ms"] = [round(1e3 * s[0], 1) for s in prompts[:48]]
    return {**found, "decode_ms": 1e3 * statistics.median(decode) if decode else None}


@contextmanager
def started(server: str, model: Any, tokenizer: Any, folder: str, options: Any) -> Iterator[str]:
    """The URL of the server, in threads of this process, over the model that is there."""
    url = f"http://127.0.0.1:{PORT}"
    if server.startswith("tqai"):
        import uvicorn

        from tqai.server.api.app import create_app
        from tqai.server.api.settings import ApiSettings

        engine = serve_steps.make_engine(
            model,
            tokenizer,
            server.removeprefix("tqai "),
            max_running=16,
            chunk_tokens=options.chunks[-1],
            max_kv_bytes=options.pool_gib << 30,
            max_model_len=LONG + 1024,
            prefix_caching=False,  # the prompts of one load begin with those of another
        )
        watch(engine.scheduler)
        engine.start()
        app = create_app(engine, ApiSettings(model_name=folder, max_body_bytes=64 << 20))
        running = uvicorn.Server(uvicorn.Config(app, port=PORT, log_level="error", lifespan="off"))
        thread = threading.Thread(target=running.run, daemon=True)
        thread.start()
        wait_for(url)
        try:
            yield url
        finally:
            running.should_exit = True
            thread.join(60)
            engine.stop()
        return
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    release_attention(model)
    model.set_attn_implementation("sdpa")
    # as torch comes; elsewhere cuDNN's attention is off, because it plans anew for every length
    torch.backends.cuda.enable_cudnn_sdp("without cuDNN" not in server)
    original = model_manager.ModelManager._load_model
    model_manager.ModelManager._load_model = lambda self, *args, **kwargs: model
    serve = None
    try:
        serve = Serve(
            force_model=folder,
            device="cuda",
            dtype="bfloat16",
            port=PORT,
            host="127.0.0.1",
            non_blocking=True,
            continuous_batching="continuous" in server,
        )
        wait_for(url)
        yield url
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)
        model_manager.ModelManager._load_model = original
        if serve is not None:
            serve.server.should_exit = True
            serve._generation_state.shutdown()
            for timed in serve._model_manager.loaded_models.values():
                timed._timer.cancel()
            serve._thread.join(10)


def wait_for(url: str) -> None:
    import httpx

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError("the server does not answer")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="check,kernels,steps,first,load")
    parser.add_argument("--check-dtypes", default="float32,bfloat16")
    parser.add_argument("--layers", type=int, default=SHAPE_8B["num_hidden_layers"])
    parser.add_argument("--batches", default="8", help="of the steps")
    parser.add_argument("--chunks", default="1024,2048", help="the last for the load")
    parser.add_argument("--loads", default="8192x4x64,32768x2x64", help="prompt x requests x output tokens")
    parser.add_argument("--servers", default=",".join(SERVERS))
    parser.add_argument("--pool-gib", type=int, default=40)
    parser.add_argument("--eager", action="store_true", help="steps without graphs too")
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    options.batches = [int(n) for n in options.batches.split(",")]
    options.chunks = [int(n) for n in options.chunks.split(",")]
    options.loads = [tuple(int(n) for n in load.split("x")) for load in options.loads.split(",")]
    options.servers = options.servers.split(",")
    result: dict[str, Any] = {"what": __doc__.partition("\n")[0], "where": gpu_provenance(options.commit)}
    result["shape"] = {**SHAPE_8B, "num_hidden_layers": options.layers}
    result["weights"] = "random"
    started_at = time.monotonic()

    def save(name: str, found: Any) -> None:
        result[name] = found
        result.setdefault("seconds", {})[name] = time.monotonic() - started_at
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {time.monotonic() - started_at:.0f} s", flush=True)

    options.keep = save
    parts, failed = options.parts.split(","), list[str]()
    if "check" in parts:
        dtypes = tuple(getattr(torch, name) for name in options.check_dtypes.split(","))
        save("check", serve_check.check(dtypes))
    torch.backends.cuda.enable_cudnn_sdp(False)
    if set(parts) - {"check"}:
        model, tokenizer = make_model(options.layers), demo.load()[1]
        if "kernels" in parts:
            save("kernels", serve_steps.kernel_rows(options.batches, LONG))
        for name, part in (("steps", steps_part), ("first", first_part), ("load", load_part)):
            if name in parts:
                try:
                    save(name, part(model, tokenizer, options))
                except Exception:  # the other parts stand on their own
                    traceback.print_exc()
                    failed.append(name)
                serve_steps._clean()
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
