"""The backend on MLX: operations on MLX's arrays, and Metal kernels where there is Metal.

    codes.py      pack, unpack, look up, encode and decode vectors
    pages.py      page records
    attention.py  attention on codes in tiles, in MLX operations
    metal/        the Metal kernels, their launch, and the check at first use
    backend.py    the `Backend` contract

Pages are canonical. Arrays are mlx.core.array; torch is never imported.
"""

from tqai.backends.mlx.backend import MlxBackend

__all__ = ["MlxBackend"]
