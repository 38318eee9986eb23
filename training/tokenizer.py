"""Train the byte-level BPE tokenizer and turn the corpus into token ids.

The tokenizer is saved as a ``PreTrainedTokenizerFast`` folder.  Digits are split
one by one, so an n-digit number is always n tokens.  The corpus is written as
``train.bin`` and ``heldout.bin``: flat little-endian uint16 ids, every document
preceded by the ``<s>`` token.

Usage::

    python training/tokenizer.py --data .train --out .train/tokenizer --vocab 4096
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
# Words with the space before them, single digits, runs of punctuation, runs of white space.
PATTERN = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def read_texts(path: Path) -> list[str]:
    """The texts of one ``.jsonl`` file of the corpus."""
    with open(path) as f:
        return [json.loads(line)["text"] for line in f]


def sample(texts: list[str], n_bytes: int, seed: int = 0) -> Iterator[str]:
    """Random documents, each cut to 20,000 characters, ``n_bytes`` in all."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    for i in order:
        if n_bytes <= 0:
            return
        text = texts[i][:20_000]
        n_bytes -= len(text)
        yield text


def train_tokenizer(texts: list[str], vocab: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``vocab`` entries, the three special tokens included."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, PAD],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
    )
    tok.train_from_iterator(sample(texts, 24_000_000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode(tok: PreTrainedTokenizerFast, texts: list[str], path: Path) -> int:
    """Write the ids of ``texts`` to ``path``; returns how many."""
    total, batch = 0, 256
    with open(path, "wb") as f:
        for i in range(0, len(texts), batch):
            for enc in tok.backend_tokenizer.encode_batch_fast(texts[i : i + batch]):
                ids = np.asarray([tok.bos_token_id, *enc.ids], dtype="<u2")
                f.write(ids.tobytes())
                total += len(ids)
    return total


def main() -> None:
    """Command line: see the module's docstring."""
    ap = argparse.ArgumentParser()
    ap.add_argument("--data", type=Path, default=Path(".train"))
    ap.add_argument("--out", type=Path, default=Path(".train/tokenizer"))
    ap.add_argument("--vocab", type=int, default=4096)
    ap.add_argument("--max-length", type=int, default=9216)
    args = ap.parse_args()
    texts = read_texts(args.data / "train.jsonl")
    tok = train_tokenizer(texts, args.vocab, args.max_length)
    tok.save_pretrained(args.out)
    held = read_texts(args.data / "heldout.jsonl")
    sizes = {
        "train": encode(tok, texts, args.data / "train.bin"),
        "heldout": encode(tok, held, args.data / "heldout.bin"),
    }
    sizes["heldout_bytes"] = sum(len(t.encode()) for t in held)
    (args.data / "sizes.json").write_text(json.dumps(sizes) + "\n")
    print(sizes)


if __name__ == "__main__":
    main()
