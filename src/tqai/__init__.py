"""tqai compresses the KV cache of language models to a few bits per value and attends on the codes.

    import tqai
    cache = tqai.patch(model, bits_k=4, bits_v=2)
    model.generate(**inputs, past_key_values=cache)

Public names are loaded on first use: `import tqai` itself imports no numpy, torch, transformers or
mlx. `TurboQuantCache`, `patch` and `unpatch` need the extra `torch`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqai import errors
    from tqai.config import PRESETS, CacheConfig
    from tqai.errors import TqaiError
    from tqai.integrations.transformers import TurboQuantCache, patch, unpatch
    from tqai.quantizers import PolarQuantizer, TurboQuantIP, TurboQuantMSE, TurboQuantProd

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CacheConfig",
    "PolarQuantizer",
    "TqaiError",
    "TurboQuantCache",
    "TurboQuantIP",
    "TurboQuantMSE",
    "TurboQuantProd",
    "__version__",
    "errors",
    "patch",
    "unpatch",
]

_HOME = {
    "PRESETS": "tqai.config",
    "CacheConfig": "tqai.config",
    "PolarQuantizer": "tqai.quantizers",
    "TqaiError": "tqai.errors",
    "TurboQuantCache": "tqai.integrations.transformers",
    "TurboQuantIP": "tqai.quantizers",
    "TurboQuantMSE": "tqai.quantizers",
    "TurboQuantProd": "tqai.quantizers",
    "errors": "tqai",
    "patch": "tqai.integrations.transformers",
    "unpatch": "tqai.integrations.transformers",
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
