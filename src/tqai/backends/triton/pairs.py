"""PTX from words of codes to whole levels in float16, two neighbouring words in a register.

The compiler takes vectors of small integers apart; written so, every instruction serves two to eight codes.
`slice_kernels` has the same in plain terms, for other GPUs. Two slices, a and b, of a word w and of its
neighbour w' are looked up together (low end first):

    nibbles   | a of w | b of w | a of w' | b of w' |      codes; 2 and 3 bits are shifted and masked to be so
    bytes     | a of w | b of w | a of w' | b of w' |      128 + level: a byte permute reads the table
    halves    | a of w     | 0  | a of w'      | 0  |      and the same for b
    float16   | a of w          | a of w'           |      less 128

Bytes that stand in a half are float16 numbers below the normal ones, times 2^-24, which adding and the tensor
cores take as any others; so levels are exact, and `UNIT` times too small.

A permute has 8 bytes to choose from and yields, where a nibble's top bit is set, 0 instead, if no byte of the
table has its top bit set. So with 4 bits the levels below 0 and those above are read by one permute each;
128 + above - below borrows from no byte.

    instructions for a level: 2.25 (4 bits), 2.1 (3 bits), 1.6 (2 bits), of which 0.5 of float16
"""

from __future__ import annotations

from tqai.backends.triton.whole_levels import WholeLevels

__all__ = ["SLICE_PAIRS", "UNIT", "pair_instructions"]

SLICE_PAIRS = {4: ((0, 1), (2, 3)), 3: ((0, 2), (1, 3), (4, 6), (5, 7)), 2: ((0, 2), (1, 3), (4, 6), (5, 7))}
"""Slices that are looked up together, by bits."""
UNIT = 2.0**24
BIAS = 128
LESS_BIAS = "0x80808080"


def pair_instructions(levels: WholeLevels, bits: int) -> tuple[str, ...]:
    """For each of `SLICE_PAIRS` of 2 to 4 bits: from `$2` (and, for 3 bits, `$3`, words of top bits) to `$0`
    and `$1`, the levels over `UNIT` of its first and of its second slice."""
    bytes_of = _bytes_of_four if bits == 4 else _bytes_of_fewer
    return tuple(
        " ".join(
            [
                "{ .reg .b32 a0, a1, b0, b1, s, t, u, v, c, z;",
                *_HIDDEN_ZERO,
                *bytes_of(levels, bits, number),
                "and.b32 t, v, 0x00ff00ff;",
                "prmt.b32 u, v, 0, 0x4341;",
                f"mov.b32 c, {LESS_BIAS};",
                "add.rn.f16x2 $0, t, c;",
                "add.rn.f16x2 $1, u, c; }",
            ]
        )
        for number in range(len(SLICE_PAIRS[bits]))
    )


def _bytes_of_four(levels: WholeLevels, bits: int, number: int) -> list[str]:
    below, above = _words([-k for k in levels.whole[:8]]), _words(list(levels.magnitudes))
    return [
        *_table(("a0", "a1"), below),
        *_table(("b0", "b1"), above),
        f"prmt.b32 s, $2, 0, {('0x3120', '0x2031')[number]};",
        "xor.b32 t, s, 0x88888888;",
        "prmt.b32 u, a0, a1, s;",
        "prmt.b32 v, b0, b1, t;",
        "sub.u32 v, v, u;",
        f"add.u32 v, v, {_words([BIAS] * 4)[0]};",
    ]


def _bytes_of_fewer(levels: WholeLevels, bits: int, number: int) -> list[str]:
    table = _words([BIAS + k for k in levels.whole])
    # the same steps for all pairs as far as they go, for the compiler to take once
    lines = [*_table(("a0", "a1"), [table[0], table[-1]]), "prmt.b32 s, $2, 0, 0x3120;"]
    if number % 2:
        lines.append("shr.b32 s, s, 2;")
    lines.append("and.b32 s, s, 0x33333333;")
    if number >= 2:
        lines.append("shr.b32 s, s, 16;")
    if bits == 3:
        shift = ("shl.b32 t, t, 2;", "shl.b32 t, t, 1;", "", "shr.b32 t, t, 1;")[number]
        lines += ["prmt.b32 t, $3, 0, 0x2020;", shift, "lop3.b32 s, t, 0x44444444, s, 0xea;"]
    return [*lines, "prmt.b32 v, a0, a1, s;"]


# A permute takes one constant; the other word of a table must be in a register. Known constants are kept
# elsewhere and copied for every permute, so this one comes from what the compiler cannot know to be 0.
_HIDDEN_ZERO = ("mov.u32 z, %lanemask_le;", "mov.u32 t, %lanemask_gt;", "and.b32 z, z, t;")


def _table(names: tuple[str, str], words: list[str]) -> list[str]:
    return [f"xor.b32 {names[0]}, z, {words[0]};", f"mov.b32 {names[1]}, {words[1]};"]


def _words(numbers: list[int]) -> list[str]:
    """Bytes, four in a word, the first in its low byte."""
    parts = [numbers[i : i + 4] for i in range(0, len(numbers), 4)]
    return [f"0x{sum(k << 8 * i for i, k in enumerate(part)):08x}" for part in parts]
