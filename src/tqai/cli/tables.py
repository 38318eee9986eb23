"""Rows and sentences that more than one command prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqai.cli.measure import CacheFigures
from tqai.cli.report import format_bytes

__all__ = ["cache_columns", "cache_rows", "describe_difference"]


def cache_columns(model: Any, plain: CacheFigures, packed: CacheFigures) -> list[str]:
    """Column titles of the two caches; the uncompressed one holds numbers of the model's dtype."""
    dtype = str(model.dtype).removeprefix("torch.")
    return [f"{plain.label}, {dtype}", packed.label]


def cache_rows(columns: Sequence[CacheFigures]) -> list[list[str]]:
    """Table rows, label first: bytes held, bits per value, compression against bfloat16."""
    return [
        ["bytes held", *(format_bytes(figures.held_bytes) for figures in columns)],
        ["bits per value", *(f"{figures.bits_per_value:.2f}" for figures in columns)],
        ["compression (bfloat16 = 1)", *(f"{figures.compression_factor:.2f}x" for figures in columns)],
    ]


def describe_difference(index: int | None, tokens: int) -> str:
    """Where two decoded sequences first differ, in words; `index` counts from 0."""
    if index is None:
        return f"The same {tokens} tokens." if tokens != 1 else "The same token."
    return f"The first token that differs is number {index + 1}."
