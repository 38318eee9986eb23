"""transformers: `patch`, `unpatch` and `TurboQuantCache`, through its public extension points only.

    cache.py      the cache object and its bookkeeping (memory, save, load)
    layers.py     our layers in place of transformers' dynamic ones
    handles.py    what `update` returns instead of tensors, so that nothing is decompressed
    attention.py  the registered attention and mask functions, which read the handles
    patching.py   patch and unpatch
    decode_graph.py  the decode step as one CUDA graph
    activations.py  hidden states, feed-forward inputs and logits rounded as they flow (a study)
    folding.py    the rotation of the values moved into a model's weights
    converted.py  the folder of a converted model
    saving.py     what a saved cache holds beside its layers

This package alone imports transformers.
"""

from tqai.integrations.transformers.cache import TurboQuantCache
from tqai.integrations.transformers.converted import convert
from tqai.integrations.transformers.patching import patch, unpatch

__all__ = ["TurboQuantCache", "convert", "patch", "unpatch"]
