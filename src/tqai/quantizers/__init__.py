"""Quantizers for vectors of any kind (keys, values, embeddings), on numpy arrays and torch tensors.

    TurboQuantMSE    least squared error: indices and a norm per vector
    TurboQuantProd   unbiased inner products: one bit less, plus a 1-bit sketch of what is left over
    PolarQuantizer   the very bytes that the KV cache stores

Results are of the kind of the input: numpy gives numpy, torch gives torch on the same device. The
arithmetic is that of `tqai.core`, float64 on the host, in blocks; torch is never imported here, only
recognised where the caller has imported it.

    >>> quantizer = TurboQuantMSE(dim=128, bits=4)
    >>> indices, norms = quantizer.quantize(vectors)            # vectors [..., 128]
    >>> approximations = quantizer.dequantize(indices, norms)
"""

from __future__ import annotations

from tqai.quantizers.memory import compute_memory_bytes
from tqai.quantizers.mse import MSEQuantized, TurboQuantMSE
from tqai.quantizers.polar import PolarQuantized, PolarQuantizer
from tqai.quantizers.prod import ProdQuantized, TurboQuantIP, TurboQuantProd

__all__ = [
    "MSEQuantized",
    "PolarQuantized",
    "PolarQuantizer",
    "ProdQuantized",
    "TurboQuantIP",
    "TurboQuantMSE",
    "TurboQuantProd",
    "compute_memory_bytes",
]
