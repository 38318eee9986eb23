"""A backend on random vectors: checked against core, then timed beside torch's own attention."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tqai.backends import resolve
from tqai.backends.base import ExactTokens
from tqai.cache.page_format import page_format_for
from tqai.cache.pages import PagePool
from tqai.config import CacheConfig
from tqai.core.page import PAGE_TOKENS
from tqai.errors import BackendError

__all__ = ["KernelBench"]

KV_HEADS, QUERY_HEADS = 8, 32
CHECKED_PAGES = 4
MAX_DECODE_ERROR = 1e-5
MAX_ATTENTION_ERROR = {torch.float32: 2e-3, torch.bfloat16: 1e-2}
"""Relative L2. The output itself is rounded to the query's dtype: 2**-9 each in bfloat16."""
MIN_SECONDS, MIN_REPEATS, MAX_REPEATS = 0.3, 5, 200


class KernelBench:
    """Gaussian keys and values of `pages` pages, encoded by the backend that serves the device.

    Raises:
        ConfigError, BackendError, UnsupportedError: no backend serves the configuration.
    """

    def __init__(self, config: CacheConfig, head_dim: int, pages: int, device: torch.device) -> None:
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.page_format = page_format_for(config, head_dim, head_dim)
        choice = resolve(
            self.page_format, device.type, str(self.dtype).removeprefix("torch."), config.backend
        )
        self.backend, self.reason = choice.backend, choice.reason
        self.tokens = pages * PAGE_TOKENS
        self.scaling = 1 / math.sqrt(head_dim)
        self._generator = torch.Generator().manual_seed(config.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self._generator).to(device, self.dtype)

        self.keys = draw(pages, KV_HEADS, PAGE_TOKENS, head_dim)
        self.values = draw(pages, KV_HEADS, PAGE_TOKENS, head_dim)
        self.query = draw(1, QUERY_HEADS, 1, head_dim)
        self.recent = ExactTokens(draw(1, KV_HEADS, 1, head_dim), draw(1, KV_HEADS, 1, head_dim))
        self.pool = PagePool(self.page_format, 1, KV_HEADS, device)
        ids, self.raw = self.pool.append(pages)
        self.backend.encode(self.keys, self.values, self.page_format, self.raw)
        self.pool.commit(ids, self.raw)
        self.decoded = self.backend.decode(self.raw, self.page_format, torch.float32)

    @property
    def bits_per_value(self) -> float:
        """Bits of a whole page over the numbers it stands for."""
        values = 2 * PAGE_TOKENS * self.keys.shape[-1]
        return 8 * self.page_format.page_bytes / values

    def check(self) -> dict[str, float]:
        """Relative errors of decoding (against core) and of attention (against float64 attention to
        the decoded vectors).

        Raises:
            BackendError: one of them is too large, so that a speed would mean nothing.
        """
        raw = self.raw[:CHECKED_PAGES]
        canonical = self.backend.to_canonical(raw, self.page_format)
        wanted = [self.page_format.key.decode(canonical.key), self.page_format.value.decode(canonical.value)]
        got = [part[:CHECKED_PAGES].cpu().numpy() for part in (self.decoded.keys, self.decoded.values)]
        decode_error = max(_relative(left, right) for left, right in zip(got, wanted, strict=True))
        out = self._attend().out.double().cpu()
        attention_error = _relative(out.numpy(), self._exact_attention().numpy())
        if not decode_error <= MAX_DECODE_ERROR:
            raise BackendError(f"backend {self.backend.name} decodes wrongly: error {decode_error:.1e}")
        if not attention_error <= MAX_ATTENTION_ERROR[self.dtype]:
            raise BackendError(f"backend {self.backend.name} attends wrongly: error {attention_error:.1e}")
        return {"decode_error": decode_error, "attention_error": attention_error}

    def distortion(self, part: str, n_vectors: int | None = None) -> dict[str, float]:
        """NMSE, SNR in dB and mean cosine of "keys" or "values" against what was encoded.

        Of `n_vectors` vectors: the first of those encoded, and further ones drawn where they do not
        suffice; None for all encoded ones.
        """
        wanted = self.keys.numel() // self.keys.shape[-1] if n_vectors is None else n_vectors
        error = energy = cosines = 0.0
        left = wanted
        decoded: ExactTokens = self.decoded
        drawn: dict[str, Tensor] = {"keys": self.keys, "values": self.values}
        while left:
            exact = drawn[part].double().flatten(0, -2)[:left]
            approximate = getattr(decoded, part).double().flatten(0, -2)[:left]
            error += float((exact - approximate).square().sum())
            energy += float(exact.square().sum())
            cosines += float(torch.nn.functional.cosine_similarity(exact, approximate, dim=-1).sum())
            left -= len(exact)
            if left:
                fresh = torch.randn(self.keys.shape, generator=self._generator).to(self.device, self.dtype)
                drawn = {"keys": fresh, "values": fresh}
                raw = torch.empty_like(self.raw)
                self.backend.encode(fresh, fresh, self.page_format, raw)
                decoded = self.backend.decode(raw, self.page_format, torch.float32)
        nmse = error / energy
        return {"nmse": nmse, "snr_db": -10 * math.log10(nmse), "cosine": cosines / wanted}

    def time_encode(self) -> dict[str, float]:
        """Median time to encode all keys and values, as vectors and input megabytes per second."""
        out = torch.empty_like(self.raw)
        seconds = self._median(lambda: self.backend.encode(self.keys, self.values, self.page_format, out))
        vectors = 2 * self.tokens * KV_HEADS
        megabytes = 2 * self.keys.numel() * self.keys.element_size() / 1e6
        return {
            "ms": seconds * 1e3,
            "vectors_per_second": vectors / seconds,
            "mb_per_second": megabytes / seconds,
        }

    def time_attention(self) -> dict[str, Any]:
        """Median time of one step on the codes, and of every formulation in torch on exact tensors."""
        ms = self._median(self._attend) * 1e3
        others = {name: self._median(call) * 1e3 for name, call in self._torch_formulations().items()}
        best = min(others, key=lambda name: others[name])
        return {
            "ms": ms,
            "torch_ms": others,
            "best_torch": best,
            "best_torch_ms": others[best],
            "speedup": others[best] / ms,
        }

    def _attend(self) -> Any:
        return self.backend.attend(self.query, self.pool.history(), None, self.recent, None, self.scaling)

    def _whole(self, history: Tensor, recent: Tensor) -> Tensor:
        """`[pages, heads, 64, d]` and the new token as `[1, heads, tokens + 1, d]`."""
        flat = history.transpose(0, 1).reshape(1, KV_HEADS, self.tokens, -1)
        return torch.cat([flat, recent.to(flat.dtype)], dim=2)

    def _exact_attention(self) -> Tensor:
        keys = self._whole(self.decoded.keys.double(), self.recent.keys).cpu()
        values = self._whole(self.decoded.values.double(), self.recent.values).cpu()
        query = self.query.double().cpu()
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, scale=self.scaling, enable_gqa=True
        )

    def _torch_formulations(self) -> dict[str, Callable[[], Any]]:
        """Attention of torch on uncompressed tensors, each as fast as we know to write it."""
        sdpa = torch.nn.functional.scaled_dot_product_attention
        calls: dict[str, Callable[[], Any]] = {}
        for dtype in dict.fromkeys((self.dtype, torch.bfloat16)):
            keys = self._whole(self.keys, self.recent.keys).to(dtype)
            values = self._whole(self.values, self.recent.values).to(dtype)
            query = self.query.to(dtype)
            rows = query.reshape(1, KV_HEADS, QUERY_HEADS // KV_HEADS, -1)
            name = str(dtype).removeprefix("torch.")

            def grouped(q: Tensor = query, k: Tensor = keys, v: Tensor = values) -> Tensor:
                return sdpa(q, k, v, scale=self.scaling, enable_gqa=True)

            def as_rows(q: Tensor = rows, k: Tensor = keys, v: Tensor = values) -> Tensor:
                return sdpa(q, k, v, scale=self.scaling)

            def matmul(q: Tensor = rows, k: Tensor = keys, v: Tensor = values) -> Tensor:
                return torch.softmax(q @ k.transpose(-1, -2) * self.scaling, dim=-1) @ v

            calls[f"sdpa grouped {name}"] = grouped
            calls[f"sdpa heads as rows {name}"] = as_rows
            calls[f"matmul {name}"] = matmul
        return calls

    def _median(self, call: Callable[[], Any]) -> float:
        """Median seconds of a call, after one call to warm up."""
        times: list[float] = []
        with torch.inference_mode():
            call()
            self._wait()
            while len(times) < MIN_REPEATS or (sum(times) < MIN_SECONDS and len(times) < MAX_REPEATS):
                start = time.perf_counter()
                call()
                self._wait()
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _relative(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
