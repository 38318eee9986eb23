"""What the kernels read of a codec, on the device, and how wide and exact they work."""

from __future__ import annotations

import os
from functools import lru_cache

import torch

from tqai.backends.triton.pairs import four_instructions, pair_instructions
from tqai.backends.triton.polynomial import HALF_COEFFICIENTS, half_polynomial, level_polynomial
from tqai.backends.triton.slices import SLICES
from tqai.core.codec import CodecSpec, make_codec

__all__ = ["Tables", "padded", "precision", "tables"]


class Tables:
    """A codec's arrays on a device: `forward` is R transposed, `back` is R, both for row vectors.

    Attributes:
        polynomial: of the levels in float32 (`polynomial.level_polynomial`).
        half: of the levels over `unit`, the outermost, in float16; () for more than 4 bits and for 1.
        instructions: the same in PTX (`pairs`; 4 bits: all slices, else one each), or None where that is no
            NVIDIA GPU.
    """

    def __init__(self, spec: CodecSpec, device: torch.device) -> None:
        codec = make_codec(spec)
        matrix = torch.from_numpy(codec.rotation_matrix.copy()).float()
        self.forward, self.back = matrix.T.contiguous().to(device), matrix.to(device)
        arrays = codec.tables()
        self.centroids = torch.from_numpy(arrays["centroids"].copy()).to(device)
        self.boundaries = torch.from_numpy(arrays["boundaries"].copy()).to(device)
        self.polynomial = level_polynomial(arrays["centroids"])
        self.unit = float(arrays["centroids"][-1])
        self.half: tuple[float, ...] = ()
        self.instructions: tuple[str, ...] | None = None
        if spec.bits in HALF_COEFFICIENTS:
            self.half = half_polynomial(codec)
            if device.type == "cuda" and torch.version.cuda is not None and _pairs_wanted():
                if spec.bits == 4:
                    self.instructions = (four_instructions(self.half),)
                else:
                    self.instructions = pair_instructions(self.half, spec.bits, SLICES[spec.bits])


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
