"""`compute_memory_bytes`: what quantized vectors take, as tqai holds them."""

from __future__ import annotations

from operator import index

from tqai.config import MAX_BITS
from tqai.core.codec import SCALE_BYTES
from tqai.core.packing import packed_bytes
from tqai.core.qjl_codec import NORM_BYTES
from tqai.errors import ConfigError

__all__ = ["compute_memory_bytes"]

FLOAT16_BITS = 16


def compute_memory_bytes(
    dim: int, bits: int, n_vectors: int, two_stage: bool = False
) -> dict[str, int | float]:
    """Bytes of `n_vectors` vectors of `dim` coordinates with `bits` bits each, counted as they are held:
    rows padded to whole bytes, 16-bit norms.

    Args:
        dim, n_vectors: at least 1.
        bits: 1 to 8; with `two_stage` one of them is the sign of a sketch (`TurboQuantIP`, codec "qjl").
        two_stage: whether there is such a sketch, of `dim` bits, with a norm of its own.

    Returns:
        index_bytes, norm_bytes, total_bytes, bits_per_element, compression_ratio (of float16), and with
        `two_stage` qjl_bytes and residual_norm_bytes.

    Raises:
        ConfigError: a number out of range.
    """
    for name, value, high in (("dim", dim, None), ("bits", bits, MAX_BITS), ("n_vectors", n_vectors, None)):
        whole = hasattr(value, "__index__") and not isinstance(value, bool)
        if not whole or value < 1 or (high is not None and value > high):
            allowed = "from 1" if high is None else f"from 1 to {high}"
            raise ConfigError(f"{name}={value!r}: allowed are whole numbers {allowed}")
    count, code_bits = index(n_vectors), bits - 1 if two_stage else bits
    parts = {"index_bytes": count * packed_bytes(dim, code_bits), "norm_bytes": count * SCALE_BYTES}
    if two_stage:
        parts |= {"qjl_bytes": count * packed_bytes(dim, 1), "residual_norm_bytes": count * NORM_BYTES}
    total = sum(parts.values())
    per_element = 8.0 * total / (count * dim)
    return {
        **parts,
        "total_bytes": total,
        "bits_per_element": per_element,
        "compression_ratio": FLOAT16_BITS / per_element,
    }
