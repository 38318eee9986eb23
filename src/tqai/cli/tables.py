"""Rows and sentences that more than one command prints."""

from __future__ import annotations

from collections.abc import Sequence

from tqai.cli.measure import CacheFigures
from tqai.cli.report import format_bytes

__all__ = ["cache_rows", "describe_difference"]


def cache_rows(columns: Sequence[CacheFigures]) -> list[list[str]]:
    """Table rows, label first: bytes held, bits per value, size against bfloat16."""
    return [
        ["bytes held", *(format_bytes(figures.held_bytes) for figures in columns)],
        ["bits per value", *(f"{figures.bits_per_value:.2f}" for figures in columns)],
        ["smaller than in bfloat16", *(f"{figures.compression_factor:.2f}x" for figures in columns)],
    ]


def describe_difference(index: int | None, tokens: int) -> str:
    """Where two decoded sequences first differ, in words; `index` counts from 0."""
    if index is None:
        return f"The same {tokens} tokens." if tokens != 1 else "The same token."
    return f"The first token that differs is number {index + 1}."
