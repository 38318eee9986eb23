"""`held_bytes`: how many bytes a cache of any kind really holds, found by walking to its storages.

No cache is asked for its size. Every tensor reachable from the object is opened down to its storages
(a quantized tensor of optimum-quanto is a shell around packed codes, scales and shifts), each storage
is counted once and whole, so that buffers with room to spare and views into larger buffers count for
what they occupy. numpy arrays count likewise; of an array of MLX, which does not show its storage, its own
bytes.
"""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tqai.backends import BACKENDS, load
from tqai.core.codec import CodecSpec, make_codec
from tqai.errors import InputError, UnsupportedError

__all__ = ["bits_per_value", "held_bytes", "values_per_token"]

_OPAQUE = (
    torch.nn.Module,
    types.ModuleType,
    type,
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    torch.dtype,
    torch.device,
    np.dtype,
)


def held_bytes(cache: Any, constants: bool = False) -> int:
    """Bytes of all tensor storages and numpy buffers reachable from `cache`, each counted once.

    Followed are attributes, slots, containers, bound methods, partials and closures. Not followed are
    modules with weights (`torch.nn.Module`), classes, Python modules and transformers configurations:
    a cache may point at its model without owning it. Python objects themselves are not counted, nor
    is memory that only foreign code knows of (a pointer kept as a number).

    Args:
        cache: a cache of any kind, or any object.
        constants: count also the tables of the codecs and backends of this process, which all caches
            share: rotation matrices and codebooks. Only the registered objects themselves are left out
            without it; a copy of one counts.
    """
    from transformers import PretrainedConfig

    opaque = (*_OPAQUE, PretrainedConfig)
    storages: dict[tuple[str, int], int] = {}

    def count(place: tuple[str, int], size_bytes: int) -> None:
        storages[place] = max(size_bytes, storages.get(place, 0))

    seen: set[int] = set()
    # Keeps every visited object alive, so that no id can be used twice during the walk.
    alive: list[Any] = []
    pending: list[Any] = [cache]
    while pending:
        item = pending.pop()
        if isinstance(item, opaque) or id(item) in seen:
            continue
        if not constants and _is_constant(item):
            continue
        seen.add(id(item))
        alive.append(item)
        if isinstance(item, Tensor):
            inner = _inner_tensors(item)
            if inner:
                pending.extend(inner)
            else:
                storage = item.untyped_storage()
                count((str(item.device), storage.data_ptr()), storage.nbytes())
            continue
        if isinstance(item, torch.UntypedStorage):
            count((str(item.device), item.data_ptr()), item.nbytes())
            continue
        if isinstance(item, np.ndarray):
            owner = _numpy_owner(item)
            if isinstance(owner, np.ndarray):
                count(("cpu", owner.__array_interface__["data"][0]), owner.nbytes)
            else:
                pending.append(owner)
            continue
        if type(item).__module__ == "mlx.core" and type(item).__name__ == "array":
            count(("mlx", id(item)), item.nbytes)
            continue
        if isinstance(item, bytearray):
            count(("bytearray", id(item)), len(item))
            continue
        pending.extend(_children(item))
    return sum(storages.values())


def values_per_token(config: Any) -> int:
    """Numbers that one token leaves in the cache: keys and values of all layers and KV heads.

    Args:
        config: a transformers model configuration.

    Raises:
        UnsupportedError: some layers are not full attention, so that tokens do not all weigh the same.
    """
    text = config.get_text_config(decoder=True)
    other = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if other or getattr(text, "sliding_window", None):
        kinds = ", ".join(sorted(other)) or "sliding_attention"
        raise UnsupportedError(f"bits per value are defined for full attention only; this model has {kinds}")
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * text.num_hidden_layers * kv_heads * head_dim)


def bits_per_value(cache: Any, config: Any, tokens: int, batch: int = 1) -> float:
    """All-in bits per cached number: `8 * held_bytes / (2 * layers * kv_heads * head_dim * tokens)`.

    Codes, scales, exact windows, page tables, spare room: whatever the cache holds at this length.

    Args:
        cache: any cache, holding `tokens` tokens of `batch` sequences.
        config: configuration of the model that filled it.
        tokens: tokens per sequence, at least 1.
        batch: number of sequences, at least 1.

    Raises:
        InputError: `tokens` or `batch` below 1.
        UnsupportedError: see `values_per_token`.
    """
    if tokens < 1 or batch < 1:
        raise InputError(f"tokens={tokens}, batch={batch}: allowed are whole numbers from 1")
    return 8 * held_bytes(cache) / (values_per_token(config) * tokens * batch)


def _inner_tensors(tensor: Tensor) -> list[Any]:
    """What a wrapper subclass holds; empty for a tensor with a storage of its own."""
    if type(tensor) is Tensor or not hasattr(tensor, "__tensor_flatten__"):
        return []
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def _numpy_owner(array: np.ndarray[Any, Any]) -> Any:
    """The object whose memory `array` shows: an array that owns it, or a foreign owner (a tensor)."""
    owner: Any = array
    while isinstance(owner, np.ndarray) and not owner.flags.owndata and owner.base is not None:
        owner = owner.base
    return owner if isinstance(owner, np.ndarray | Tensor) else array


def _children(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return [*item.keys(), *item.values()]
    if isinstance(item, list | tuple | set | frozenset):
        return list(item)
    children: list[Any] = []
    if isinstance(item, types.MethodType):
        return [item.__self__, item.__func__]
    if isinstance(item, types.FunctionType):
        children = [cell.cell_contents for cell in item.__closure__ or () if _filled(cell)]
        return [*children, *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]
    for attribute in ("func", "args", "keywords"):  # functools.partial keeps these outside __dict__
        if type(item).__name__ == "partial":
            children.append(getattr(item, attribute))
    children.extend(vars(item).values() if hasattr(item, "__dict__") else ())
    for kind in type(item).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(item, name):
                children.append(getattr(item, name))
    if hasattr(item, "__iter__") and type(item).__module__ == "collections":  # deque, OrderedDict
        children.extend(item.values() if hasattr(item, "values") else item)
    return children


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True


def _is_constant(item: Any) -> bool:
    """Whether `item` is the one codec of its spec, or the one backend of its name, in this process."""
    module = type(item).__module__
    if module.startswith("tqai.core."):
        spec = getattr(item, "spec", None)
        if not isinstance(spec, CodecSpec):
            return False
        # It is registered under the spec that was asked for, and names the rotation that "auto" became.
        return any(make_codec(replace(spec, rotation=asked)) is item for asked in (spec.rotation, "auto"))
    if module.startswith("tqai.backends."):
        name = getattr(item, "name", None)
        return isinstance(name, str) and name in BACKENDS and load(name) is item
    return False
