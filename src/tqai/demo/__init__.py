"""A small model inside the package, and a task that shows what a cache forgets.

The model has the Llama architecture (head size 128, grouped-query attention) and
was trained for retrieval: it reads a document in which lines such as ``The secret
code for Belmor Tazin is 482913.`` are hidden and gives the code back.  It needs no
download.  ``model/MODEL_CARD.md`` says what it was trained on.

Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqai.demo.retrieval import RetrievalPrompt, is_correct, make_prompt

if TYPE_CHECKING:
    import torch

__all__ = ["RetrievalPrompt", "is_correct", "load", "make_prompt", "model_path"]


def model_path() -> Path:
    """The folder of the demo model, in the layout that transformers loads."""
    return Path(__file__).resolve().parent / "model"


def load(dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """Load the demo model and its tokenizer from the package, without network access.

    Args:
        dtype: the weights' dtype; ``None`` means float32 on the CPU and the stored
            bfloat16 elsewhere.
        device: where the model goes.

    Returns:
        ``(model, tokenizer)``: a ``LlamaForCausalLM`` in eval mode and a
        ``PreTrainedTokenizerFast``.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    path = str(model_path())
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.to(where).eval(), tokenizer
