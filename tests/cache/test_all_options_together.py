"""Options of a layer drawn at random, operations drawn at random: it holds, and attends to, the right tokens.

The oracle is the tokens themselves: with 8 bits a code is off by little, and what is out of place by much.
"""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch

from tqai.cache.layer import CompressedLayer
from tqai.config import CacheConfig
from tqai.errors import InputError

DIM, HEADS, GROUPS = 32, 2, 2
RUNS = 100


def layer_of(draw: random.Random) -> CompressedLayer:
    config = CacheConfig(
        bits_k=8,
        bits_v=8,
        sink_tokens=draw.choice([0, 0, 4, 70]),
        residual_window=draw.choice([0, 1, 63, 64, 100]),
        cache_strategy=draw.choice(["auto", "incremental", "incremental", "full"]),
        offsets=draw.choice(["off", "on", "auto"]),
        balance=draw.choice(["off", "auto"]),
        scale_format=draw.choice(["bfloat16", "log8"]),
        backend=draw.choice(["torch", None]),
    )
    layer = CompressedLayer(config, 0, draw.choice([None, None, None, 1, 65, 100, 129, 200]))
    layer.record_past = draw.random() < 0.5
    layer.expects_queries = draw.random() < 0.5
    return layer


@pytest.mark.parametrize("seed", range(RUNS))
def test_tokens_in_sight_are_the_right_ones(seed):
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layer = layer_of(draw)
    window, shows_queries = layer.sliding_window, layer.expects_queries
    stretch, mean = torch.ones(DIM), draw.choice([0.0, 5.0]) * torch.randn(HEADS, 1, DIM, generator=generator)
    stretch[4::8] = draw.choice([1.0, 6.0])
    truth = torch.empty(2, 2, HEADS, 0, DIM)  # keys and values, sequences, heads, tokens
    for operation in draw.choices(["append", "crop", "select", "copy"], [9, 2, 1, 1], k=draw.randint(4, 20)):
        if operation == "append":
            # to where a page begins for the next query, or any number
            ahead = 64 - (truth.shape[3] - (window or 1) + 1) % 64
            count = draw.choice([ahead, ahead, ahead, 1, 1, 1, 2, 5, 63, 65, 130, 300])
            new = torch.randn(2, truth.shape[1], HEADS, count, DIM, generator=generator) + mean
            new[0] *= stretch
            before, truth = truth.shape[3], torch.cat([truth, new], 3)
            first = 0 if window is None else max(before - window + 1, 0)
            step = layer.append(*new.clone())
            held = torch.stack(layer.materialize(step))
            assert held.shape == truth[:, :, :, first:].shape
            error = (held - truth[:, :, :, first:]).norm(dim=-1) / truth[:, :, :, first:].norm(dim=-1)
            assert error.max() < 0.25
            query = (
                torch.randn(truth.shape[1], HEADS * GROUPS, new.shape[3], DIM, generator=generator) / stretch
            )
            if layer.wants_query and shows_queries:
                layer.see_query(query)
            back = torch.arange(before, truth.shape[3])[:, None] - torch.arange(first, truth.shape[3])
            seen = (back >= 0) & (back < (window or truth.shape[3]))
            found = layer.attend(step, query, seen[None, None], DIM**-0.5).out.double()
            keys, values = truth[:, :, :, first:].double().repeat_interleave(GROUPS, 2)
            logits = (query.double() @ keys.transpose(-1, -2) * DIM**-0.5).masked_fill(~seen, -torch.inf)
            wanted = torch.softmax(logits, -1) @ values
            assert (found - wanted).norm() < 0.06 * wanted.norm()
        elif operation == "crop":
            count = min(draw.choice([0, 1, 3, 40, 64, 100, 200]), truth.shape[3])
            try:
                layer.crop(count)
            except InputError:
                assert window is not None, "only a sliding layer may have dropped what would be needed"
                continue
            truth = truth[:, :, :, : truth.shape[3] - count]
        elif operation == "select":
            rows = torch.tensor(draw.choice([[0], [1, 0], [0, 0, 1], [1, 1]])) % truth.shape[1]
            layer.select(rows)
            # a layer that has seen no token knows of no sequences
            truth = truth if layer.window is None else truth[:, rows]
        else:
            layer = draw.choice([copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))])(layer)
