"""Held-out loss and exact retrieval, for the trainer's model or a transformers one.

While training, retrieval is scored in one forward pass: the answer's tokens are
appended to the prompt and each must be the arg-max of the logits before it.  From
the command line it is scored as a user would see it, by greedy ``generate``::

    python training/evaluate.py --model src/tqai/demo/model --data .train \\
        --device cpu --dtype float32 --prompts 100 --out .train/cpu.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
import torch
from torch import Tensor

from tqai.demo.retrieval import CODE_DIGITS, SLACK, is_correct, make_prompt

Logits = Callable[[Tensor], Tensor]  # ids [1, tokens] -> logits [1, tokens, vocab]


@torch.no_grad()
def heldout(
    logits: Logits, path: Path, n_bytes: int, tokens: int, device: torch.device, max_rows: int = 10**9
) -> dict[str, float]:
    """Mean loss in nats per token over the held-out ids, in rows of ``tokens``."""
    ids = torch.from_numpy(np.fromfile(path, dtype="<u2").astype(np.int64))
    total, count = 0.0, 0
    for i in range(min(max_rows, (len(ids) - 1) // tokens)):
        row = ids[i * tokens : (i + 1) * tokens + 1].to(device)
        out = logits(row[None, :-1])[0].float()
        total += torch.nn.functional.cross_entropy(out, row[1:], reduction="sum").item()
        count += tokens
    loss = total / count
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "tokens": count,
        "row_tokens": tokens,
        "bits_per_byte": loss / math.log(2) * len(ids) / n_bytes,
    }


@torch.no_grad()
def retrieval(
    logits: Logits,
    tok: Any,
    n_tokens: int,
    prompts: int,
    device: torch.device,
    first_seed: int = 0,
    depth: float | None = None,
) -> dict[str, Any]:
    """Exact answers out of ``prompts`` at one length, in all and by quarter of depth."""
    hits, digits, by_depth = 0, 0, [[0, 0] for _ in range(4)]
    for seed in range(first_seed, first_seed + prompts):
        p = make_prompt(tok, n_tokens, seed, depth=depth)
        prompt = tok.encode(p.prompt(), add_special_tokens=False)
        assert n_tokens - SLACK <= len(prompt) <= n_tokens
        answer = tok.encode(" " + p.answers[0], add_special_tokens=False)
        assert len(answer) == CODE_DIGITS + 1
        ids = torch.tensor([prompt + answer], device=device)
        guess = logits(ids)[0, len(prompt) - 1 : -1].argmax(-1)
        right = guess.eq(ids[0, len(prompt) :])
        digits += int(right[1:].sum())
        ok = bool(right.all())
        hits += ok
        quarter = by_depth[min(int(p.depths[0] * 4), 3)]
        quarter[0] += ok
        quarter[1] += 1
    return {
        "tokens": n_tokens,
        "correct": hits,
        "prompts": prompts,
        "digit_accuracy": digits / (CODE_DIGITS * prompts),
        "by_depth_quarter": [f"{a}/{b}" for a, b in by_depth],
    }


@torch.no_grad()
def generated(model: Any, tok: Any, n_tokens: int, prompts: int, first_seed: int) -> dict[str, Any]:
    """Exact answers by greedy generation, in all and by quarter of depth."""
    hits, by_depth, wrong = 0, [[0, 0] for _ in range(4)], []
    for seed in range(first_seed, first_seed + prompts):
        p = make_prompt(tok, n_tokens, seed)
        ids = tok(p.prompt(), return_tensors="pt").to(model.device)
        out = model.generate(**ids, max_new_tokens=CODE_DIGITS + 2, do_sample=False)
        text = tok.decode(out[0, ids["input_ids"].shape[1] :])
        ok = is_correct(text, p.answers[0])
        if not ok:
            wrong.append({"seed": seed, "answer": p.answers[0], "generated": text})
        hits += ok
        quarter = by_depth[min(int(p.depths[0] * 4), 3)]
        quarter[0] += ok
        quarter[1] += 1
    return {
        "tokens": n_tokens,
        "correct": hits,
        "prompts": prompts,
        "first_seed": first_seed,
        "by_depth_quarter": [f"{a}/{b}" for a, b in by_depth],
        "wrong": wrong,
    }


def main() -> None:
    """Command line: see the module's docstring."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ap = argparse.ArgumentParser()
    ap.add_argument("--model", type=Path, required=True)
    ap.add_argument("--data", type=Path, default=Path(".train"))
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--dtype", default="float32")
    ap.add_argument("--prompts", type=int, default=100)
    ap.add_argument("--first-seed", type=int, default=0)
    ap.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 8192])
    ap.add_argument("--rows", type=int, nargs="*", default=[4096, 9216], help="for held-out loss")
    ap.add_argument("--out", type=Path)
    args = ap.parse_args()
    device = torch.device(args.device)
    tok = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model = model.to(device).eval()
    sizes = json.loads((args.data / "sizes.json").read_text())
    report: dict[str, Any] = {"device": args.device, "dtype": args.dtype, "torch": torch.__version__}
    if device.type == "cuda":
        report["device"] = torch.cuda.get_device_name()
    report["heldout"] = [
        heldout(
            lambda ids: model(ids, use_cache=False).logits,
            args.data / "heldout.bin",
            sizes["heldout_bytes"],
            n,
            device,
        )
        for n in args.rows
    ]
    report["retrieval"] = []
    for n in args.lengths:
        start = time.time()
        report["retrieval"].append(generated(model, tok, n, args.prompts, args.first_seed))
        print(report["retrieval"][-1], f"{time.time() - start:.0f} s", flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["heldout"]))


if __name__ == "__main__":
    main()
