"""The backend in CUDA C++ for NVIDIA GPUs: tensor cores on packed codes, compiled at first use."""

from tqai.backends.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
