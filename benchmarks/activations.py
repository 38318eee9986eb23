"""What does `tqai.compress_activations` save in fine-tuning, what does it cost, does it still learn?

    python benchmarks/activations.py            a few minutes; writes the result
    python benchmarks/activations.py --quick    two steps of each variant, writes nothing

The embedded model is trained on for a few steps, plainly and with the tensors saved for backward packed to
8 and to 4 bits: each variant in a process of its own, from the same weights on the same batches. Recorded
are the bytes that autograd holds between forward and backward, the process's peak above what it held
before the measured steps, the time of a step and the loss of every step.

Gate: with 8 bits the last losses are those of plain training within LOSS_LIMIT, and fewer bytes are held.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from provenance import ROOT, provenance

import tqai
from tqai.demo import load
from tqai.demo.retrieval import document
from tqai.evaluation.peak_memory import PeakMemory

RESULT = ROOT / "benchmarks" / "results" / "activations.json"
VARIANTS = ("plain", "8", "4")
BATCH, TOKENS, STEPS, LEARNING_RATE = 4, 512, 12, 3e-4
LAST = 5
LOSS_LIMIT = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps, nothing written")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps = 2 if arguments.quick else STEPS
    if arguments.one is not None:
        print(json.dumps(train(arguments.one, steps)))
        return 0
    variants = {}
    for name in VARIANTS:
        command = [sys.executable, __file__, "--one", name, *(["--quick"] if arguments.quick else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        variants[name] = json.loads(done.stdout)
        print(name, {key: value for key, value in variants[name].items() if key != "losses"}, flush=True)
    plain, packed = variants["plain"], variants["8"]
    apart = abs(mean_of_last(packed) / mean_of_last(plain) - 1)
    passed = apart < LOSS_LIMIT and packed["saved_for_backward_bytes"] < plain["saved_for_backward_bytes"]
    print(f"loss of the last {LAST} steps apart by {apart:.2%}: {'passed' if passed else 'FAILED'}")
    if not arguments.quick:
        settings = {"batch": BATCH, "tokens": TOKENS, "steps": STEPS, "learning_rate": LEARNING_RATE}
        result = {**provenance(), "settings": settings, "loss_apart": apart, "variants": variants}
        RESULT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0 if passed else 1


def mean_of_last(variant: dict[str, Any]) -> float:
    return statistics.fmean(variant["losses"][-LAST:])


def train(name: str, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, tokenizer = load(torch.float32, torch.device("cpu"))
    model.train()
    ids = torch.tensor(tokenizer.encode(document())[: BATCH * TOKENS * steps])
    batches = ids[: len(ids) // TOKENS * TOKENS].reshape(-1, BATCH, TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    packing = None if name == "plain" else tqai.compress_activations(model, bits=int(name))
    losses, seconds, cpu_seconds = [], [], []
    saved_bytes = held_between(model, batches[0])
    # The first step makes the optimizer's state, which all variants hold alike.
    losses.append(step(model, optimizer, batches[0]))
    with PeakMemory(torch.device("cpu")) as memory:
        for number in range(1, steps):
            start, cpu_start = time.perf_counter(), time.process_time()
            losses.append(step(model, optimizer, batches[number % len(batches)]))
            seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu_start)
    if packing is not None:
        packing.detach()
    return {
        "saved_for_backward_bytes": saved_bytes,
        "peak_bytes": memory.peak_bytes,
        "step_seconds": statistics.median(seconds),
        "step_cpu_seconds": statistics.median(cpu_seconds),
        "losses": losses,
    }


def step(model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    loss = model(batch, labels=batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def held_between(model: Any, batch: torch.Tensor) -> int:
    """Bytes of this process that a forward pass leaves for the backward pass: resident memory's growth."""
    from tqai.evaluation.peak_memory import _resident_bytes, give_back

    loss = model(batch, labels=batch, use_cache=False).loss
    loss.backward()
    model.zero_grad()
    del loss
    give_back(model.device)
    before = _resident_bytes("VmRSS")
    loss = model(batch, labels=batch, use_cache=False).loss
    give_back(model.device)
    after = _resident_bytes("VmRSS")
    loss.backward()
    model.zero_grad()
    assert before is not None and after is not None
    return after - before


if __name__ == "__main__":
    sys.exit(main())
