"""mlx-lm: `patch`, `unpatch` and caches with the contract of mlx-lm's own.

    patching.py      patch and unpatch
    prompt_cache.py  the list of caches that patch returns
    compressed.py    what the four cache classes share
    caches.py        the caches of one sequence
    batch_caches.py  the caches of a batch
    store.py         the tokens of one layer, and what happens to them as they age
    combining.py     stores of several sequences put together
    step.py          what one attention step reads
    exact.py         exact tokens joined, cut out, filled up
    columns.py       which column of a step holds which token; masks
    handles.py       what `update_and_fetch` returns instead of arrays, so that nothing is decompressed
    attention.py     attention on handles, and its place in the model's modules
    settings.py      which settings of `CacheConfig` are served
    saving.py        files that torch and MLX both read
    serving.py       `python -m tqai.integrations.mlx_lm.serving`: mlx_lm.server with compressed caches

This package alone imports mlx_lm. It never imports torch.
"""

from tqai.integrations.mlx_lm.batch_caches import TurboQuantBatchKVCache, TurboQuantBatchRotatingKVCache
from tqai.integrations.mlx_lm.caches import TurboQuantKVCache, TurboQuantRotatingKVCache
from tqai.integrations.mlx_lm.patching import patch, unpatch
from tqai.integrations.mlx_lm.prompt_cache import PromptCache
from tqai.integrations.mlx_lm.saving import load_cache, save_cache

__all__ = [
    "PromptCache",
    "TurboQuantBatchKVCache",
    "TurboQuantBatchRotatingKVCache",
    "TurboQuantKVCache",
    "TurboQuantRotatingKVCache",
    "load_cache",
    "patch",
    "save_cache",
    "unpatch",
]
