"""The codec "qjl" of `core.qjl_codec` on one torch device, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from tqai.backends.torch_ops.codes import TorchCodec, pack, unpack
from tqai.backends.torch_ops.rotated import BFLOAT16_MAX, unrotated
from tqai.core.codec import Codec
from tqai.core.qjl_codec import SketchedCodec

__all__ = ["TorchSketchedCodec"]


class TorchSketchedCodec:
    """Scalar codes with a 1-bit sketch of what they leave over; see `TorchForm`.

    Attributes:
        scalar: the first stage.
        sketch: float32 `[m, head_dim]`, the projections with the estimator's factor in them.
    """

    def __init__(self, codec: Codec, device: torch.device) -> None:
        assert isinstance(codec, SketchedCodec)
        self.head_dim = codec.spec.head_dim
        self.row_bytes = codec.row_bytes
        self.scalar = TorchCodec(codec.scalar, device)
        self.rotation = self.scalar.rotation
        self.sketch = torch.from_numpy(codec.tables()["sketch"]).to(device)
        self._signs_at, self._norm_at = codec.signs_at, codec.norm_at

    def lookup(self, codes: Tensor) -> Tensor:
        """See `TorchForm.lookup`."""
        signs = unpack(codes[..., self._signs_at : self._norm_at], 1, len(self.sketch))
        norms = codes[..., self._norm_at :].contiguous().view(torch.bfloat16).float()
        # bytes that nobody wrote must stay harmless where a mask hides them
        norms = torch.where(norms.isfinite(), norms, 0.0)
        left_over = norms * ((2 * signs - 1).float() @ self.sketch)
        return self.scalar.lookup(codes[..., : self._signs_at]) + left_over

    def encode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """See `TorchForm.encode`; special values as `core.qjl_codec` has them."""
        codes, scales = self.scalar.encode(vectors)
        scale = scales.double().unsqueeze(-1)
        usable = scale.isfinite() & (scale > 0)
        rotated = torch.where(usable, vectors.double() / torch.where(usable, scale, 1.0), 0.0).float()
        rotated = rotated @ self.rotation.T
        left_over = torch.where(usable, rotated - self.scalar.lookup(codes), 0.0)
        signs = torch.where(usable, (left_over @ self.sketch.T >= 0), False)
        norms = torch.linalg.vector_norm(left_over, dim=-1, keepdim=True).clamp(max=BFLOAT16_MAX)
        octets = norms.to(torch.bfloat16).view(torch.uint8)
        return torch.cat([codes, pack(signs, 1), octets], -1), scales

    def decode(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """See `TorchForm.decode`."""
        return unrotated(self.lookup(codes), scales, self.rotation, dtype)
