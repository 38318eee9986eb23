"""`held_bytes` finds every storage once, whole, and nothing that a cache merely points at."""

from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig

from tqai.errors import InputError, UnsupportedError
from tqai.evaluation import bits_per_value, cache_maker, held_bytes, values_per_token


def fill(cache, tokens, layers=2, heads=2, head_dim=64, batch=1, dtype=torch.float32):
    for index in range(layers):
        new = [torch.full((batch, heads, tokens, head_dim), float("nan"), dtype=dtype) for _ in range(2)]
        cache.update(*new, index)
    return cache


@pytest.mark.parametrize("tokens", [1, 63, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dynamic_cache_is_counted_exactly(tokens, dtype):
    cache = fill(DynamicCache(), tokens, batch=3, dtype=dtype)
    assert held_bytes(cache) == 2 * 2 * 3 * 2 * tokens * 64 * dtype.itemsize


def test_empty_cache_holds_nothing(model):
    assert held_bytes(DynamicCache(config=model.config)) == 0


def test_bits_of_an_uncompressed_cache_are_those_of_its_dtype(model):
    cache = fill(DynamicCache(), 65)
    assert values_per_token(model.config) == 2 * 2 * 2 * 64
    assert bits_per_value(cache, model.config, 65) == 32.0
    assert bits_per_value(fill(DynamicCache(), 65, batch=3), model.config, 65, batch=3) == 32.0


def test_quanto_is_opened_down_to_codes_scales_and_shifts(model, quanto):
    cache = fill(cache_maker("quanto-4", model)(), 64)
    values = 2 * 2 * 2 * 64 * 64
    assert held_bytes(cache) == values // 2 + values // 64 * (4 + 4)
    assert bits_per_value(cache, model.config, 64) == 5.0
    fill(cache, 10)
    residual = 2 * 2 * 2 * 10 * 64 * 4
    assert held_bytes(cache) == values // 2 + values // 64 * (4 + 4) + residual
    assert bits_per_value(fill(cache_maker("quanto-2", model)(), 64), model.config, 64) == 3.0


def test_views_share_one_storage_and_count_it_whole():
    buffer = torch.empty(1000)
    assert held_bytes([buffer[:10], buffer[5:7], buffer.view(10, 100)]) == 4000
    assert held_bytes([buffer[:10]]) == 4000


def test_equal_contents_in_two_storages_count_twice():
    assert held_bytes([torch.zeros(10), torch.zeros(10)]) == 80


class Slotted:
    __slots__ = ("__weakref__", "codes", "unset")

    def __init__(self):
        self.codes = torch.zeros(3, dtype=torch.uint8)


class Owner:
    def __init__(self):
        self.codes = torch.zeros(3, dtype=torch.uint8)

    def method(self):
        return self.codes


def closure():
    codes = torch.zeros(3, dtype=torch.uint8)
    return lambda: codes


@pytest.mark.parametrize(
    "item",
    [
        {"a": [(torch.zeros(3, dtype=torch.uint8),)]},
        {torch.zeros(3, dtype=torch.uint8)},
        deque([torch.zeros(3, dtype=torch.uint8)]),
        Slotted(),
        Owner(),
        Owner().method,
        closure(),
        partial(print, torch.zeros(3, dtype=torch.uint8)),
        partial(print, x=torch.zeros(3, dtype=torch.uint8)),
        np.zeros(3, dtype=np.uint8),
        np.zeros(3, dtype=np.uint8)[1:2],
        bytearray(3),
        torch.zeros(3, dtype=torch.uint8).untyped_storage(),
        torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False),
    ],
    ids=lambda item: type(item).__name__,
)
def test_every_hiding_place_is_found(item):
    assert held_bytes(item) == 3


def test_memory_shared_by_torch_and_numpy_counts_once():
    array = np.zeros(100, dtype=np.float32)
    assert held_bytes([array, torch.from_numpy(array)]) == 400
    tensor = torch.zeros(100)
    assert held_bytes([tensor.numpy(), tensor]) == 400
    assert held_bytes([tensor.numpy()[3:5]]) == 400


def test_cycles_end():
    ring = [torch.zeros(2)]
    ring.append(ring)
    assert held_bytes(ring) == 8


def test_the_model_a_cache_points_at_is_not_the_caches(model):
    cache = fill(DynamicCache(), 5)
    cache.model, cache.config, cache.kind = model, model.config, DynamicCache
    assert held_bytes(cache) == 2 * 2 * 2 * 5 * 64 * 4


def test_layers_that_do_not_keep_every_token_are_refused():
    with pytest.raises(UnsupportedError, match="full attention only"):
        values_per_token(MistralConfig(sliding_window=8))
    mixed = LlamaConfig(num_hidden_layers=2)
    mixed.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedError, match="linear_attention"):
        values_per_token(mixed)


def test_no_tokens_have_no_bits(model):
    with pytest.raises(InputError, match="tokens=0"):
        bits_per_value(DynamicCache(), model.config, 0)
