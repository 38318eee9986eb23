"""Saved caches: the files of `docs/format.md`, read and written without torch.

A cache that one framework saved goes on in the other. mlx-lm's own `save_prompt_cache` works as well;
its files are for mlx-lm alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from os import PathLike
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from tqai.backends.base import ExactTokens
from tqai.backends.mlx.pages import PageParts, join_parts, split_pages
from tqai.cache.page_format import page_format_for
from tqai.config import CacheConfig
from tqai.core.codec import CodecSpec
from tqai.core.page import PAGE_TOKENS
from tqai.errors import (
    ConfigError,
    CorruptFileError,
    FileVersionError,
    ModelMismatchError,
    UnsupportedError,
)
from tqai.integrations.mlx_lm.caches import TurboQuantKVCache, TurboQuantRotatingKVCache
from tqai.integrations.mlx_lm.patching import CacheMaker
from tqai.integrations.mlx_lm.prompt_cache import PromptCache
from tqai.integrations.mlx_lm.settings import served
from tqai.integrations.mlx_lm.store import SLAB_PAGES, TokenStore

__all__ = ["load_cache", "save_cache"]

Array = Any

FORMAT_NAME = "tqai-cache"
VERSION = 4
"""Files with offsets or balanced keys are refused with the name of what this cache does not know."""
SETTINGS_OF_VERSION_1 = (
    *("bits_k", "bits_v", "sink_tokens", "residual_window", "cache_strategy", "codec", "rotation", "scale"),
    *("seed", "backend", "device", "check_finite"),
)
DTYPES = {
    "torch.uint8": mx.uint8,
    "torch.uint16": mx.uint16,
    "torch.float32": mx.float32,
    "torch.bfloat16": mx.bfloat16,
    "torch.float16": mx.float16,
}
"""Name in a checksum -> dtype; the format was first written from torch."""
SAMPLED_VALUES = 64


def save_cache(path: str | PathLike[str], cache: Sequence[Any], model: Any = None) -> None:
    """Write the caches of a model's layers to one file; an existing file is replaced only by a whole one.

    Args:
        cache: one `TurboQuantKVCache` or `TurboQuantRotatingKVCache` per layer.
        model: the model, if the file is to be refused for another one.

    Raises:
        UnsupportedError: a layer of another kind (a recurrent state) cannot be saved.
        OSError: the folder cannot be written. Nothing is left behind.
    """
    tensors: dict[str, Array] = {}
    layers = []
    for index, layer in enumerate(cache):
        if type(layer) not in (TurboQuantKVCache, TurboQuantRotatingKVCache):
            raise UnsupportedError(
                f"layer {index} is a {type(layer).__name__}, whose state is not saved: allowed are "
                "TurboQuantKVCache and TurboQuantRotatingKVCache (save_prompt_cache of mlx-lm takes others)"
            )
        held, about = _exported(layer.store)
        tensors.update({f"layers.{index}.{name}": array for name, array in held.items()})
        layers.append(about)
    config = cache[0].store.config.with_changes(backend=None)
    plain = CacheConfig().to_dict()
    settings = {
        name: value
        for name, value in config.to_dict().items()
        if name in SETTINGS_OF_VERSION_1 or value != plain[name]
    }
    made_for = None if model is None else {"config": None, "weights": None, "mlx": fingerprint(model)}
    header: dict[str, Any] = {"settings": settings, "layers": layers, "model": made_for}
    header |= {"format": FORMAT_NAME, "version": VERSION}
    header["sha256"] = {name: _digest(array) for name, array in tensors.items()}
    header["header_sha256"] = _header_digest(header)
    _write(Path(path), tensors, {"tqai": json.dumps(header, sort_keys=True)})


def load_cache(path: str | PathLike[str], model: Any = None) -> PromptCache:
    """Read a cache that `save_cache`, or `TurboQuantCache.save` with torch, wrote.

    Args:
        model: the model that goes on with it; patched (with any settings), attention is on the codes.

    Raises:
        FileNotFoundError: no such file.
        CorruptFileError: not a saved cache, truncated, or any bit altered.
        FileVersionError: written in a format version that this tqai does not read.
        ModelMismatchError: the file belongs to another model.
        UnsupportedError: it holds what the caches for mlx-lm do not serve.
    """
    tensors, header = _read(Path(path))
    try:
        config = served(CacheConfig.from_dict({"offsets": "off", **header["settings"]}))
        layers, made_for = header["layers"], header["model"]
    except (KeyError, TypeError, ConfigError) as error:
        raise CorruptFileError(
            f"{path}: the header is incomplete or holds an unknown setting: {error}"
        ) from error
    if any(name.endswith("_offsets") for name in tensors):
        raise UnsupportedError(f"{path} holds offsets, which the caches for mlx-lm do not serve yet")
    maker = None if model is None else vars(model).get("make_cache")
    modules = maker.modules if isinstance(maker, CacheMaker) and maker.on_codes else ()
    if model is not None:
        digest = (made_for or {}).get("mlx")
        if digest is not None and digest != fingerprint(model):
            raise ModelMismatchError(
                f"{path} belongs to another model: its weights differ from the one given"
            )
        expected = len(maker.plain() if isinstance(maker, CacheMaker) else model.layers)
        if expected != len(layers):
            raise ModelMismatchError(f"{path} has {len(layers)} layers, the model has {expected}")
    caches = PromptCache()
    for index, about in enumerate(layers):
        window = about["sliding_window"]
        cache = (
            TurboQuantKVCache(config, modules)
            if window is None
            else TurboQuantRotatingKVCache(window, 0, config, modules)
        )
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        cache.store = _imported(cache.store, own, about, index)
        caches.append(cache)
    return caches


def fingerprint(model: Any) -> str:
    """Digest of the names, shapes and dtypes of the model's parameters, and of a few values of some."""
    parameters = sorted(tree_flatten(model.parameters()))
    hasher = hashlib.sha256()
    for name, array in parameters:
        hasher.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
    for _, array in parameters[:3] + parameters[-3:]:
        sample = array.reshape(-1)[:SAMPLED_VALUES].astype(mx.float32)
        hasher.update(np.array(sample).tobytes())
    return hasher.hexdigest()


