"""Training batches: ordinary text, and retrieval documents built from it.

Ordinary rows are cut at random places from the token ids of the corpus, on the
device.  Retrieval rows are built by worker processes: each row is filled with one or
more documents in which facts (``The secret code for NAME is 6 digits.``) stand at
random line breaks, and which end with many questions and answers about them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from tqai.demo.retrieval import CODE_DIGITS, fact, question, random_name

MAX_FACTS = 48
DOC_TOKENS_PER_FACT = 100  # a document asks at most one question per this many tokens


class RetrievalRows(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless (ids, weights) pairs, int64 and float32, [tokens + 1] each.

    A code's digits have weight 0 where the fact stands (they cannot be predicted) and
    ``answer_weight`` where the question asks for them; all else has weight 1.
    """

    def __init__(
        self, data: Path, tokenizer: Path, tokens: int, full: float, answer_weight: float, seed: int
    ) -> None:
        self.data, self.tokenizer_path = data, tokenizer
        self.tokens, self.full = tokens, full
        self.answer_weight, self.seed = answer_weight, seed

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(texts)]

    def document(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        """One retrieval document of ``length`` tokens."""
        most = max(2, min(MAX_FACTS, length // DOC_TOKENS_PER_FACT))
        n = rng.randint(1, most) if rng.random() < 0.5 else most
        names = list({random_name(rng) for _ in range(n + rng.randint(1, 4))})
        codes = ["".join(rng.choices("0123456789", k=CODE_DIGITS)) for _ in names]
        facts = self._encode([fact(a, c) + "\n" for a, c in zip(names, codes, strict=True)])
        order = rng.sample(range(len(names)), min(n, len(names)))
        asked = self._encode([f"{question(names[i])} {codes[i]}." for i in order])
        room = length - sum(map(len, facts)) - sum(map(len, asked)) - 1
        if room < 8:
            facts, asked, room = facts[:2], [], length - sum(map(len, facts[:2])) - 1
        at = rng.randrange(len(self.ids) - room - 1)
        filler = np.asarray(self.ids[at : at + room]).astype(np.int64)
        breaks = np.flatnonzero(filler == self.newline) + 1
        if len(breaks) == 0:
            breaks = np.arange(len(filler))
        places = sorted(int(breaks[np.abs(breaks - rng.random() * room).argmin()]) for _ in facts)
        ids, weights, last = [self.bos], [1.0], 0
        for place, line in zip(places, facts, strict=True):
            ids += filler[last:place].tolist()
            ids += line
            weights += [1.0] * (place - last)
            weights += [1.0] * (len(line) - CODE_DIGITS - 2) + [0.0] * CODE_DIGITS + [1.0] * 2
            last = place
        ids += filler[last:].tolist()
        weights += [1.0] * (len(filler) - last)
        for line in asked:
            ids += line
            weights += [1.0] * (len(line) - CODE_DIGITS - 1) + [self.answer_weight] * CODE_DIGITS + [1.0]
        return ids, weights

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}-{self.tokens}-{info.id if info else 0}")
        tok = PreTrainedTokenizerFast.from_pretrained(self.tokenizer_path)
        self.backend, self.bos = tok.backend_tokenizer, tok.bos_token_id
        self.newline = tok.convert_tokens_to_ids("\u010a")  # byte-level BPE's line feed
        self.ids = np.memmap(self.data / "train.bin", dtype="<u2", mode="r")
        while True:
            ids: list[int] = []
            weights: list[float] = []
            while len(ids) < self.tokens + 1:
                left = self.tokens + 1 - len(ids)
                length = self.tokens + 1
                if rng.random() >= self.full:
                    length = int(256 * (length / 256) ** rng.random())
                if left - length < 256:
                    length = left
                a, b = self.document(rng, length)
                ids += a
                weights += b
            yield torch.tensor(ids[: self.tokens + 1]), torch.tensor(weights[: self.tokens + 1])


class TextRows:
    """Random rows of ordinary text, cut on the device."""

    def __init__(self, path: Path, device: torch.device) -> None:
        ids = np.fromfile(path, dtype="<u2").astype(np.int16)
        self.ids = torch.from_numpy(ids).to(device)  # the vocabulary is far below 2**15

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, n: int, tokens: int) -> Tensor:
        """``n`` rows of ``tokens + 1`` ids, int64."""
        device = self.ids.device
        start = torch.randint(len(self.ids) - tokens - 1, (n, 1), device=device)
        return self.ids[start + torch.arange(tokens + 1, device=device)].long()
