"""`TurboQuantProd`: unbiased inner products from packed codes and a 1-bit sketch of the residual."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tqai.config import MAX_BITS
from tqai.core.codec import CodecSpec
from tqai.core.packing import pack, packed_bytes, unpack
from tqai.core.qjl import SignSketch, Sketched
from tqai.core.scalar import Quantized, ScalarCodec
from tqai.errors import ConfigError, InputError
from tqai.quantizers.frames import Array, Frame, as_real, check_codes, to_host

__all__ = ["ProdQuantized", "TurboQuantIP", "TurboQuantProd"]


class ProdQuantized(NamedTuple):
    """`codes` uint8 `[..., ceil(dim * (bits - 1) / 8)]` packed, `norms` `[...]`, `signs` uint8
    `[..., ceil(dim / 8)]` packed, `residual_norms` `[...]`; norms as in `MSEQuantized`."""

    codes: Array
    norms: Array
    signs: Array
    residual_norms: Array


class TurboQuantProd:
    """Quantizer of unbiased inner products (TurboQuant, arXiv 2504.19874, algorithm 2).

    `bits` - 1 bits by `TurboQuantMSE`, and one bit per coordinate that sketches the residual (`core.qjl`);
    with bits=1 the sketch alone. For every y, <y, dequantize(quantize(x))> is <y, x> on average over seeds.
    Expected squared error of it, for unit vectors, times dim: pi/2 times the squared error of the MSE
    part, that is 1.57, 0.567, 0.181, 0.0528 with 1 to 4 bits at dim=128; sketch="orthogonal" brings the
    factor pi/2 down to about 0.57.

    Args:
        dim, device, seed, rotation, scale: as for `TurboQuantMSE`.
        bits: bits per coordinate in all, 1 to 8.
        sketch: "gaussian" as in the paper, or "orthogonal".

    Raises:
        ConfigError: one of these out of range.
    """

    def __init__(
        self,
        dim: int,
        bits: int = 3,
        device: str | None = None,
        seed: int = 0,
        rotation: str = "auto",
        scale: str = "least_squares",
        sketch: str = "gaussian",
    ) -> None:
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
            raise ConfigError(f"bits={bits!r}: allowed are whole numbers from 1 to {MAX_BITS}")
        self.dim = dim
        self.bits = bits
        self.device = device
        # At bits=1 there is no first stage, but its settings are validated all the same.
        codec = ScalarCodec(CodecSpec("scalar", dim, max(bits - 1, 1), rotation, scale, seed))
        self.codec = codec if bits > 1 else None
        self.sketch = SignSketch(dim, seed, kind=sketch)

    def quantize(self, vectors: Array) -> ProdQuantized:
        """Codes, norms and sketch of `vectors` `[..., dim]` of a float dtype; the leading axes are free.

        Raises:
            InputError: another dtype or last axis.
        """
        frame = Frame(vectors, self.dim, self.device)
        parts = [self._quantize(block, frame.real) for block in frame.blocks()]
        code_bytes = packed_bytes(self.dim, self.bits - 1)
        return ProdQuantized(
            frame.stack([part.codes for part in parts], code_bytes),
            frame.stack([part.norms for part in parts]),
            frame.stack([part.signs for part in parts], self.sketch.row_bytes),
            frame.stack([part.residual_norms for part in parts]),
        )

    def dequantize(self, quantized: ProdQuantized | Array, *parts: Array) -> Array:
        """Vectors `[..., dim]` whose inner products are unbiased, in the dtype of the norms.

        Takes what `quantize` gave, whole or as its four parts.

        Their own squared error is larger than that of `TurboQuantMSE`: use that where it matters.

        Raises:
            InputError: parts whose shapes do not belong together.
        """
        if parts:
            if len(parts) != len(ProdQuantized._fields) - 1:
                raise InputError(f"{1 + len(parts)} arguments: {', '.join(ProdQuantized._fields)} are wanted")
            quantized = ProdQuantized(quantized, *parts)
        frame = Frame(quantized.norms, device=self.device)
        return frame.leave(as_real(self._dequantize(quantized), frame.real))

    def inner_product(self, y: Array, quantized: ProdQuantized) -> Array:
        """Unbiased estimates of <y, x>, `y` `[..., dim]` broadcast against the leading axes of `quantized`.

        The result has the kind of `y`, float64 for float64 y and float32 otherwise.

        Raises:
            InputError: a wrong last axis or dtype of y, or parts whose shapes do not belong together.
        """
        frame = Frame(y, self.dim, self.device)
        dots = np.einsum("...d,...d->...", frame.whole(), self._dequantize(quantized))
        return frame.leave(as_real(dots, frame.real))

    def _quantize(self, block: NDArray[np.float64], real: type[np.floating]) -> ProdQuantized:
        codes = np.zeros((len(block), 0), dtype=np.uint8)
        norms: NDArray[np.floating] = np.zeros(len(block), dtype=real)
        residual = block
        if self.codec is not None:
            indices, scales = self.codec.quantize(block)
            codes = pack(indices, self.bits - 1)
            norms = as_real(scales, real)
            # The residual of what will be read back, so that rounding the norm costs no bias.
            residual = block - self.codec.dequantize(Quantized(indices, norms.astype(np.float64)))
        signs, residual_norms = self.sketch.sketch(residual)
        return ProdQuantized(codes, norms, signs, as_real(residual_norms, real))

    def _dequantize(self, quantized: ProdQuantized) -> NDArray[np.float64]:
        codes, norms, signs, residual_norms = (to_host(part) for part in quantized)
        check_codes("codes", codes, (*norms.shape, packed_bytes(self.dim, self.bits - 1)))
        check_codes("signs", signs, (*norms.shape, self.sketch.row_bytes))
        if residual_norms.shape != norms.shape:
            raise InputError(
                f"norms have shape {list(norms.shape)}, residual_norms {list(residual_norms.shape)}"
            )
        out = self.sketch.estimate(Sketched(signs, residual_norms.astype(np.float64)))
        if self.codec is not None:
            indices = unpack(codes, self.bits - 1, self.dim)
            out += self.codec.dequantize(Quantized(indices, norms.astype(np.float64)))
        return out


TurboQuantIP = TurboQuantProd
