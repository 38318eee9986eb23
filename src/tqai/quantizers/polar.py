"""`PolarQuantizer`: the very bytes that the KV cache stores."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tqai.core.codec import CodecSpec, Encoded, make_codec
from tqai.errors import InputError
from tqai.quantizers.frames import Array, Frame, check_codes, to_host, to_kind_of, torch_of

__all__ = ["PolarQuantized", "PolarQuantizer"]


class PolarQuantized(NamedTuple):
    """`codes` uint8 `[..., ceil(dim * bits / 8)]` packed; `scales` `[...]`, bfloat16: the bits as uint16 in
    numpy, which has no such dtype, and dtype bfloat16 in torch."""

    codes: Array
    scales: Array


class PolarQuantizer:
    """The codec of the KV cache on its own: packed codes and one bfloat16 scale per vector.

    Arguments and errors as for `TurboQuantMSE`; the squared error too, but for the rounding of the scale,
    which adds about 1e-6 per unit vector. `codec` is the object that the cache works with.
    """

    def __init__(
        self,
        dim: int,
        bits: int = 3,
        device: str | None = None,
        seed: int = 0,
        rotation: str = "auto",
        scale: str = "least_squares",
    ) -> None:
        self.dim = dim
        self.bits = bits
        self.device = device
        self.codec = make_codec(CodecSpec("scalar", dim, bits, rotation, scale, seed))

    @property
    def bits_per_value(self) -> float:
        """Bits held per coordinate, scale included."""
        return self.codec.bits_per_value

    def quantize(self, vectors: Array) -> PolarQuantized:
        """Packed codes and scales of `vectors` `[..., dim]` of a float dtype; the leading axes are free.

        Raises:
            InputError: another dtype or last axis.
        """
        frame = Frame(vectors, self.dim, self.device)
        parts = [self.codec.encode(block) for block in frame.blocks()]
        scales = frame.stack([part.scales.view(np.int16) for part in parts])
        scales = scales.view(frame.torch.bfloat16) if frame.torch is not None else scales.view(np.uint16)
        return PolarQuantized(frame.stack([part.codes for part in parts], self.codec.row_bytes), scales)

    def dequantize(self, codes: Array, scales: Array) -> Array:
        """Approximations `[..., dim]`, float32, of what `quantize` gave.

        Raises:
            InputError: rows of another length, or scales that are not bfloat16 (uint16 in numpy).
        """
        torch = torch_of(codes)
        wanted = np.dtype(np.uint16) if torch is None else torch.bfloat16
        if getattr(scales, "dtype", None) != wanted:
            raise InputError(f"scales have dtype {getattr(scales, 'dtype', None)}: {wanted} is wanted")
        bits = scales if torch is None else to_host(scales.view(torch.int16)).view(np.uint16)
        packed = to_host(codes)
        check_codes("codes", packed, (*bits.shape, self.codec.row_bytes))
        return to_kind_of(codes, self.codec.decode(Encoded(packed, bits)), self.device)
