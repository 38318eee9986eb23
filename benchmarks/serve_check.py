"""Before anything is timed on a GPU: concurrent requests get what each gets alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from serve_steps import make_engine, request

from tqai import demo
from tqai.server.engine import prefill_flash
from tqai.server.engine.decode_step import DecodeRow, DecodeStep
from tqai.server.engine.page_table import HeldPages
from tqai.server.engine.prefill_step import PrefillStep
from tqai.server.engine.sequence import Delta, Finished

__all__ = ["check"]

LENGTHS = (1, 5, 63, 64, 65, 100, 128, 129, 200, 255, 256, 257, 300, 1030, 400, 513)
TOKENS = 24
NEAR = 0.5
"""In bfloat16 two tokens whose log-probabilities are so close may change places with the batch: the logits
of the embedded model are 8 to 32, where bfloat16 steps by 1/16 to 1/8, and a layer rounds several times."""
STEP_TOLERANCE = 2e-2


def check(dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> dict[str, Any]:
    """Raises SystemExit where a gate does not hold."""
    found: dict[str, Any] = {}
    for dtype in dtypes:
        kinds = ("K4/V2",) if dtype == torch.float32 else ("K4/V2", "uncompressed", "balanced")
        model, tokenizer = demo.load(dtype, "cuda")
        ids = tokenizer.encode(demo.retrieval.document(), verbose=False)
        prompts = [ids[37 * n : 37 * n + LENGTHS[n % 16]] for n in range(32)]
        for kind in kinds:
            name = f"{kind} {str(dtype).removeprefix('torch.')}"
            found[name] = _concurrent(model, tokenizer, kind, prompts)
            found[name] |= _replayed(model, tokenizer, kind, prompts[13])
            found[name] |= _prefilled(model, tokenizer, kind, ids[:1500])
            row = found[name]
            print(name, row, flush=True)
            if dtype == torch.float32 and row["same"] != 32:
                raise SystemExit(f"{name}: {row['same']} of 32 requests got what they get alone")
            if row["largest_gap_of_a_different_token"] > NEAR:
                raise SystemExit(f"{name}: other tokens than alone, which are not near: {row}")
            if (row["replayed_against_launched"] or 0.0) > STEP_TOLERANCE:
                raise SystemExit(f"{name}: replayed and launched steps differ: {row}")
            if row["chunk_by_parts_against_masks"] > STEP_TOLERANCE:
                raise SystemExit(f"{name}: the two ways to attend in a chunk differ: {row}")
    return found


def _run(engine: Any, prompts: list[list[int]], **params: Any) -> list[list[Any]]:
    outcomes: list[list[Any]] = [[] for _ in prompts]
    for prompt, events in zip(prompts, outcomes, strict=True):
        engine.submit(request(prompt, TOKENS, **params), events.append)
    assert engine.wait_idle(300)
    assert all(isinstance(events[-1], Finished) for events in outcomes), [events[-1] for events in outcomes]
    return [[c for event in events if isinstance(event, Delta) for c in event.chosen] for events in outcomes]


def _concurrent(model: Any, tokenizer: Any, kind: str, prompts: list[list[int]]) -> dict[str, Any]:
    engine = make_engine(model, tokenizer, kind, max_running=32, max_kv_bytes=1 << 30, prefix_caching=False)
    engine.start()
    together = _run(engine, prompts)
    alone = [_run(engine, [prompt], logprobs=20)[0] for prompt in prompts]
    gaps, same = [0.0], 0
    for row, expected in zip(together, alone, strict=True):
        differs = next((n for n in range(TOKENS) if row[n].token != expected[n].token), None)
        same += differs is None
        if differs is not None:
            near = dict(expected[differs].top)
            gap = expected[differs].logprob - near.get(row[differs].token, -1e9)
            gaps.append(gap)
    graphs = engine.scheduler.runner.graphs
    engine.stop()
    return {
        "requests": len(prompts),
        "same": same,
        "largest_gap_of_a_different_token": max(gaps),
        "graphs": None if graphs is None else graphs.captured,
        "row_multiple": engine.scheduler.runner.row_multiple,
        "backend": engine.store.codes[0].name,
    }


def _replayed(model: Any, tokenizer: Any, kind: str, prompt: list[int]) -> dict[str, Any]:
    """Logits of one step, replayed and launched, of eight requests of different lengths."""
    engine = make_engine(model, tokenizer, kind, max_running=8, max_kv_bytes=1 << 30, prefix_caching=False)
    runner, scheduler = engine.scheduler.runner, engine.scheduler
    if runner.graphs is None:
        return {"replayed_against_launched": None}
    for n in range(8):
        engine.submit(request(prompt[: 1 + n * 146], 64), lambda event: None)
    while engine._incoming:
        scheduler.add(engine._incoming.popleft())
    while len(scheduler.running) < 8:
        scheduler.step()
    rows = [DecodeRow(s.computed, s.held, None) for s in scheduler.running]
    tokens = [s.tokens[s.computed] for s in scheduler.running]
    positions = [row.position for row in rows]
    replayed = runner.decode(DecodeStep(engine.store, rows), tokens, positions).double().clone()
    runner.graphs = None
    launched = runner.decode(DecodeStep(engine.store, rows), tokens, positions).double()
    return {"replayed_against_launched": ((replayed - launched).norm() / launched.norm()).item()}


@torch.inference_mode()
def _prefilled(model: Any, tokenizer: Any, kind: str, prompt: list[int]) -> dict[str, Any]:
    """Logits after the tokens of a prompt, by flash attention in parts and by masks."""
    engine = make_engine(model, tokenizer, kind, max_running=1, max_kv_bytes=1 << 28)
    runner, store = engine.scheduler.runner, engine.store
    pages = store.pool.take(store.pages_after(len(prompt)))
    logits, serves = [], prefill_flash.serves
    for found in (serves, lambda *given: False):
        prefill_flash.serves = found
        rows = []
        cuts = [*([0] if store.lead else []), *range(store.lead, len(prompt), 640), len(prompt)]
        for start, stop in pairwise(cuts):
            part = prompt[start:stop]
            step = PrefillStep(store, start, len(part), [HeldPages(pages)])
            rows.append(runner.prefill(step, part, True).double())
        logits.append(torch.cat(rows))
    prefill_flash.serves = serves
    error = (logits[0] - logits[1]).norm(dim=-1) / logits[1].norm(dim=-1)
    return {"chunk_by_parts_against_masks": error.mean().item(), "worst_token": error.max().item()}
