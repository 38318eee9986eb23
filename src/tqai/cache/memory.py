"""What a cache holds, in bytes, counted from its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["MemoryReport"]

BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class MemoryReport:
    """Bytes held by a layer or, added up, by a cache. Every figure is counted, none is a formula:
    `total_bytes` equals the sizes of the tensor storages that the cache keeps alive
    (tests/cache/test_memory.py).

    Attributes:
        tokens: tokens held per sequence (of the longest layer).
        values: key and value coordinates that these tokens stand for, over all sequences and heads.
        codes_bytes: packed codes of pages in use.
        scales_bytes: scales of pages in use.
        window_bytes: buffers of exact tokens (window and sinks), used or not.
        table_bytes: page tables.
        slack_bytes: pages allocated ahead, and padding inside pages.
        offsets_bytes: offsets of keys and values, factors, and the energy of queries that these are made of.
        copy_bytes: the decompressed copy of `cache_strategy="incremental"`; else 0.
        other_bytes: layers that are left as they were (recurrent states).
        layer_bits: (bits_k, bits_v) of each compressed layer, in order, where decided.
        backend: name of the backend, "" before the first token.
        backend_reason: why it was chosen.
    """

    tokens: int = 0
    values: int = 0
    codes_bytes: int = 0
    scales_bytes: int = 0
    window_bytes: int = 0
    table_bytes: int = 0
    slack_bytes: int = 0
    offsets_bytes: int = 0
    copy_bytes: int = 0
    other_bytes: int = 0
    layer_bits: tuple[tuple[int, int], ...] = ()
    backend: str = ""
    backend_reason: str = ""

    @property
    def total_bytes(self) -> int:
        """Everything held for keys and values (without `other_bytes`, which compress nothing)."""
        return (
            self.codes_bytes
            + self.scales_bytes
            + self.window_bytes
            + self.table_bytes
            + self.slack_bytes
            + self.offsets_bytes
            + self.copy_bytes
        )

    @property
    def bf16_bytes(self) -> int:
        """Bytes that the same tokens take uncompressed in bfloat16."""
        return BFLOAT16_BYTES * self.values

    @property
    def bits_per_value(self) -> float:
        """All-in: everything held over the values it stands for; 0 for an empty cache."""
        return 8 * self.total_bytes / self.values if self.values else 0.0

    @property
    def compression_factor(self) -> float:
        """`bf16_bytes` over `total_bytes`; 1 for an empty cache."""
        return self.bf16_bytes / self.total_bytes if self.total_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Fields and derived figures as plain values, fit for JSON."""
        derived = ("total_bytes", "bf16_bytes", "bits_per_value", "compression_factor")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    @classmethod
    def sum(cls, parts: Iterable[MemoryReport]) -> MemoryReport:
        """The parts added up; `tokens` is the largest, backends are listed once each."""
        parts = list(parts)
        counted = [
            field.name for field in fields(cls) if field.name.endswith("_bytes") or field.name == "values"
        ]
        return cls(
            tokens=max((part.tokens for part in parts), default=0),
            **{name: sum(getattr(part, name) for part in parts) for name in counted},
            layer_bits=tuple(pair for part in parts for pair in part.layer_bits),
            backend=", ".join(sorted({part.backend for part in parts if part.backend})),
            backend_reason="; ".join(sorted({part.backend_reason for part in parts if part.backend_reason})),
        )
