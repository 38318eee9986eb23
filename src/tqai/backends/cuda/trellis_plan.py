"""What the CUDA kernels are told about trellis codecs: the form of their tables. Arithmetic and numpy."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tqai.core.codec import Codec
from tqai.core.page import PageFormat
from tqai.core.trellis import STATES
from tqai.core.trellis_code import TrellisCode, trellis_code

__all__ = [
    "PARTS",
    "Form",
    "Forms",
    "is_trellis",
    "level_unit",
    "most_warps",
    "refuse_trellis",
    "table",
    "table_bytes",
    "table_forms",
    "table_macros",
    "trellis_macros",
]

WINDOW_BITS = 15
"""A table has at most 2**15 entries with all its copies, 128 KiB."""
REGISTER_BITS = 24
OTHER_BYTES = 64 * 1024
"""What a block wants of shared memory beside its tables."""


class Form(NamedTuple):
    """Of a table in shared memory: entries for pairs of coordinates or for one, and copies of each, 32 (every
    lane its own), 16 or 8 (lanes wait for each other); `split` for levels in two candidates. Or, of 4 bits,
    `PARTS`: no table in shared memory at all."""

    pair: bool
    copies: int
    split: bool = False


Forms = tuple[Form, Form]
"""For keys and for values."""
PARTS = Form(False, 0)
"""Levels in two parts, looked up in registers (`trellis_parts.cuh`)."""


def is_trellis(page_format: PageFormat) -> bool:
    """Whether both sides have trellis codes."""
    return page_format.key.spec.name in STATES and page_format.value.spec.name in STATES


def refuse_trellis(page_format: PageFormat) -> str | None:
    """Why the kernels do not serve a pair of codecs of which at least one is a trellis codec; or None."""
    if not is_trellis(page_format):
        names = f"{page_format.key.spec.name!r} and {page_format.value.spec.name!r}"
        return f"codecs {names}: the kernels take trellis codes on both sides or on none"
    for what, codec, parts in (("keys", page_format.key, 4), ("values", page_format.value, 8)):
        spec = codec.spec
        if spec.head_dim // parts * spec.bits < STATES[spec.name]:
            return f"{what} of {spec.bits} bits and head_dim {spec.head_dim}: too few bits for a lane"
    return None


def trellis_macros(page_format: PageFormat) -> dict[str, int]:
    """Macros of all kernels for trellis codes, beside `plan.codec_macros`."""
    return {
        "TRELLIS": 1,
        "SK": STATES[page_format.key.spec.name],
        "SV": STATES[page_format.value.spec.name],
    }


def _code(codec: Codec) -> TrellisCode:
    return trellis_code(STATES[codec.spec.name], codec.spec.bits)


def _entry_bits(codec: Codec, form: Form) -> int:
    if form.split:
        return 8 if codec.spec.bits == 2 else 10
    return _code(codec).window_bits + (codec.spec.bits if form.pair else 0)


def _bytes(codec: Codec, form: Form) -> int:
    return 4 * form.copies << _entry_bits(codec, form)


def _cost(codec: Codec, form: Form) -> float:
    """Cycles of shared memory per value: 32 random lanes on 32, on 2 by 2 and on 4 by 4 banks. A split table
    takes half a cycle, and other units more: as it was measured."""
    if form == PARTS:
        return 0.0
    if form.split:
        return 0.8
    return {32: 1.0, 16: 2.0, 8: 3.0}[form.copies] / (2 if form.pair else 1)


def _forms(codec: Codec, values: bool = False) -> list[Form]:
    """`values`: for a table that keys do not read."""
    if codec.spec.bits == 4:
        return [PARTS]
    found = []
    for pair in (False, True) if codec.spec.bits <= 2 else (False,):
        for copies in (32, 16, 8):
            form = Form(pair, copies)
            window = _entry_bits(codec, form)
            # how far into a register windows begin: `GRAIN` of trellis_lookup.cuh
            bits, odd = codec.spec.bits, codec.spec.bits == 3
            furthest = (8 if odd and window > 9 else 16) - (1 if odd else bits * (1 + pair))
            if furthest + window <= REGISTER_BITS and _bytes(codec, form) <= 4 << WINDOW_BITS:
                found.append(form)
    few, by_eight = codec.spec.name == "trellis", codec.spec.head_dim % 64 == 0
    if {3: few or by_eight, 2: few and by_eight and values}.get(codec.spec.bits):
        found.append(Form(False, 32, True))
    return found


def _shared(page_format: PageFormat) -> bool:
    """Whether keys and values read one table."""
    return _code(page_format.key) is _code(page_format.value)


@lru_cache(maxsize=256)
def table_forms(page_format: PageFormat, shared_limit_bytes: int) -> Forms | None:
    """The forms for keys and values that cost least among those that leave room for pages, or None."""
    room = shared_limit_bytes - OTHER_BYTES
    if _shared(page_format):
        pairs = [(form, form) for form in _forms(page_format.key)]
    else:
        pairs = [(k, v) for k in _forms(page_format.key) for v in _forms(page_format.value, True)]
    fitting = [pair for pair in pairs if table_bytes(page_format, pair) <= room]
    return min(
        fitting,
        key=lambda pair: (
            _cost(page_format.key, pair[0]) + _cost(page_format.value, pair[1]),
            table_bytes(page_format, pair),
        ),
        default=None,
    )


def table_bytes(page_format: PageFormat, forms: Forms) -> int:
    """Shared memory of the tables of a block."""
    key = _bytes(page_format.key, forms[0])
    return key if _shared(page_format) else key + _bytes(page_format.value, forms[1])


def most_warps(page_format: PageFormat, forms: Forms, line: bool) -> int:
    """Warps of a block that have registers enough for a page on its way, the work on one and, with `line`
    (`attend_line.cu`), the way along it."""
    if line or max(page_format.key.spec.head_dim, page_format.value.spec.head_dim) > 128:
        return 8
    return 16 if forms[0].pair and forms[1].pair else 12


def table_macros(page_format: PageFormat, forms: Forms) -> dict[str, int]:
    """Macros of the attention kernel alone."""
    key, value = forms
    parts: dict[str, int] = {}
    for side, codec, form in (("K", page_format.key, key), ("V", page_format.value, value)):
        if form == PARTS:
            parts |= _part_macros(_code(codec), side)
    return {
        "PAIRK": int(key.pair),
        "PAIRV": int(value.pair),
        "SPLITK": int(key.split),
        "SPLITV": int(value.split),
        "COPIESK": key.copies,
        "COPIESV": value.copies,
        "PARTSK": int(key == PARTS),
        "PARTSV": int(value == PARTS),
        "SAME": int(_shared(page_format)),
        **parts,
    }


def _part_macros(code: TrellisCode, side: str) -> dict[str, int]:
    """The maps and the levels of 4-bit codes, as `trellis_parts.cuh` has them."""
    macros = {}
    for part, terms in enumerate(code.terms):
        packed = b"".join(bytes([shift | mask << 4]) for shift, mask in terms)
        macros[f"MAP{side}{part}"] = int.from_bytes(packed, "little")
    low, high = code.parts
    macros[f"BIAS{side}"] = bias = -int(low.min()) - int(high.min())
    entries = np.concatenate([-low[:8], low[:7:-1], high.astype(np.int16) + bias])
    for i, word in enumerate(entries.astype(np.uint8).view("<u4")):
        macros[f"LEVELS{side}{i}"] = int(word)
    return macros


def table(codec: Codec, form: Form) -> NDArray[np.uint32]:
    """Entries of all windows: the level as float32, the levels of two neighbours as bytes, or those of their
    candidates (`trellis_pairs.cuh`, `trellis_split.cuh`); none for `PARTS`. Levels are whole numbers;
    `level_unit` is what one is worth."""
    code = _code(codec)
    if form == PARTS:
        return np.empty(0, dtype=np.uint32)
    if form.split:
        middle = np.arange(1 << _entry_bits(codec, form)) << 1
        choices = np.arange(2)[:, None]
        apart = 3 if code.bits == 3 else 1
        first = middle | choices ^ middle >> apart & 1
        second = middle | (choices ^ middle >> 8 & 1) << (8 + apart)
        if code.state_bits == 6:
            windows = np.concatenate([first & (1 << code.window_bits) - 1, second >> code.bits])
            found = code.window_levels[windows]
        else:
            found = _levels_by_sums(code)[np.concatenate([first & 63, second >> 6])]
        return np.ascontiguousarray(found.T).view(np.uint32).reshape(-1)
    if not form.pair:
        return code.window_levels.astype(np.float32).view(np.uint32)
    windows = np.arange(1 << (code.window_bits + code.bits))
    entries = np.zeros((len(windows), 4), dtype=np.int8)
    entries[:, 0] = code.window_levels[windows & ((1 << code.window_bits) - 1)]
    entries[:, 1] = code.window_levels[windows >> code.bits]
    return entries.view(np.uint32).reshape(-1)


SUMS = (0b10010001110, 0b100000100, 0b1000001000, 1 << 4, 1 << 5, 1 << 6)
"""Of bits of a window of 3 bits and 256 states: x0 to x5 of `trellis_sums.cuh`."""


def _levels_by_sums(code: TrellisCode) -> NDArray[np.int8]:
    """int8 `[64]`: levels by what `SUMS` makes of a window, which is all that they depend on."""
    sums = replace(code, rows=SUMS).mixed(np.arange(1 << code.window_bits))
    found = np.empty(1 << len(SUMS), dtype=np.int8)
    found[sums] = code.window_levels
    if not np.array_equal(found[sums], code.window_levels):
        raise ValueError("trellis_sums.cuh is for another code")
    return found


def level_unit(codec: Codec) -> float:
    """The coordinate of a unit vector that level 1 stands for."""
    return float(_code(codec).step / np.sqrt(codec.spec.head_dim))
