"""`compress_activations`: what autograd keeps for the backward pass of a model's layers, as packed codes.

Training keeps the inputs of almost every operation until the backward pass needs them. Here they are
packed as they are saved (`torch.autograd.graph.saved_tensors_hooks`) and unpacked, one at a time, when
they are read. The forward pass is untouched to the last bit; gradients carry the rounding.

Kept exact: parameters, buffers, and whatever a layer is given without gradients (masks, positions); what
is not a float; small tensors; everything outside the layers (embedding, logits, loss). A tensor that
several operations save is packed once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from tqai.activations.blocks import decoder_layers
from tqai.activations.vectors import PackedTensor, pack_tensor
from tqai.config import MAX_BITS
from tqai.errors import ConfigError

__all__ = ["CompressedActivations", "compress_activations"]

SMALLEST_VALUES = 1024
LARGEST_VALUE = 1e15
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
VIEWS_TO_A_LEAF = 4
VIEWS = ("TBackward", "TransposeBackward", "PermuteBackward", "ViewBackward", "UnsafeViewBackward")
COPIES = ("ToCopyBackward", "ReshapeAliasBackward")


def compress_activations(
    model: nn.Module, bits: int = 8, layers: Iterable[nn.Module] | None = None
) -> CompressedActivations:
    """Pack what the backward pass of `model` needs. For fine-tuning; inference saves nothing anyway.

        with tqai.compress_activations(model, bits=8):
            loss = model(**batch, labels=batch["input_ids"]).loss
            loss.backward()

    Args:
        model: a torch model; of a transformers model the decoder layers are covered.
        bits: bits per saved number, 1 to 8. 8 follows plain training, 4 and less do not.
        layers: the modules to cover instead, none of them inside another.

    Returns:
        The attached compression: a context manager, with `detach()` and `attach()`.

    Raises:
        ConfigError: bits out of range.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"bits={bits!r}: allowed are whole numbers from 1 to {MAX_BITS}")
    chosen = list(layers) if layers is not None else decoder_layers(model) or [model]
    return CompressedActivations(chosen, bits).attach()


class CompressedActivations:
    """Saved tensors of some modules, packed. Made by `compress_activations`.

    Attributes:
        bits: bits per saved number.
        saved_bytes: what the packed tensors alive now would take unpacked (each counted once).
        held_bytes: what they take.
    """

    def __init__(self, layers: list[nn.Module], bits: int) -> None:
        self.bits = bits
        self.saved_bytes = 0
        self.held_bytes = 0
        self._layers = layers
        self._handles: list[Any] = []
        self._open: list[saved_tensors_hooks] = []
        self._exact: list[set[int]] = []
        self._packed: dict[tuple[Any, ...], tuple[StorageWeakRef, weakref.ref[PackedTensor]]] = {}

    def attach(self) -> CompressedActivations:
        """Pack from the next forward pass on. Harmless when repeated."""
        if not self._handles:
            for layer in self._layers:
                self._handles.append(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
                self._handles.append(layer.register_forward_hook(self._leave, always_call=True))
        return self

    def detach(self) -> None:
        """Save tensors as torch does again. What is packed stays readable for its backward pass."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> CompressedActivations:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*_tensors(args), *_tensors(kwargs)]
        exact = [*layer.parameters(), *layer.buffers(), *(part for part in given if not part.requires_grad)]
        self._exact.append({part.untyped_storage().data_ptr() for part in exact})
        hooks = saved_tensors_hooks(self._pack, _unpack)
        hooks.__enter__()
        self._open.append(hooks)

    def _leave(self, *_: object) -> None:
        if self._open:
            self._open.pop().__exit__()
            self._exact.pop()

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.dtype not in FLOATS or tensor.numel() < SMALLEST_VALUES or tensor.layout != torch.strided:
            return tensor
        held = tensor.untyped_storage()
        if held.data_ptr() in self._exact[-1] or _comes_from_a_leaf(tensor) or held.nbytes() < tensor.nbytes:
            return tensor  # (expanded views take less than they look)
        dense = tensor.is_contiguous()
        view = (tensor.storage_offset(), tensor.numel(), tensor.dtype, tensor._version)
        layout = None if dense else (tuple(tensor.shape), tensor.stride())
        storage = StorageWeakRef(held)
        key = (storage.cdata, *view, layout, tensor.shape[-1])
        known = self._packed.get(key)
        if known is not None:
            packed = known[1]()
            if packed is not None:
                return _Saved(packed, tensor)
        if not bool(tensor.abs().amax() < LARGEST_VALUE):  # NaN and inf fail it too, and stay what they are
            return tensor
        packed = pack_tensor(tensor, self.bits)
        if packed.held_bytes >= tensor.nbytes:
            return tensor
        self._count(key, storage, packed, tensor.nbytes)
        return _Saved(packed, tensor)

    def _count(
        self, key: tuple[Any, ...], storage: StorageWeakRef, packed: PackedTensor, size_bytes: int
    ) -> None:
        held_bytes = packed.held_bytes
        self.saved_bytes += size_bytes
        self.held_bytes += held_bytes
        reference = weakref.ref(packed)
        # The weak reference to the storage keeps its address from being used again while the entry lives.
        self._packed[key] = (storage, reference)

        def forget() -> None:
            self.saved_bytes -= size_bytes
            self.held_bytes -= held_bytes
            if self._packed.get(key, (None, None))[1] is reference:
                del self._packed[key]

        weakref.finalize(packed, forget).atexit = False


class _Saved:
    """What stands in the graph for a tensor: its codes, and the view of them that was saved."""

    def __init__(self, packed: PackedTensor, tensor: Tensor) -> None:
        self.packed = packed
        self.shape = tensor.shape

    def tensor(self) -> Tensor:
        return self.packed.unpack().reshape(self.shape)


def _unpack(saved: Any) -> Tensor:
    out: Tensor = saved.tensor() if isinstance(saved, _Saved) else saved
    return out


def _comes_from_a_leaf(tensor: Tensor) -> bool:
    """Whether it is a view or a copy in another dtype (autocast) of a parameter."""
    node: Any = tensor.grad_fn
    for _ in range(VIEWS_TO_A_LEAF):
        if node is None:
            return False
        if type(node).__name__ == "AccumulateGrad":
            return True
        inputs = [source for source, _ in node.next_functions if source is not None]
        if len(inputs) != 1 or not type(node).__name__.startswith((*VIEWS, *COPIES)):
            return False
        node = inputs[0]
    return False


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
