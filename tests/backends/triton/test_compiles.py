"""The kernels compile, which takes no GPU: the interpreter lets things pass that the compiler refuses."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tqai.backends.triton import attention_kernels, slice_kernels
from tqai.backends.triton.pairs import pair_instructions
from tqai.backends.triton.slices import SLICES
from tqai.backends.triton.whole_levels import whole_levels
from tqai.core.codebook import codebook

NVIDIA = GPUTarget("cuda", 90, 32)
TYPES = {"addresses": "*i64", "query": "*fp16", "mask": "*i8", "softcap": "fp32"}
TYPES |= dict.fromkeys(("norms", "partial", "stats", "table_k", "table_v"), "*fp32")
TYPES |= dict.fromkeys(("key_unit", "value_unit"), "fp32")


def compiled(kernel, target, warps, **constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    return triton.compile(source, target=target, options={"num_warps": warps})


def levels_of(dim, bits):
    return whole_levels(codebook(dim, bits).centroids.astype(np.float32))


def words(dim, bits):
    return levels_of(dim, bits).words if bits <= 4 else (0, 0)


def test_attention_on_planes():
    bits_k, bits_v, dim, wide = 8, 1, 80, 128
    made = compiled(
        attention_kernels.attend_split, NVIDIA, 4,
        DK=dim, DV=dim, DKP=wide, DVP=wide, ROWS=16, BITS_K=bits_k, BITS_V=bits_v,
        WORDS_K=words(dim, bits_k), WORDS_V=words(dim, bits_v), MASKED=True, SOFTCAP=True,
    )  # fmt: skip
    assert "mma" in made.asm["ptx"]


@pytest.mark.parametrize(("bits_k", "bits_v", "ptx"), [(4, 2, True), (3, 4, True), (4, 2, False)])
def test_attention_on_slices(bits_k, bits_v, ptx):
    both = [(pair_instructions(levels_of(128, bits), bits) if ptx else None) for bits in (bits_k, bits_v)]
    made = compiled(
        slice_kernels.attend_sliced, NVIDIA, 1,
        DK=128, DV=128, ROWS=8, BITS_K=bits_k, BITS_V=bits_v, SK=SLICES[bits_k], SV=SLICES[bits_v],
        WORDS_K=words(128, bits_k), WORDS_V=words(128, bits_v), PTX_K=both[0], PTX_V=both[1],
        MASKED=False, SOFTCAP=False, CUT=False,
    )  # fmt: skip
    assert "mma" in made.asm["ptx"] and ("prmt" in made.asm["ptx"]) >= ptx