def _exported(store: TokenStore) -> tuple[dict[str, Array], dict[str, Any]]:
    about: dict[str, Any] = {"length": store.seen[0], "sliding_window": store.sliding_window}
    if store.window is None or store.page_format is None:
        return {}, {**about, "empty": True}
    if not store.columns(0).uniform:
        raise UnsupportedError("sequences of different lengths: extract them and save them one by one")
    page_format = store.page_format
    about["empty"] = False
    about["key_codec"], about["value_codec"] = (
        _written(page_format.key.spec),
        _written(page_format.value.spec),
    )
    tensors: dict[str, Array] = {}
    if store.slabs:
        # [batch, kv_heads, pages, ...] in memory, [batch, pages, kv_heads, ...] in the file
        parts = split_pages(mx.concatenate(store.slabs, axis=2), page_format)
        for name, codes, scales in (
            ("key", parts.key_codes, parts.key_scales),
            ("value", parts.value_codes, parts.value_scales),
        ):
            tensors[f"{name}_codes"] = codes.swapaxes(1, 2)
            tensors[f"{name}_scales"] = scales.view(mx.uint16).swapaxes(1, 2)
    tensors["window_keys"], tensors["window_values"] = store.window
    if store.sinks is not None:
        tensors["sink_keys"], tensors["sink_values"] = store.sinks
    return {name: mx.contiguous(array) for name, array in tensors.items()}, about


