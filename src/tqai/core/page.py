"""What a page holds, byte by byte.

A page is 64 consecutive tokens of one KV head of one layer of one sequence. In memory it is one run
of bytes, so that a kernel fetches it with one copy:

    offset 0            key_scales_at        value_codes_at       value_scales_at      page_bytes
    | key codes         | 64 key scales      | value codes        | 64 value scales    |
    | 64 * row_bytes    | 64 * bfloat16      | 64 * row_bytes     | 64 * bfloat16      |
    '-- each part is a multiple of 16 bytes, as 64 rows and 64 scales always are -------'

With `scale_format="log8"` a scale is one byte (`core.log_scale`) and 16 bytes follow, the bases:

    offset 0            key_scales_at        value_codes_at       value_scales_at      bases_at     page_bytes
    | key codes         | 64 key scales      | value codes        | 64 value scales    | bases      |
    | 64 * row_bytes    | 64 bytes           | 64 * row_bytes     | 64 bytes           | 16 bytes   |

    bases: key base, value base (bfloat16, low byte first), 12 bytes of 0

The *canonical* order inside 'codes' is token by token, each token one bit-packed row (`core.packing`);
it is the form of saved files. A backend may order the bytes inside the two code parts as its kernels
like best; `Backend.to_canonical` and `from_canonical` convert, bit-exact. Sizes never differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tqai.config import SCALE_FORMATS
from tqai.core import bfloat16, log_scale
from tqai.core.codec import SCALE_BYTES, Codec, Encoded
from tqai.errors import ConfigError

__all__ = [
    "PAGE_TOKENS",
    "CanonicalPages",
    "PageFormat",
    "decode_part",
    "pages_from_bytes",
    "pages_to_bytes",
    "with_scale_format",
]

PAGE_TOKENS = 64
ALIGN_BYTES = 16
BASE_BYTES = 2


class CanonicalPages(NamedTuple):
    """Pages in canonical order; leading axes are free, usually `[pages, num_kv_heads]`.

    Attributes:
        key: codes uint8 `[..., 64, key_row_bytes]`, scales uint16 `[..., 64]`.
        value: codes uint8 `[..., 64, value_row_bytes]`, scales uint16 `[..., 64]`.

    With `scale_format="log8"` scales are uint8 `[..., 66]`: 64 bytes, then the base, low byte first.
    """

    key: Encoded
    value: Encoded


@dataclass(frozen=True)
class PageFormat:
    """Sizes and offsets, in bytes, of a page whose keys and values use these two codecs.

    Keys and values may differ in bits and in head_dim. `scale_format` is "bfloat16", two bytes per vector,
    or "log8", one byte per vector and 16 per page.

    Raises:
        ConfigError: another `scale_format`.
    """

    key: Codec
    value: Codec
    scale_format: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.scale_format not in SCALE_FORMATS:
            raise ConfigError(f"scale_format={self.scale_format!r}: allowed are {', '.join(SCALE_FORMATS)}")

    @property
    def part_scales_bytes(self) -> int:
        """Bytes of the 64 scales of one side, without their base."""
        return PAGE_TOKENS * (SCALE_BYTES if self.scale_format == "bfloat16" else 1)

    @property
    def bases_bytes(self) -> int:
        """Bytes at the end of a page for the bases of its scales: 0 or 16."""
        return 0 if self.scale_format == "bfloat16" else ALIGN_BYTES

    @property
    def scales_bytes(self) -> int:
        """Bytes of a page that are no codes: scales of both sides, and bases."""
        return 2 * self.part_scales_bytes + self.bases_bytes

    @property
    def bits_per_value(self) -> float:
        """All of a page, in bits, over the 64 * (key head_dim + value head_dim) numbers in it."""
        return 8 * self.page_bytes / (PAGE_TOKENS * (self.key.spec.head_dim + self.value.spec.head_dim))

    @property
    def key_codes_bytes(self) -> int:
        return _aligned(PAGE_TOKENS * self.key.row_bytes)

    @property
    def key_scales_at(self) -> int:
        return self.key_codes_bytes

    @property
    def value_codes_at(self) -> int:
        return self.key_scales_at + self.part_scales_bytes

    @property
    def value_codes_bytes(self) -> int:
        return _aligned(PAGE_TOKENS * self.value.row_bytes)

    @property
    def value_scales_at(self) -> int:
        return self.value_codes_at + self.value_codes_bytes

    @property
    def bases_at(self) -> int:
        return self.value_scales_at + self.part_scales_bytes

    @property
    def page_bytes(self) -> int:
        return self.bases_at + self.bases_bytes


def pages_to_bytes(pages: CanonicalPages, page_format: PageFormat) -> NDArray[np.uint8]:
    """Canonical pages as one uint8 array `[..., page_bytes]`; padding bytes are 0."""
    lead = pages.key.scales.shape[:-1]
    out = np.zeros((*lead, page_format.page_bytes), dtype=np.uint8)
    parts = (
        (0, pages.key, page_format.key_scales_at, page_format.bases_at),
        (
            page_format.value_codes_at,
            pages.value,
            page_format.value_scales_at,
            page_format.bases_at + BASE_BYTES,
        ),
    )
    for codes_at, part, scales_at, base_at in parts:
        codes = part.codes.reshape(*lead, PAGE_TOKENS * part.codes.shape[-1])
        out[..., codes_at : codes_at + codes.shape[-1]] = codes
        scales: NDArray[Any]
        if page_format.scale_format == "bfloat16":
            scales = np.ascontiguousarray(part.scales.astype("<u2")).view(np.uint8)
        else:
            scales = part.scales[..., :PAGE_TOKENS]
            out[..., base_at : base_at + BASE_BYTES] = part.scales[..., PAGE_TOKENS:]
        out[..., scales_at : scales_at + scales.shape[-1]] = scales
    return out


def pages_from_bytes(raw: NDArray[np.uint8], page_format: PageFormat) -> CanonicalPages:
    """Inverse of `pages_to_bytes`: `raw` is uint8 `[..., page_bytes]`."""
    lead = raw.shape[:-1]

    def part(codes_at: int, row_bytes: int, scales_at: int, base_at: int) -> Encoded:
        codes = raw[..., codes_at : codes_at + PAGE_TOKENS * row_bytes]
        codes = np.ascontiguousarray(codes).reshape(*lead, PAGE_TOKENS, row_bytes)
        scales = raw[..., scales_at : scales_at + page_format.part_scales_bytes]
        if page_format.scale_format != "bfloat16":
            octets: NDArray[Any] = np.concatenate([scales, raw[..., base_at : base_at + BASE_BYTES]], -1)
            return Encoded(codes, octets)
        bits = np.ascontiguousarray(scales).view("<u2").astype(np.uint16)
        return Encoded(codes, bits.reshape(*lead, PAGE_TOKENS))

    bases_at = page_format.bases_at
    value_at = (page_format.value_codes_at, page_format.value.row_bytes, page_format.value_scales_at)
    return CanonicalPages(
        part(0, page_format.key.row_bytes, page_format.key_scales_at, bases_at),
        part(*value_at, bases_at + BASE_BYTES),
    )


def with_scale_format(encoded: Encoded, scale_format: str) -> Encoded:
    """What a codec gives for whole pages (`[..., 64]` bfloat16 scales), in the scale format of a page."""
    if scale_format == "bfloat16":
        return encoded
    steps, bases = log_scale.to_steps(encoded.scales)
    base_bytes = np.ascontiguousarray(bases.astype("<u2")[..., None]).view(np.uint8)
    octets: NDArray[Any] = np.concatenate([steps, base_bytes], -1)
    return Encoded(encoded.codes, octets)


def decode_part(encoded: Encoded, codec: Codec) -> NDArray[np.float32]:
    """Vectors float32 `[..., 64, head_dim]` of one side of canonical pages, whatever their scale format."""
    if encoded.scales.dtype != np.uint8:
        return codec.decode(encoded)
    octets: NDArray[Any] = encoded.scales
    bases = np.ascontiguousarray(octets[..., PAGE_TOKENS:]).view("<u2")[..., 0]
    scales = log_scale.from_steps(octets[..., :PAGE_TOKENS], bases.astype(np.uint16))
    ones = np.full(scales.shape, bfloat16.to_bits(np.float32(1.0)), dtype=np.uint16)
    # codecs are linear in the scale
    directions = codec.decode(Encoded(encoded.codes, ones)).astype(np.float64)
    limit = float(np.finfo(np.float32).max)
    return np.clip(directions * scales[..., None], -limit, limit).astype(np.float32)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES
