"""Trellis codecs for the C kernels: the tables of `csrc/trellis.h`, and the order of bytes inside a page.

Byte k of many tokens lie beside each other: of all 64 for keys, of 8 for values. Nothing else changes.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqai.core.codec import Codec
from tqai.core.page import PAGE_TOKENS
from tqai.core.trellis import TrellisCodec
from tqai.core.trellis_code import TrellisCode

__all__ = ["TrellisTables", "fill", "from_row_codes", "refusal", "to_row_codes", "trellis_tables"]

MAX_HEAD_DIM = 256
KIND = 1
"""TQAI_TRELLIS of csrc/tqai.h."""
LARGEST_LEVEL = 127
SPREAD_BYTES = 3
"""A window lies in at most so many bytes."""

_pointer = ctypes.c_void_p


class TrellisTables(ctypes.Structure):
    """`tqai_trellis`."""

    _fields_ = [
        ("state_bits", ctypes.c_int32),
        ("index_bits", ctypes.c_int32),
        ("per_deviation", ctypes.c_float),
        ("levels", _pointer),
        ("window_index", _pointer),
        ("window_levels", _pointer),
        ("values", _pointer),
        ("matrices", _pointer),
        ("nibbles", _pointer),
        ("nibble_levels", _pointer),
        ("place_maps", _pointer),
        ("place_levels", _pointer),
    ]


def refusal(codec: TrellisCodec) -> str | None:
    """Why the kernels do not serve a trellis codec, in a few words; None if they do."""
    head_dim = codec.spec.head_dim
    if head_dim % 16 or head_dim > MAX_HEAD_DIM or head_dim // 16 % 4 == 3:
        return f"head_dim {head_dim}: served are multiples of 16 up to 256 but for 64 n + 48"
    return None


def fill(struct: Any, codec: TrellisCodec, terms: int, arrays: list[Any]) -> None:
    """Enter what only trellis codecs have into a `tqai_codec`. The levels are exact: no rounding is added.
    What the structure points to is added to `arrays`; factors of levels are whole numbers, at most `terms`
    of them in a sum."""
    tables = trellis_tables(codec, arrays)
    arrays.append(tables)
    struct.level_step = codec.code.step / np.sqrt(codec.spec.head_dim)
    struct.largest_sum = (2**31 - 1) / LARGEST_LEVEL - terms
    struct.kind = KIND
    struct.tables = ctypes.addressof(tables)


def trellis_tables(codec: TrellisCodec, arrays: list[Any]) -> TrellisTables:
    """The structure of a codec; the arrays that it points to are added to `arrays`."""

    def keep(array: NDArray[Any], dtype: type[np.generic]) -> int:
        kept = np.ascontiguousarray(array, dtype=dtype)
        arrays.append(kept)
        return int(kept.ctypes.data)

    code = codec.code
    windows = np.arange(1 << code.window_bits)
    # the kernels read whole registers
    levels = np.pad(code.levels, (0, 128 - len(code.levels)))
    nibbles, nibble_levels = nibble_maps(code)
    place, place_levels = place_maps(code)
    return TrellisTables(
        state_bits=code.state_bits,
        index_bits=len(code.rows),
        per_deviation=float(np.sqrt(codec.spec.head_dim) / code.step),
        levels=keep(levels, np.int8),
        window_index=keep(code.mixed(windows), np.uint8),
        window_levels=keep(np.pad(code.window_levels, (0, 8)), np.int8),
        values=keep(codec.tables()["windows"], np.float32),
        matrices=keep(byte_maps(code), np.uint64),
        nibbles=keep(nibbles, np.uint8),
        nibble_levels=keep(nibble_levels, np.int8),
        place_maps=keep(place, np.uint64),
        place_levels=keep(place_levels, np.int8),
    )


def byte_maps(code: TrellisCode) -> NDArray[np.uint64]:
    """uint64 `[8, 3]`: for coordinate 8 a + u, the matrices by which the bytes from bit `bits * u` on make
    the index of its level. Byte 7 - j of a matrix is the mask of the byte's bits that bit j sums up.

    >>> from tqai.core.trellis_code import trellis_code
    >>> byte_maps(trellis_code(6, 2)).shape
    (8, 3)
    """
    maps = np.zeros((8, SPREAD_BYTES), dtype=np.uint64)
    for u in range(8):
        for j, row in enumerate(code.rows):
            spread = row << (code.bits * u % 8)
            for i in range(SPREAD_BYTES):
                maps[u, i] |= np.uint64((spread >> (8 * i) & 0xFF) << (8 * (7 - j)))
    return maps


def nibbles_of(bits: int, state_bits: int, u: int) -> tuple[int, int, int]:
    """Of the window of coordinate 8 a + u: its first bit in its first nibble, how many nibbles it lies in,
    and which of them maps to itself (-1: none). As in csrc/trellis.h."""
    shift = bits * u % 4
    end = shift + state_bits + bits
    if bits == 4:
        direct = 0
    elif state_bits == 8:
        direct = 2 if bits == 1 and u % 4 == 3 else 1
    else:
        direct = -1 if bits == 2 and u % 2 else end // 4 - 1
    return shift, -(-end // 4), direct


def nibble_maps(code: TrellisCode) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """What the nibbles of a window make of it, uint8 `[8, 4, 16]`, and the levels int8 `[8, 128]` of the
    exclusive or of that: the index of its level in a basis of coordinate 8 a + u's own, in which one nibble
    is the low four bits as it stands.

    >>> from tqai.core.trellis_code import trellis_code
    >>> maps, levels = nibble_maps(trellis_code(6, 4))
    >>> bool((maps[0, 0] == range(16)).all())
    True
    """
    maps = np.zeros((8, 4, 16), dtype=np.uint8)
    levels = np.zeros((8, 128), dtype=np.int8)
    index_bits, inside = len(code.rows), (1 << code.window_bits) - 1
    for u in range(8):
        shift, count, direct = nibbles_of(code.bits, code.state_bits, u)
        indices = [
            code.mixed(
                ((np.arange(16) << (4 * j)) >> shift if j == 0 else np.arange(16) << (4 * j - shift)) & inside
            )
            for j in range(count)
        ]
        reached, renamed = _basis(
            [int(indices[direct][1 << i]) for i in range(4)] if direct >= 0 else [], index_bits
        )
        for j, index in enumerate(indices):
            maps[u, j] = renamed[index]
        levels[u, : 1 << index_bits] = code.levels[reached]
    return maps, levels


def place_maps(code: TrellisCode) -> tuple[NDArray[np.uint64], NDArray[np.int8]]:
    """Of codes of 2 and 4 bits, for the coordinates whose windows begin in one byte: the matrices uint64
    `[4]` of the byte that goes through a map, and levels int8 `[4, 128]`, as in csrc/trellis.h. Zeros for
    other bits.

    >>> from tqai.core.trellis_code import trellis_code
    >>> place_maps(trellis_code(6, 4))[1].shape
    (4, 128)
    """
    maps, levels = np.zeros(4, dtype=np.uint64), np.zeros((4, 128), dtype=np.int8)
    if code.bits % 2:
        return maps, levels
    for u in range(8 // code.bits):
        before, direct = place_bits(code.bits, code.state_bits, u)
        # of bit i of the two bytes, what it adds to the index
        inside = range(code.bits * u, code.bits * u + code.window_bits)
        added = [
            int(code.mixed(np.array([1 << (i - inside[0])]))[0]) if i in inside else 0 for i in range(16)
        ]
        first = code.bits * u if before else 8
        reached, renamed = _basis(added[first : first + direct], len(code.rows))
        levels[u, : len(reached)] = code.levels[reached]
        mapped = 8 if before else 0
        for bit in range(8):
            for j in range(len(code.rows)):
                if renamed[added[mapped + bit]] >> j & 1:
                    maps[u] |= np.uint64(1 << (8 * (7 - j) + bit))
    return maps, levels


def place_bits(bits: int, state_bits: int, u: int) -> tuple[bool, int]:
    """Whether the window's first byte (else its second) enters the index as it stands, and how many bits of
    it, as in csrc/trellis.h."""
    over = bits * u + bits + state_bits - 8
    return over > 4, 8 - bits * u if over > 4 else max(over, 0)


def _basis(basis: list[int], index_bits: int) -> tuple[list[int], NDArray[np.uint8]]:
    """A basis of the indices that begins with the given ones: which index each sum of it is, and the inverse.
    Single bits are added, those of the second part of the levels first."""
    basis = list(basis)
    reached = _sums(basis)
    for i in (*range(4, index_bits), *range(4)):
        if len(reached) < 1 << index_bits and 1 << i not in reached:
            basis.append(1 << i)
            reached = _sums(basis)
    renamed = np.zeros(1 << index_bits, dtype=np.uint8)
    renamed[reached] = np.arange(1 << index_bits)
    return reached, renamed


def _sums(basis: list[int]) -> list[int]:
    """Entry x: the exclusive or of the basis vectors that the bits of x choose."""
    sums = [0]
    for vector in basis:
        sums += [other ^ vector for other in sums]
    return sums


@lru_cache(maxsize=16)
def _places(row_bytes: int, is_value: bool) -> NDArray[np.intp]:
    """Of byte k of a token, `[64, row_bytes]`, its place in the code part."""
    token, k = np.arange(PAGE_TOKENS)[:, None], np.arange(row_bytes)
    if is_value:
        return np.asarray(8 * (row_bytes * (token // 8) + k) + token % 8, dtype=np.intp)
    g, t = token // 16, token % 16
    return np.asarray(64 * k + 16 * (t // 4) + 4 * g + t % 4, dtype=np.intp)


def to_row_codes(raw: NDArray[np.uint8], codec: Codec, is_value: bool) -> NDArray[np.uint8]:
    """Canonical codes uint8 `[..., 64, row_bytes]` of codes in the kernels' order, same shape."""
    flat = raw.reshape(*raw.shape[:-2], -1)
    return flat[..., _places(codec.row_bytes, is_value)]


def from_row_codes(codes: NDArray[np.uint8], codec: Codec, is_value: bool) -> NDArray[np.uint8]:
    """Inverse of `to_row_codes`."""
    out = np.empty((*codes.shape[:-2], PAGE_TOKENS * codec.row_bytes), dtype=np.uint8)
    out[..., _places(codec.row_bytes, is_value)] = codes
    return out.reshape(codes.shape)