def _imported(
    store: TokenStore, tensors: Mapping[str, Array], about: Mapping[str, Any], index: int
) -> TokenStore:
    """`store` filled with what the file holds of layer `index`."""
    if about["empty"]:
        return store
    try:
        window = ExactTokens(tensors["window_keys"], tensors["window_values"])
        page_format = page_format_for(store.config, window.keys.shape[3], window.values.shape[3])
        for name, codec in (("key", page_format.key), ("value", page_format.value)):
            if _written(codec.spec) != about[f"{name}_codec"]:
                raise ModelMismatchError(
                    f"layer {index} was saved with {about[f'{name}_codec']}, "
                    f"this configuration makes {_written(codec.spec)}"
                )
        batch, length = window.keys.shape[0], int(about["length"])
        out = TokenStore(store.config, store.sliding_window, batch)
        out.page_format, out.window = page_format, window
        pages = 0
        if "key_codes" in tensors:
            parts = PageParts(
                *(
                    tensors[f"{name}_{kind}"].swapaxes(1, 2)
                    for name in ("key", "value")
                    for kind in ("codes", "scales")
                )
            )
            raw = join_parts(
                parts._replace(
                    key_scales=mx.contiguous(parts.key_scales), value_scales=mx.contiguous(parts.value_scales)
                )
            )
            pages = raw.shape[2]
            step = SLAB_PAGES if store.sliding_window is None else pages
            out.slabs = [mx.contiguous(raw[:, :, at : at + step]) for at in range(0, pages, step)]
            if raw.shape[3] != page_format.page_bytes:
                raise ValueError(f"pages of {raw.shape[3]} bytes are not of {page_format.page_bytes}")
        sinks = 0
        if "sink_keys" in tensors:
            out.sinks = ExactTokens(tensors["sink_keys"], tensors["sink_values"])
            sinks = out.sinks.keys.shape[2]
        dropped, left = divmod(length - sinks - pages * PAGE_TOKENS - window.keys.shape[2], PAGE_TOKENS)
    except (KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, ModelMismatchError):
            raise
        raise CorruptFileError(f"layer {index} of the file does not fit together: {error}") from error
    if dropped < 0 or left or (dropped and store.sliding_window is None):
        raise CorruptFileError(f"layer {index} of the file holds {pages} pages but claims {length} tokens")
    numbers = {"seen": length, "counts": pages, "first_pages": dropped, "sink_counts": sinks}
    for name, number in {**numbers, "window_counts": window.keys.shape[2]}.items():
        setattr(out, name, [number] * batch)
    return out


def _written(spec: CodecSpec) -> dict[str, Any]:
    """A spec as files hold it: fields that were added later only where they are not at their default."""
    later = {field.name: field.default for field in fields(CodecSpec)[6:]}
    return {name: value for name, value in asdict(spec).items() if later.get(name, object()) != value}


def _write(path: Path, tensors: Mapping[str, Array], metadata: dict[str, str]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".safetensors")
    os.close(handle)
    try:
        mx.save_safetensors(temporary, dict(tensors), metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no saved cache at {path}")
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        tensors, metadata = loaded
        header = json.loads(metadata["tqai"])
        version, checksums, claimed = header["version"], header["sha256"], header.pop("header_sha256")
        if header["format"] != FORMAT_NAME:
            raise KeyError("format")
        mx.eval(tensors)
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CorruptFileError(f"{path} is no saved cache, or is truncated: {error}") from error
    if isinstance(version, bool) or version != VERSION:
        raise FileVersionError(f"{path} has format version {version!r}: allowed is {VERSION}")
    if claimed != _header_digest(header):
        raise CorruptFileError(f"{path}: the header does not match its checksum")
    if set(checksums) != set(tensors):
        raise CorruptFileError(f"{path}: tensors are missing or were added")
    for name, array in tensors.items():
        if _digest(array) != checksums[name]:
            raise CorruptFileError(f"{path}: tensor {name} does not match its checksum")
    return tensors, header


def _digest(array: Array) -> str:
    name = next((name for name, dtype in DTYPES.items() if dtype == array.dtype), str(array.dtype))
    hasher = hashlib.sha256(f"{name} {list(array.shape)} ".encode())
    if array.size:
        hasher.update(np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).data)
    return hasher.hexdigest()


def _header_digest(header: Mapping[str, Any]) -> str:
    covered = {name: value for name, value in header.items() if name != "header_sha256"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()
