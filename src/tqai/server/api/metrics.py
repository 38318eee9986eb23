"""Prometheus metrics, named as vLLM names them with `tqai:` in front.

Figures of the moment are read from the engine when they are asked for; times of requests are observed
when they end.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from tqai.server.engine.engine import Engine
from tqai.server.engine.sequence import Finished, Sequence

__all__ = ["Metrics"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
PER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """A registry of its own, so that several servers may live in one process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, model_name))
        labels = {"labelnames": ("model_name",), "registry": self._registry}

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"tqai:{name}", about, buckets=buckets, **labels).labels(model_name)  # type: ignore[arg-type]

        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.", SECONDS)
        self._per_token = histogram(
            "time_per_output_token_seconds", "Mean gap between tokens of a request.", PER_TOKEN_SECONDS
        )
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", SECONDS)
        self._queued = histogram("request_queue_time_seconds", "From arrival to prefill.", SECONDS)
        self._ended = Counter(
            "tqai:request_success",
            "Requests that ended, by how.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._ended.labels(model_name, reason)  # 0 from the start
        self._model_name = model_name
        engine.on_finished = self.observe

    def observe(self, sequence: Sequence) -> None:
        """Take a request's times in. Called from the engine's thread."""
        times, outcome = sequence.times, sequence.outcome
        if isinstance(outcome, Finished):
            reason = outcome.reason
        else:
            reason = "abort" if outcome is not None and outcome.cancelled else "error"
        self._ended.labels(self._model_name, reason).inc()
        if times.admitted is not None:
            self._queued.observe(times.admitted - times.arrived)
        if times.first_token is None or times.last_token is None:
            return
        self._first.observe(times.first_token - times.arrived)
        if not isinstance(outcome, Finished):
            return
        self._whole.observe(times.last_token - times.arrived)
        if outcome.output_tokens > 1:
            self._per_token.observe((times.last_token - times.first_token) / (outcome.output_tokens - 1))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine, self._model_name = engine, model_name

    def collect(self) -> Iterable[Metric]:
        """Gauges and counters of the moment."""
        figures = self._engine.figures()
        gauges = {
            "num_requests_running": (figures.running, "Requests in prefill or decode."),
            "num_requests_waiting": (figures.waiting, "Requests in the queue."),
            "kv_cache_usage_perc": (
                figures.request_pages / figures.pages,
                "Share of the page pool that requests hold, 0 to 1.",
            ),
            "kv_pages_total": (figures.pages, "Pages of the pool, of 64 tokens in all layers."),
            "kv_pages_requests": (figures.request_pages, "Pages that requests hold."),
            "kv_pages_prefix_cache": (figures.cached_pages, "Pages that the prefix cache holds."),
            "kv_bytes_held": (figures.held_bytes, "Bytes that running requests hold for keys and values."),
            "kv_bytes_bf16": (figures.bf16_bytes, "Bytes of the same tokens uncompressed in bfloat16."),
        }
        for name, (value, about) in gauges.items():
            family = GaugeMetricFamily(f"tqai:{name}", about, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
        counters = {
            "prompt_tokens": ("prompt_tokens", "Prompt tokens computed."),
            "generation_tokens": ("generated_tokens", "Tokens generated."),
            "prefix_cache_queries": ("prefix_queried_tokens", "Prompt tokens looked up in the prefix cache."),
            "prefix_cache_hits": ("prefix_hit_tokens", "Prompt tokens found there."),
            "num_preemptions": ("preemptions", "Requests that lost their pages and were computed again."),
        }
        for name, (field, about) in counters.items():
            family_of = CounterMetricFamily(f"tqai:{name}", about, labels=["model_name"])
            family_of.add_metric([self._model_name], figures.counters[field])
            yield family_of
