"""What the kernels read of a codec, on the device, and how wide and exact they work."""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from tqai.backends.triton.pairs import SLICE_PAIRS, UNIT, pair_instructions
from tqai.backends.triton.whole_levels import whole_levels
from tqai.core.codec import CodecSpec, make_codec

__all__ = ["Tables", "padded", "precision", "tables"]


class Tables:
    """A codec's arrays on a device: `forward` is R transposed, `back` is R, both for row vectors.

    Attributes:
        words: of the levels as whole numbers (`whole_levels`); (0, 0) for more than 4 bits.
        unit: what levels are multiples of; 1 for more than 4 bits.
        instructions: the levels of 2 to 4 bits in PTX (`pairs`), or None where that is no NVIDIA GPU.
    """

    @property
    def sliced_unit(self) -> float:
        """What the kernel on slices multiplies its levels with."""
        return self.unit if self.instructions is None else self.unit * UNIT

    def __init__(self, spec: CodecSpec, device: torch.device) -> None:
        codec = make_codec(spec)
        matrix = torch.from_numpy(codec.rotation_matrix.copy()).float()
        self.forward, self.back = matrix.T.contiguous().to(device), matrix.to(device)
        arrays = codec.tables()
        self.centroids = torch.from_numpy(arrays["centroids"].copy()).to(device)
        self.boundaries = torch.from_numpy(arrays["boundaries"].copy()).to(device)
        levels = whole_levels(arrays["centroids"])
        self.words, self.unit = ((0, 0), 1.0) if levels is None else (levels.words, levels.unit)
        self.instructions: tuple[str, ...] | None = None
        nvidia = device.type == "cuda" and torch.version.cuda is not None
        if levels is not None and spec.bits in SLICE_PAIRS and nvidia and _pairs_wanted():
            self.instructions = pair_instructions(levels, spec.bits)


@lru_cache(maxsize=64)
def tables(spec: CodecSpec, device: torch.device) -> Tables:
    """The tables of a codec on a device, made once."""
    return Tables(spec, device)


def _pairs_wanted() -> bool:
    # TQAI_TRITON_PTX=0 tries the portable form on an NVIDIA GPU
    return os.environ.get("TQAI_TRITON_PTX", "1") != "0"


def precision() -> str:
    """Of float32 products: three TF32 products on NVIDIA's tensor cores come close to float32's rounding."""
    return "ieee" if torch.version.cuda is None else "tf32x3"


def padded(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()
