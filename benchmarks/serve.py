"""How does the server do under load on a CPU: compressed, uncompressed, and against `transformers serve`?

    python benchmarks/serve.py             writes the result
    python benchmarks/serve.py --quick     a smoke run, writes nothing

The servers run side by side, idle but for one. In a round every server in turn gets the same greedy requests
of held-out text, all at once or at --rate per second (an open loop: requests arrive when they arrive); each
round begins with another server. Reported are requests per second, time to the first token and time per later
token at p50 and p99, medians over the rounds. --wrap names a command that the client is run by, such as one
that keeps other programs from the processors. `serve_gpu.py` is the same on a GPU.

Correctness first: figures count only if every request got all its tokens, if tqai's requests got the text
that each gets alone, and if the uncompressed server's text begins as that of `model.generate`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from provenance import ROOT, provenance
from serve_load import Load, run_load_apart, summary

from tqai import demo
from tqai.cli.serve import parse_bytes

RESULT = ROOT / "benchmarks" / "results" / "serve_cpu.json"
SERVED_NAME = "model"
START_SECONDS = 300
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
    parser.add_argument("--servers", default="tqai K4/V2,tqai uncompressed,transformers serve")
    parser.add_argument("--loads", default="512x4x24,2048x3x24", help="prompt x requests x output tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=float, default=None, help="arrivals per second; without: all at once")
    parser.add_argument("--pool", default="128MiB", help="bytes of the page pool of the tqai servers")
    parser.add_argument("--max-running", type=int, default=8)
    parser.add_argument("--model", default=str(demo.model_path()))
    parser.add_argument("--port", type=int, default=8731, help="of the first server")
    parser.add_argument("--wrap", default="")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.loads, options.rounds = "128x2x6", 1
    options.loads = [tuple(int(n) for n in load.split("x")) for load in options.loads.split(",")]
    servers = [server.strip() for server in options.servers.split(",")]
    rounds = []
    with ExitStack() as stack:
        starting = [
            stack.enter_context(started(server, options, options.port + index))
            for index, server in enumerate(servers)
        ]
        urls = {server: await_start() for server, await_start in zip(servers, starting, strict=True)}
        expected = {server: alone(server, urls[server], options) for server in servers}
        pools = {server: pool_of(urls[server]) for server in servers if server.startswith("tqai")}
        for turn in range(options.rounds):
            order = servers[turn % len(servers) :] + servers[: turn % len(servers)]
            for load in options.loads:
                for server in order:
                    rounds.append(measure(server, urls[server], load, expected[server], options))
                    print(json.dumps(rounds[-1]), flush=True)
    result = {
        "what": __doc__.partition("\n")[0],
        "provenance": provenance(),
        "pool_bytes": parse_bytes(options.pool, "--pool"),
        "pools": pools,
        "rows": medians(rounds),
        "rounds": rounds,
    }
    if not options.quick:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["correct"] for row in rounds) else 1


def alone(server: str, url: str, options: Any) -> dict[str, list[str]]:
    """Hashes of the texts that the requests of every load get one by one."""
    found: dict[str, list[str]] = {}
    for tokens, count, output in options.loads:
        one_by_one = Load(prompts_of(tokens, count), output, 0)
        _, measured = run_load_apart(url, server, name_for(server, options), one_by_one)
        assert all(one.status == 200 and one.text for one in measured), (server, measured)
        if server == "tqai uncompressed":
            assert same_as_generate(one_by_one.prompts[0], measured[0].text), "other text than generate's"
        found[str(tokens)] = [_digest(one.text) for one in measured]
    return found


def name_for(server: str, options: Any) -> str:
    """What the server calls its model."""
    return SERVED_NAME if server.startswith("tqai") else str(options.model)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(
    server: str, url: str, load: tuple[int, int, int], expected: dict[str, list[str]], options: Any
) -> dict[str, Any]:
    """One server under one load. Prefix caches are off: the prompts are those of the other rounds."""
    tokens, count, output = load
    wanted = Load(prompts_of(tokens, count), output, options.rate)
    seconds, measured = run_load_apart(url, server, name_for(server, options), wanted, options.wrap)
    row = {"server": server, "prompt_tokens": tokens, "output_tokens": output}
    row |= summary(seconds, measured, output)
    row["same_as_alone"] = sum(
        _digest(one.text) == want for one, want in zip(measured, expected[str(tokens)], strict=True)
    )
    row["correct"] = row["failed"] == 0 and (row["same_as_alone"] == count or not server.startswith("tqai"))
    return row


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per server and load, the median of each figure over the rounds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["prompt_tokens"], row["server"]), []).append(row)
    found = []
    for (tokens, server), group in sorted(groups.items()):
        one = {"server": server, "prompt_tokens": tokens, "output_tokens": group[0]["output_tokens"]}
        one |= {"requests": group[0]["requests"], "rounds": len(group)}
        one |= {"same_as_alone": min(row["same_as_alone"] for row in group)}
        for name in ("seconds", "requests_per_second", "output_tokens_per_second", "largest_gap_ms"):
            one[name] = statistics.median(row[name] for row in group)
        for name in ("first_token_ms", "per_token_ms"):
            one[name] = {at: statistics.median(row[name][at] for row in group) for at in ("p50", "p99")}
        found.append(one)
    return found


class Unavailable(Exception):
    """A server that cannot be measured here, and why."""


@contextmanager
def started(server: str, options: Any, port: int) -> Iterator[Callable[[], str]]:
    """A server that starts; what is yielded waits for it and returns its URL."""
    url = f"http://127.0.0.1:{port}"
    if server.startswith("tqai"):
        kind = server.removeprefix("tqai ")
        command = [sys.executable, "-m", "tqai", "serve", "-m", options.model]
        command += ["--served-model-name", SERVED_NAME, "--no-prefix-caching"]
        command += ["--no-tqai"] if kind == "uncompressed" else ["--config", kind]
        command += ["--max-kv-memory", options.pool, "--max-running", str(options.max_running)]
        command += ["--dtype", "float32", "--port", str(port)]
    else:
        tool = Path(sys.executable).with_name("transformers")
        command = [str(tool), "serve", options.model, "--port", str(port), "--host", "127.0.0.1"]
        command += ["--dtype", "float32"]
        if "continuous" in server:
            command.append("--continuous-batching")
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(command, stdout=log, stderr=log)

    def await_start() -> str:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                said = log.read().strip().splitlines()
                raise Unavailable(f"{server}: {said[-1][:200] if said else 'did not start'}")
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    return url
            except httpx.TransportError:
                time.sleep(0.2)

    try:
        yield await_start
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


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


def pool_of(url: str) -> dict[str, int]:
    """Pages of the server's pool, and their size."""
    found = httpx.get(f"{url}/status.json", timeout=30).json()
    return {"pages": found["pages"], "page_bytes": found["page_bytes"]}


if __name__ == "__main__":
    sys.exit(main())
