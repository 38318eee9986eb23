"""The backend in plain torch operations: any device, every codec width, no compilation."""

from tqai.backends.torch_ops.backend import TorchBackend

__all__ = ["TorchBackend"]
