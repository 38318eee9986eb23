"""Activations of a torch model, rounded or packed.

blocks.py    the decoder layers, attention modules and feed-forward blocks of a transformers model
vectors.py   tensors of any shape as packed codes and scales, by blocks of a row
saved.py     `compress_activations`: what autograd saves for the backward pass, packed (saves memory)
rounding.py  hidden states and attention logits, rounded as they flow (a study; saves none)
"""

from tqai.activations.saved import CompressedActivations, compress_activations

__all__ = ["CompressedActivations", "compress_activations"]
