"""Train a small Llama or Qwen2 model for a given number of seconds.

The learning rate and the curriculum follow the wall clock, so that a run of any
``--seconds`` anneals to its end: warm-up, then a cosine to 2%.  Until
``--switch`` of the time rows have ``--short`` tokens, after it ``--long``.

Usage (see README.md for the run that made the demo model)::

    python training/train.py --data .train --out .train/run --seconds 480
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import torch
from batches import RetrievalRows, TextRows
from evaluate import heldout, retrieval
from export import export, reload
from model import LM, Shape
from muon import Muon
from torch import Tensor
from transformers import PreTrainedTokenizerFast

PRESETS = {
    "llama-10m": Shape(),
    "qwen2-10m": Shape(arch="qwen2", heads=6, head_dim=64, mlp=1024),
    "llama-7m": Shape(hidden=256, layers=8, kv_heads=1, mlp=512),
    "qwen2-6m": Shape(arch="qwen2", hidden=256, head_dim=64, mlp=768),
    "tiny": Shape(hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp=128),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    ap = argparse.ArgumentParser()
    ap.add_argument("--preset", choices=PRESETS, default="llama-10m")
    ap.add_argument("--arch", choices=("llama", "qwen2"), help="overrides the preset's")
    ap.add_argument("--data", type=Path, default=Path(".train"))
    ap.add_argument("--out", type=Path, default=Path(".train/run"))
    ap.add_argument("--seconds", type=float, default=480, help="time to train, compiling not counted")
    ap.add_argument("--short", type=int, default=4096, help="tokens per row at first")
    ap.add_argument("--long", type=int, default=9216, help="tokens per row at the end")
    ap.add_argument("--switch", type=float, default=0.6, help="share of the time with short rows")
    ap.add_argument("--batch", type=int, default=131072, help="tokens per step")
    ap.add_argument("--lr", type=float, default=4e-3)
    ap.add_argument("--weight-decay", type=float, default=0.1)
    ap.add_argument("--retrieval", type=float, default=0.12, help="share of retrieval rows")
    ap.add_argument("--answer-weight", type=float, default=4.0)
    ap.add_argument("--workers", type=int, default=6, help="processes that build retrieval rows")
    ap.add_argument("--prompts", type=int, default=100, help="retrieval prompts per length at the end")
    ap.add_argument("--eval-lengths", type=int, nargs="*", default=[1024, 4096, 8192])
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--no-compile", action="store_true")
    ap.add_argument("--max-steps", type=int, default=10**9)
    return ap.parse_args()


class Feed:
    """Batches of one row length: (ids, targets, weights), each [rows, tokens]."""

    def __init__(self, args: argparse.Namespace, tokens: int, full: float, text: TextRows) -> None:
        self.rows = max(2, args.batch // tokens)
        self.special = max(1, round(self.rows * args.retrieval))
        self.text, self.tokens = text, tokens
        data = RetrievalRows(args.data, args.data / "tokenizer", tokens, full, args.answer_weight, args.seed)
        self.loader: Iterator[list[Tensor]] = iter(
            torch.utils.data.DataLoader(
                data,
                batch_size=self.special,
                num_workers=args.workers,
                pin_memory=text.ids.is_cuda,
                prefetch_factor=16 if args.workers else None,
            )
        )

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """The next batch, on the device."""
        device = self.text.ids.device
        ids, w = (x.to(device, non_blocking=True) for x in next(self.loader))
        plain = self.text.rows(self.rows - self.special, self.tokens)
        ids = torch.cat((plain, ids))
        w = torch.cat((torch.ones_like(plain, dtype=torch.float32), w))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), w[:, 1:].contiguous()


def optimizers(net: LM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms and biases."""
    matrices = [p for n, p in net.named_parameters() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in net.named_parameters() if p.dim() != 2 or "embed" in n]
    return [
        Muon(matrices, lr=args.lr, weight_decay=args.weight_decay),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=rest[0].is_cuda),
    ]


def scale(progress: float) -> float:
    """The learning rate at a share of the run, relative to its peak."""
    return min(1.0, progress / 0.02) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(net: LM, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train in place; returns the log."""
    text = TextRows(args.data / "train.bin", device)
    feeds = [Feed(args, args.short, 0.0, text), Feed(args, args.long, 0.5, text)]
    step_fn = net if args.no_compile else torch.compile(net, dynamic=False)
    opts = optimizers(net, args)
    start = time.time()
    for feed in feeds[::-1]:  # compile both shapes before the clock starts
        step_fn(*feed.next()).backward()
        net.zero_grad()
    print(f"compiled in {time.time() - start:.0f} s; {len(text) / 1e6:.1f}M corpus tokens", flush=True)
    log: list[dict[str, float]] = []
    recent: list[Tensor] = []
    step = tokens = 0
    start, shown = time.time(), 0.0
    while (progress := (time.time() - start) / args.seconds) < 1 and step < args.max_steps:
        feed = feeds[progress >= args.switch]
        loss = step_fn(*feed.next())
        loss.backward()
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.lr * scale(progress)
            opt.step()
        net.zero_grad()
        step += 1
        tokens += feed.rows * feed.tokens
        recent.append(loss.detach())
        if len(recent) == 8:
            recent[0].item()  # the clock must not run ahead of the device
        if time.time() - shown > 10:
            shown = time.time()
            point = {
                "step": step,
                "tokens": tokens,
                "seconds": round(shown - start, 1),
                "row_tokens": feed.tokens,
                "loss": torch.stack(recent).mean().item(),
            }
            recent = []
            log.append(point)
            print(json.dumps(point), flush=True)
            if len(log) % 5 == 0:
                print("  retrieval", quick(net, args, device), flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {
        "steps": step,
        "tokens": tokens,
        "seconds": round(time.time() - start, 1),
        "corpus_tokens": len(text),
        "curve": log,
    }


def quick(net: LM, args: argparse.Namespace, device: torch.device) -> list[str]:
    """A small retrieval check during training, on prompts not used at the end."""
    tok = PreTrainedTokenizerFast.from_pretrained(args.data / "tokenizer")
    out = []
    for n in args.eval_lengths:
        r = retrieval(net.logits, tok, n, 8, device, first_seed=10_000)
        out.append(f"{n}: {r['correct']}/8 ({r['digit_accuracy']:.2f})")
    return out


def main() -> None:
    """Train, export, evaluate the exported model, write the log."""
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    shape = PRESETS[args.preset]
    shape = Shape(**(shape.as_dict() | {"max_positions": args.long, "arch": args.arch or shape.arch}))
    net = LM(shape, dtype).to(device)
    n_params = sum(p.numel() for p in net.parameters())
    print(f"{n_params} parameters", shape, flush=True)
    log = train(net, args, device)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), args.out / "checkpoint.pt")
    tok = PreTrainedTokenizerFast.from_pretrained(args.data / "tokenizer")
    log |= {
        "preset": args.preset,
        "shape": shape.as_dict(),
        "parameters": n_params,
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "device": torch.cuda.get_device_name() if cuda else platform.processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    (args.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    log["export_check"] = export(net, args.out / "hf", args.data / "tokenizer")
    hf = reload(args.out / "hf", device, dtype)
    sizes = json.loads((args.data / "sizes.json").read_text())
    log["heldout"] = heldout(hf, args.data / "heldout.bin", sizes["heldout_bytes"], args.short, device)
    print(log["heldout"], log["export_check"], flush=True)
    log["retrieval"] = [retrieval(hf, tok, n, args.prompts, device) for n in args.eval_lengths]
    print(*log["retrieval"], sep="\n", flush=True)
    (args.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
