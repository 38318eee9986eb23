"""tqai compresses the KV cache of language models to a few bits per value and attends on the codes.

    import tqai
    cache = tqai.patch(model, bits_k=4, bits_v=2)
    model.generate(**inputs, past_key_values=cache)

Public names are loaded on first use: `import tqai` itself imports no numpy, torch, transformers or
mlx. `TurboQuantCache` needs the extra `torch`; `patch` and `unpatch` need what the model needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqai import errors
    from tqai.activations import compress_activations
    from tqai.config import PRESETS, CacheConfig, TurboQuantConfig
    from tqai.core.solvers import CodebookRegistry, solve_codebook
    from tqai.errors import TqaiError
    from tqai.integrations.patching import patch, unpatch
    from tqai.integrations.transformers import TurboQuantCache, convert
    from tqai.quantizers import (
        PolarQuantizer,
        TurboQuantIP,
        TurboQuantMSE,
        TurboQuantProd,
        compute_memory_bytes,
    )

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CacheConfig",
    "CodebookRegistry",
    "PolarQuantizer",
    "TqaiError",
    "TurboQuantCache",
    "TurboQuantConfig",
    "TurboQuantIP",
    "TurboQuantMSE",
    "TurboQuantProd",
    "__version__",
    "compress_activations",
    "compute_memory_bytes",
    "convert",
    "errors",
    "patch",
    "solve_codebook",
    "unpatch",
]

_HOME = {
    "PRESETS": "tqai.config",
    "CacheConfig": "tqai.config",
    "CodebookRegistry": "tqai.core.solvers",
    "PolarQuantizer": "tqai.quantizers",
    "TqaiError": "tqai.errors",
    "TurboQuantCache": "tqai.integrations.transformers",
    "TurboQuantConfig": "tqai.config",
    "TurboQuantIP": "tqai.quantizers",
    "TurboQuantMSE": "tqai.quantizers",
    "TurboQuantProd": "tqai.quantizers",
    "compress_activations": "tqai.activations",
    "compute_memory_bytes": "tqai.quantizers",
    "convert": "tqai.integrations.transformers",
    "errors": "tqai",
    "patch": "tqai.integrations.patching",
    "solve_codebook": "tqai.core.solvers",
    "unpatch": "tqai.integrations.patching",
}
"""Public name -> the module that defines it; a module in `tqai` is its own definition."""


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'tqai' has no attribute {name!r}")
    if home == "tqai":
        return import_module(f"tqai.{name}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
