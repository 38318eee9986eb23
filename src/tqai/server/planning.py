"""What a model's cache takes in a given memory, and which other engine could hold it across machines.

Read off the model's config alone; weights are counted on torch's meta device, which allocates nothing.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from typing import Any

from tqai.cache.layer import page_format_for
from tqai.config import NAMED_PRESETS, PRESETS, CacheConfig
from tqai.core.page import PAGE_TOKENS
from tqai.errors import ConfigError, UnsupportedError
from tqai.server.engine.settings import refuses

__all__ = ["CACHES", "CacheLayers", "Held", "cache_layers", "cache_named", "commands", "held", "weight_bytes"]

BFLOAT16_BYTES = 2
FULL, SLIDING = "full_attention", "sliding_attention"
UNCOMPRESSED = "bfloat16"
CACHES = (UNCOMPRESSED, *PRESETS, *NAMED_PRESETS)
OFFSET_BYTES = 3 * 4
"""Per element of a head: offsets of keys and of values, and factors of keys, in float32."""


def cache_named(name: str) -> tuple[str, CacheConfig | None]:
    """One of `CACHES` as it is spelt there, and its configuration (None: uncompressed).

    Raises:
        ConfigError: there is no such cache.
    """
    if name.lower() in (UNCOMPRESSED, "bf16"):
        return UNCOMPRESSED, None
    try:
        asked = CacheConfig.preset(name)
    except ConfigError:
        asked = None
    for known in CACHES[1:]:
        if CacheConfig.preset(known) == asked:
            return known, asked
    raise ConfigError(f"config={name!r}: allowed are {', '.join(CACHES)}")


@dataclass(frozen=True)
class CacheLayers:
    """Alike layers of a model.

    Attributes:
        kind: "full_attention", "sliding_attention", or a kind whose state does not grow with the tokens.
        count: how many.
        kv_heads, head_dim: of their keys and values; 0 where they have none.
        sliding_window: tokens held at most, or None.
        holds_last: the model's last layer of keys and values, which presets may give more bits, is one.
    """

    kind: str
    count: int
    kv_heads: int
    head_dim: int
    sliding_window: int | None
    holds_last: bool = False

    @property
    def grows(self) -> bool:
        """Whether the layers hold keys and values of tokens."""
        return self.kind in (FULL, SLIDING)

    def bytes_per_token(self, cache: CacheConfig | None) -> float:
        """Bytes of one token in all of these layers; None is bfloat16."""
        if not self.grows:
            return 0.0
        if cache is None:
            return float(self.count * self.kv_heads * 2 * self.head_dim * BFLOAT16_BYTES)
        layers = cache.by_layer(self.count, self.count - 1) if self.holds_last else cache
        found = 0
        for index in range(self.count):
            one = replace(layers.for_layer(index), last_layer_bits=None)
            found += page_format_for(one, self.head_dim, self.head_dim).page_bytes
        return self.kv_heads * found / PAGE_TOKENS

    def bytes_at(self, tokens: int, cache: CacheConfig | None) -> int:
        """Bytes of one sequence of `tokens` tokens, in whole pages and with its exact tokens (sinks, window,
        and 64 for those that become the next page) and offsets where it is compressed."""
        if not self.grows:
            return 0
        held = tokens if self.sliding_window is None else min(tokens, self.sliding_window)
        if cache is None:
            return round(held * self.bytes_per_token(None))
        always = cache.sink_tokens + cache.window_tokens
        pages = -(-max(held - always, 0) // PAGE_TOKENS)
        exact = (always + PAGE_TOKENS) * self.bytes_per_token(None)
        has_offsets = cache.offsets != "off" or cache.balance != "off"
        offsets = OFFSET_BYTES * self.count * self.kv_heads * self.head_dim if has_offsets else 0
        return round(pages * PAGE_TOKENS * self.bytes_per_token(cache) + exact + offsets)


@dataclass(frozen=True)
class Held:
    """What fits, at one preset (None: bfloat16).

    Attributes:
        label: name of the cache, one of `CACHES`.
        bytes_per_token: in all layers that see everything, plus sliding ones while they fill.
        context_bytes: of one sequence of the length asked for.
        contexts: how many such sequences fit.
        longest_tokens: longest single sequence that fits.
    """

    label: str
    bytes_per_token: float
    context_bytes: int
    contexts: int
    longest_tokens: int


def cache_layers(config: Any) -> list[CacheLayers]:
    """The layers of a model by kind.

    Raises:
        UnsupportedError: a cache that is not keys and values per head (latent attention), or no decoder.
    """
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or not getattr(text, "num_hidden_layers", None):
        raise UnsupportedError(f"{config.model_type} is no decoder-only language model")
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedError(f"{config.model_type} caches latent vectors, not keys and values per head")
    count = int(text.num_hidden_layers)
    kinds = list(getattr(text, "layer_types", None) or [FULL] * count)
    heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    found, last = [], next((kind for kind in reversed(kinds) if kind in (FULL, SLIDING)), None)
    for kind in dict.fromkeys(kinds):
        if kind in (FULL, SLIDING):
            window = int(text.sliding_window) if kind == SLIDING else None
            found.append(CacheLayers(kind, kinds.count(kind), heads, dim, window, kind == last))
        else:
            found.append(CacheLayers(kind, kinds.count(kind), 0, 0, None))
    return found


def weight_bytes(config: Any) -> int:
    """Bytes of the weights in the dtype that the config names (bfloat16 where it names none)."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(config, "dtype", None) or torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def held(layers: list[CacheLayers], room_bytes: int, tokens: int) -> list[Held]:
    """What fits into `room_bytes` uncompressed and at each preset, for sequences of `tokens` tokens."""
    found = []
    for label, cache in map(cache_named, CACHES):

        def size(length: int, cache: CacheConfig | None = cache) -> int:
            return sum(layer.bytes_at(length, cache) for layer in layers)

        one = size(tokens)
        found.append(
            Held(
                label,
                sum(layer.bytes_per_token(cache) for layer in layers),
                one,
                max(room_bytes, 0) // one if one else 0,
                _longest(size, room_bytes),
            )
        )
    return found


