"""The MLX backend on random vectors: checked against core, then timed beside MLX's own attention.

The same figures as `kernel_speed` has of the torch backends, on MLX's default device.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from tqai.backends.base import ExactTokens
from tqai.backends.mlx.attention import attend
from tqai.backends.mlx.metal.launch import encode_pages, history_reader, serves
from tqai.backends.mlx.pages import decode_pages
from tqai.cache.page_format import page_format_for
from tqai.config import CacheConfig
from tqai.core.page import PAGE_TOKENS, pages_from_bytes
from tqai.errors import BackendError
from tqai.integrations.mlx_lm.settings import served

__all__ = ["MlxBench"]

Array = Any

KV_HEADS, QUERY_HEADS = 8, 32
CHECKED_PAGES = 4
MAX_DECODE_ERROR, MAX_ATTENTION_ERROR = 1e-5, 2e-3
MIN_SECONDS, MIN_REPEATS, MAX_REPEATS = 0.3, 5, 200


class MlxBench:
    """Gaussian keys and values of `pages` pages, encoded; the interface of `KernelBench`.

    Raises:
        ConfigError, UnsupportedError: the configuration is not served.
    """

    def __init__(self, config: CacheConfig, head_dim: int, pages: int) -> None:
        config = served(config)
        self.page_format = page_format_for(config, head_dim, head_dim)
        self.tokens = pages * PAGE_TOKENS
        self.scaling = 1 / math.sqrt(head_dim)
        self.backend = SimpleNamespace(name="mlx")
        device = str(mx.default_device())
        self.reason = f"asked for; {'Metal kernels' if serves() else 'MLX operations'} on {device}"
        self._keys = iter(mx.random.split(mx.random.key(config.seed), 64))
        shape = (1, KV_HEADS, pages, PAGE_TOKENS, head_dim)
        self.keys, self.values = self._drawn(*shape), self._drawn(*shape)
        self.query = self._drawn(1, QUERY_HEADS, 1, head_dim)
        one = (1, KV_HEADS, 1, head_dim)
        self.recent = ExactTokens(self._drawn(*one), self._drawn(*one))
        self.raw = encode_pages(self.keys, self.values, self.page_format)
        mx.eval(self.raw, self.keys, self.values, self.query, self.recent)

    @property
    def bits_per_value(self) -> float:
        """Bits of a whole page over the numbers it stands for."""
        return 8 * self.page_format.page_bytes / (2 * PAGE_TOKENS * self.keys.shape[-1])

    def check(self) -> dict[str, float]:
        """Relative errors of decoding (against core) and of attention (against MLX's own to the decoded
        vectors).

        Raises:
            BackendError: one of them is too large, so that a speed would mean nothing.
        """
        raw = self.raw[:, :, :CHECKED_PAGES]
        canonical = pages_from_bytes(np.array(raw), self.page_format)
        wanted = (self.page_format.key.decode(canonical.key), self.page_format.value.decode(canonical.value))
        found = (np.array(part) for part in decode_pages(raw, self.page_format, mx.float32))
        decode_error = max(_relative(a, b) for a, b in zip(found, wanted, strict=True))
        exact = self._whole(*decode_pages(self.raw, self.page_format, mx.float32))
        attention_error = _relative(np.array(self._attend()), np.array(self._plain(*exact)))
        if not decode_error <= MAX_DECODE_ERROR:
            raise BackendError(f"backend mlx decodes wrongly: error {decode_error:.1e}")
        if not attention_error <= MAX_ATTENTION_ERROR:
            raise BackendError(f"backend mlx attends wrongly: error {attention_error:.1e}")
        return {"decode_error": decode_error, "attention_error": attention_error}

    def distortion(self, part: str, n_vectors: int | None = None) -> dict[str, float]:
        """NMSE, SNR in dB and mean cosine of "keys" or "values", of `n_vectors` vectors (further ones are
        drawn where they do not suffice) or all."""
        dim = self.keys.shape[-1]
        exact = getattr(self, part).reshape(-1, dim)
        wanted = exact.shape[0] if n_vectors is None else n_vectors
        if wanted > exact.shape[0]:
            exact = mx.concatenate([exact, self._drawn(wanted - exact.shape[0], dim)])
        exact = exact[:wanted]
        padded = mx.pad(exact, [(0, -wanted % PAGE_TOKENS), (0, 0)]).reshape(-1, PAGE_TOKENS, dim)
        decoded = decode_pages(encode_pages(padded, padded, self.page_format), self.page_format, mx.float32)
        there = np.array(getattr(decoded, part)).reshape(-1, dim)[:wanted].astype(np.float64)
        here = np.array(exact).astype(np.float64)
        nmse = float(((here - there) ** 2).sum() / (here**2).sum())
        norms = np.linalg.norm(here, axis=1) * np.linalg.norm(there, axis=1)
        cosine = float(((here * there).sum(1) / norms).mean())
        return {"nmse": nmse, "snr_db": -10 * math.log10(nmse), "cosine": cosine}

    def time_encode(self) -> dict[str, float]:
        """Median time to encode all keys and values, as vectors and input megabytes per second."""
        seconds = _median(lambda: encode_pages(self.keys, self.values, self.page_format))
        return {
            "ms": seconds * 1e3,
            "vectors_per_second": 2 * self.tokens * KV_HEADS / seconds,
            "mb_per_second": 2 * self.keys.nbytes / 1e6 / seconds,
        }

    def time_attention(self) -> dict[str, Any]:
        """Median time of one step on the codes, and of MLX's own attention on exact arrays."""
        ms = _median(self._attend) * 1e3
        others = {}
        for dtype in (mx.float32, mx.bfloat16):
            keys, values = (x.astype(dtype) for x in self._whole(self.keys, self.values))
            mx.eval(keys, values)
            name = f"mlx sdpa {str(dtype).rpartition('.')[2]}"
            others[name] = _median(partial(self._plain, keys, values)) * 1e3
        best = min(others, key=lambda name: others[name])
        return {
            "ms": ms,
            "torch_ms": others,
            "best_torch": best,
            "best_torch_ms": others[best],
            "speedup": others[best] / ms,
        }

    def _attend(self) -> Array:
        reader = history_reader([self.raw], self.page_format, [0], [self.tokens])
        return attend(
            self.query, [self.raw], self.page_format, None, self.recent, None, self.scaling, None, reader
        ).out

    def _plain(self, keys: Array, values: Array) -> Array:
        return mx.fast.scaled_dot_product_attention(
            self.query.astype(keys.dtype), keys, values, scale=self.scaling
        )

    def _whole(self, keys: Array, values: Array) -> tuple[Array, Array]:
        whole = []
        for history, recent in ((keys, self.recent.keys), (values, self.recent.values)):
            flat = history.reshape(1, KV_HEADS, self.tokens, -1)
            whole.append(mx.concatenate([flat, recent], axis=2))
        return whole[0], whole[1]

    def _drawn(self, *shape: int) -> Array:
        return mx.random.normal(shape, key=next(self._keys))


def _median(call: Callable[[], Any]) -> float:
    """Median seconds of a call, after one call to warm up."""
    times: list[float] = []
    mx.eval(call())
    while len(times) < MIN_REPEATS or (sum(times) < MIN_SECONDS and len(times) < MAX_REPEATS):
        start = time.perf_counter()
        mx.eval(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _relative(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
