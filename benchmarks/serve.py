"""How does the server do under load, compressed, uncompressed, and against `transformers serve`?

    python benchmarks/serve.py                        the embedded model on the CPU; writes the result
    python benchmarks/serve.py --quick                a smoke run, writes nothing
    python benchmarks/serve.py --shape 8b --prompt-tokens 8192,32768 --pool 40GiB
                                                      a random model of 8 billion parameters, on a GPU

An open-loop client sends greedy requests of held-out text (all at once, or at --rate per second) to each
server in turn, with the same prompts and a fixed number of output tokens, and reports requests per
second, time to the first token and time per later token at p50 and p99. The numbers of contexts held
are counted from the pools: pages of a fixed number of bytes over the pages of one context.

Correctness first: a server's figures count only if every request got all its tokens, if a request among
the others got the text that it gets alone, and if the uncompressed server's greedy text is the one of
`model.generate` (its first characters, as arithmetic in another order may part ways later).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from provenance import ROOT, provenance
from serve_load import Load, run_load, summary

from tqai import demo
from tqai.cli.serve import parse_bytes

RESULT = ROOT / "benchmarks" / "results" / "serve.json"
SERVED_NAME = "model"
START_SECONDS = 900
SAME_CHARACTERS = 20
SHAPE_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 4096,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": False,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("embedded", "8b"), default="embedded")
    parser.add_argument("--servers", default="tqai K4/V2,tqai uncompressed,transformers serve")
    parser.add_argument("--prompt-tokens", default="512,2048")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rate", type=float, default=None, help="arrivals per second; without: all at once")
    parser.add_argument("--pool", default="64MiB", help="bytes of the page pool of the tqai servers")
    parser.add_argument("--max-running", type=int, default=8)
    parser.add_argument("--port", type=int, default=8731)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--merge", action="store_true", help="keep the rows of other servers in --out")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.prompt_tokens, options.requests, options.output_tokens = "128", 3, 8
    lengths = [int(n) for n in options.prompt_tokens.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        model_path = str(demo.model_path()) if options.shape == "embedded" else random_model(Path(folder))
        prompts = {n: prompts_of(n, options.requests) for n in lengths}
        rows = []
        for server in options.servers.split(","):
            rows += measure(server.strip(), model_path, prompts, options)
    if options.merge and options.out.is_file():
        fresh = {row["server"] for row in rows}
        before = json.loads(options.out.read_text())["rows"]
        rows = [row for row in before if row["server"] not in fresh] + rows
    result = {
        "what": __doc__.partition("\n")[0],
        "provenance": provenance(),
        "shape": options.shape,
        "pool_bytes": parse_bytes(options.pool, "--pool"),
        "rows": rows,
        "contexts": contexts_held(rows),
    }
    for row in [*rows, *result["contexts"]]:
        print(json.dumps(row))
    if not options.quick:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row.get("correct", True) for row in rows) else 1


def measure(
    server: str, model_path: str, prompts: dict[int, list[str]], options: Any
) -> list[dict[str, Any]]:
    """One row per prompt length. A server that does not start is one row that says so."""
    rows = []
    try:
        with started(server, model_path, options) as url:
            body_of = body_for(server, model_path)
            for length, texts in prompts.items():
                # every length starts with prompts that the server has not seen
                warm = Load([texts[0][: 40 * (1 + length % 7)]], 4, None)
                run_load(url, warm, body_of)
                load = Load(texts, options.output_tokens, options.rate)
                seconds, measured = run_load(url, load, body_of)
                row = {"server": server, "prompt_tokens": length, "output_tokens": options.output_tokens}
                row |= summary(seconds, measured, options.output_tokens)
                _, alone = run_load(url, Load(texts[-1:], options.output_tokens, None), body_of)
                row["same_as_alone"] = alone[0].text == measured[-1].text
                row["correct"] = row["failed"] == 0 and (
                    row["same_as_alone"] or not server.startswith("tqai")
                )
                if server == "tqai uncompressed" and options.shape == "embedded":
                    row["same_as_generate"] = same_as_generate(texts[-1], alone[0].text)
                    row["correct"] = row["correct"] and row["same_as_generate"]
                if server.startswith("tqai"):
                    row["pool"] = pool_of(url, length + options.output_tokens)
                rows.append(row)
    except Unavailable as error:
        rows.append({"server": server, "unavailable": str(error)})
    return rows


class Unavailable(Exception):
    """A server that cannot be measured here, and why."""


@contextmanager
def started(server: str, model_path: str, options: Any) -> Iterator[str]:
    """The URL of a running server."""
    url = f"http://127.0.0.1:{options.port}"
    if server.startswith("tqai"):
        kind = server.removeprefix("tqai ")
        command = [
            sys.executable,
            "-m",
            "tqai",
            "serve",
            "-m",
            model_path,
            "--served-model-name",
            SERVED_NAME,
        ]
        command += ["--no-tqai"] if kind == "uncompressed" else ["--config", kind]
        command += ["--max-kv-memory", options.pool, "--max-running", str(options.max_running)]
        dtype = "float32" if options.shape == "embedded" else "bfloat16"
        command += ["--dtype", dtype, "--port", str(options.port)]
    else:
        tool = Path(sys.executable).with_name("transformers")
        command = [str(tool), "serve", model_path, "--port", str(options.port), "--host", "127.0.0.1"]
        command += ["--dtype", "float32" if options.shape == "embedded" else "bfloat16"]
        if "continuous" in server:
            command.append("--continuous-batching")
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                said = log.read().strip().splitlines()
                raise Unavailable(said[-1][:200] if said else "did not start")
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.close()


def body_for(server: str, model_path: str) -> Any:
    """How a request to this server is written."""

    def tqai_body(prompt: str, tokens: int) -> dict[str, Any]:
        body = {"model": SERVED_NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        return {**body, "ignore_eos": True, "stream": True}

    def transformers_body(prompt: str, tokens: int) -> dict[str, Any]:
        body = {
            "model": model_path,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0.0,
            "stream": True,
        }
        return {**body, "generation_config": json.dumps({"max_new_tokens": tokens, "min_new_tokens": tokens})}

    return tqai_body if server.startswith("tqai") else transformers_body


def prompts_of(tokens: int, count: int) -> list[str]:
    """`count` different texts of `tokens` tokens of the embedded model's tokenizer, or a few less."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(demo.model_path()))
    ids = tokenizer.encode(demo.retrieval.document() * max(1, tokens * count // 60_000 + 1), verbose=False)
    # what is decoded may be read again as more tokens: leave room
    return [tokenizer.decode(ids[n * 997 : n * 997 + tokens - 8]) for n in range(count)]


def same_as_generate(prompt: str, text: str) -> bool:
    """Whether the uncompressed server begins as `model.generate` does."""
    import torch

    model, tokenizer = demo.load()
    ids = torch.tensor([tokenizer.encode(prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    told = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    size = min(SAME_CHARACTERS, len(told), len(text))
    return size > 0 and told[:size] == text[:size]


def pool_of(url: str, tokens: int) -> dict[str, int]:
    """Pages of the server's pool, their size, and how many contexts of `tokens` tokens they hold."""
    found = httpx.get(f"{url}/status.json", timeout=30).json()
    pages = -(-tokens // 64)
    return {
        "pages": found["pages"],
        "page_bytes": found["page_bytes"],
        "contexts": found["pages"] // pages,
        "tokens": tokens,
    }


def contexts_held(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per prompt length, contexts in the same pool: compressed over uncompressed. The embedded model's
    uncompressed pages are float32 on a CPU, so bfloat16 pages of half the size are counted instead."""
    found = []
    for row in rows:
        if row["server"].startswith("tqai ") and row["server"] != "tqai uncompressed" and "pool" in row:
            other = next(
                (
                    o
                    for o in rows
                    if o["server"] == "tqai uncompressed" and o.get("prompt_tokens") == row["prompt_tokens"]
                ),
                None,
            )
            if other is not None:
                factor = 2 if row_is_float32(other, row) else 1
                contexts = factor * other["pool"]["pages"] // -(-row["pool"]["tokens"] // 64)
                found.append(
                    {
                        "server": row["server"],
                        "tokens": row["pool"]["tokens"],
                        "contexts": row["pool"]["contexts"],
                        "bfloat16_contexts": contexts,
                        "ratio": row["pool"]["pages"] / (factor * other["pool"]["pages"]),
                    }
                )
    return found


def row_is_float32(uncompressed: dict[str, Any], coded: dict[str, Any]) -> bool:
    """Whether uncompressed pages are larger than bfloat16 ones could be: more than 8 times the codes."""
    return bool(uncompressed["pool"]["page_bytes"] > 8 * coded["pool"]["page_bytes"])


def random_model(folder: Path) -> str:
    """A model of 8 billion random parameters in a folder, with the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE_8B)).to(torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(demo.model_path())).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
