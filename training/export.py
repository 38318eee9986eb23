"""Write a trained model as a transformers folder and check it.

Usage::

    python training/export.py --checkpoint .train/run/checkpoint.pt --log .train/run/log.json \
        --tokenizer .train/tokenizer --out src/tqai/demo/model
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from model import LM, Shape
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TOLERANCE = 1e-3  # largest difference of a logit in fp32, relative to the largest logit


def reload(folder: Path, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The exported model as a function from ids [1, tokens] to logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    return lambda ids: model(ids, use_cache=False).logits


@torch.no_grad()
def export(net: LM, folder: Path, tokenizer: Path) -> dict[str, float]:
    """Save ``net`` in bf16 with its config and tokenizer; returns the check's figures.

    The check reloads the folder with transformers in fp32 and compares its logits
    with the trainer's model holding the same bf16 weights, in fp32 on the CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().bfloat16().contiguous() for k, v in net.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = net.shape.hf_config()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tok = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    tok.model_max_length = net.shape.max_positions
    tok.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("is_local", "local_files_only"):  # of this run, not of the tokenizer
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    own = LM(net.shape, torch.float32).eval()
    own.load_state_dict({k: v.float() for k, v in state.items()})
    ids = torch.randint(
        net.shape.vocab, (1, min(512, net.shape.max_positions)), generator=torch.Generator().manual_seed(0)
    )
    mine = own.logits(ids)
    theirs = reload(folder, torch.device("cpu"), torch.float32)(ids)
    error = ((mine - theirs).abs().max() / mine.abs().max()).item()
    if not error <= TOLERANCE:
        raise RuntimeError(f"exported logits differ by {error:.2e} of the largest")
    return {
        "relative_logit_difference": error,
        "weights_bytes": (folder / "model.safetensors").stat().st_size,
    }


def main() -> None:
    """Command line: see the module's docstring."""
    ap = argparse.ArgumentParser()
    ap.add_argument("--checkpoint", type=Path, required=True)
    ap.add_argument("--log", type=Path, required=True)
    ap.add_argument("--tokenizer", type=Path, default=Path(".train/tokenizer"))
    ap.add_argument("--out", type=Path, required=True)
    args = ap.parse_args()
    net = LM(Shape(**json.loads(args.log.read_text())["shape"]))
    net.load_state_dict(torch.load(args.checkpoint, map_location="cpu", weights_only=True))
    print(export(net, args.out, args.tokenizer))


if __name__ == "__main__":
    main()