def _longest(size: Any, room_bytes: int) -> int:
    low, high = 0, 1 << 34
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= room_bytes else (low, middle - 1)
    return low


VLLM = {"K4/V4": "turboquant_4bit_nc", "K3/V3": "turboquant_3bit_nc"}
"""Presets with a cache of the same bits in vLLM. It leaves the first and last two layers uncompressed."""
LLAMA_CPP = {"K4/V4": ("q4_0", "q4_0")}
SGLANG = {"K4/V4": "fp4_e2m1"}
NO_EQUIVALENT = "no equivalent"


def commands(model: str, preset: str, tokens: int, gpus: int, nodes: int) -> dict[str, str]:
    """Per engine, the command that serves `model` with a cache like `preset`, one of `CACHES`, on `nodes`
    machines of `gpus` GPUs each (0: CPUs), or why there is none. Compressed caches of vLLM and SGLang need
    GPUs: vLLM's CPU build accepts its turboquant cache types without computing with them."""
    name = shlex.quote(model)
    own = {UNCOMPRESSED: " --no-tqai"}.get(preset, f" --config {preset}")
    bits = "" if preset == UNCOMPRESSED else f" with {preset}"
    found = {"tqai": f"tqai serve -m {name}{own} --max-model-len {tokens}"}
    cache = cache_named(preset)[1]
    if cache is not None and (reason := refuses(cache)) is not None:
        found["tqai"] = f"tqai run -m {name} --config {preset} (tqai serve: {reason})"
    if max(gpus, 1) * nodes > 1:
        found["tqai"] = f"{NO_EQUIVALENT}: tqai serves from one device"
    if gpus == 0 and preset != UNCOMPRESSED:
        found["vLLM"] = f"{NO_EQUIVALENT}: its CPU build accepts turboquant cache types but does not do them"
        found["SGLang"] = f"{NO_EQUIVALENT}: low-bit caches need a GPU there"
    else:
        vllm = f"vllm serve {name} --max-model-len {tokens}"
        if gpus > 1:
            vllm += f" --tensor-parallel-size {gpus}"
        if nodes > 1:
            vllm += f" --pipeline-parallel-size {nodes} --distributed-executor-backend ray"
        sglang = f"python -m sglang.launch_server --model-path {name} --context-length {tokens}"
        if gpus == 0:
            sglang += " --device cpu"
        if gpus * nodes > 1:
            sglang += f" --tp {gpus * nodes}"
        if nodes > 1:
            sglang += f" --nnodes {nodes} --node-rank RANK --dist-init-addr HOST:PORT"
        found["vLLM"] = _mapped(vllm, "--kv-cache-dtype", VLLM.get(preset), preset, bits)
        found["SGLang"] = _mapped(sglang, "--kv-cache-dtype", SGLANG.get(preset), preset, bits)
    llama = f"llama-server -m MODEL.gguf -c {tokens} -fa on" + (" -ngl 999" if gpus else "")
    if nodes > 1:
        found["llama.cpp"] = f"{NO_EQUIVALENT}: several machines only over its experimental, open RPC"
    elif preset == UNCOMPRESSED:
        found["llama.cpp"] = f"{llama} --cache-type-k bf16 --cache-type-v bf16"
    elif preset in LLAMA_CPP:
        key, value = LLAMA_CPP[preset]
        found["llama.cpp"] = f"{llama} --cache-type-k {key} --cache-type-v {value}"
    else:
        found["llama.cpp"] = f"{NO_EQUIVALENT}{bits}"
    return found


def _mapped(command: str, flag: str, kind: str | None, preset: str, bits: str) -> str:
    if preset == UNCOMPRESSED:
        return command
    return f"{NO_EQUIVALENT}{bits}" if kind is None else f"{command} {flag} {kind}"
