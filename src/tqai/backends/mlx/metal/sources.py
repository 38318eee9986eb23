"""The Metal sources of a page format: the files beside this one, with its sizes as macros."""

from __future__ import annotations

from functools import cache
from importlib import resources

from tqai.core.page import PageFormat

__all__ = ["body", "header"]


def header(page_format: PageFormat, rows: int = 1) -> str:
    """Macros and functions that come before a kernel; `rows` query heads share a KV head."""
    key, value = page_format.key, page_format.value
    macros = {
        "HEAD_DIM_K": key.spec.head_dim,
        "HEAD_DIM_V": value.spec.head_dim,
        "BITS_K": key.spec.bits,
        "BITS_V": value.spec.bits,
        "ROW_BYTES_K": key.row_bytes,
        "ROW_BYTES_V": value.row_bytes,
        "KEY_SCALES_AT": page_format.key_scales_at,
        "VALUE_CODES_AT": page_format.value_codes_at,
        "VALUE_SCALES_AT": page_format.value_scales_at,
        "PAGE_BYTES": page_format.page_bytes,
        "NORM_SCALE_K": str(key.spec.scale == "norm").lower(),
        "NORM_SCALE_V": str(value.spec.scale == "norm").lower(),
        "ROWS": rows,
    }
    lines = [f"#define {name} {number}" for name, number in macros.items()]
    return "\n".join(lines) + "\n" + body("codes")


@cache
def body(name: str) -> str:
    """The text of `<name>.metal`."""
    return resources.files(__package__).joinpath(f"{name}.metal").read_text(encoding="utf-8")
