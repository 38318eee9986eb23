"""The backend in Triton: portable kernels for NVIDIA and AMD GPUs, any code width."""

from tqai.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
