"""`PrefixCache`: complete chunks of pages, found by the hash of all tokens up to their end.

Pages never change once they are written, so sharing needs no copies. A chunk's numbers depend on the
tokens before it alone, because prefill always cuts prompts at the same places: a request that finds a
prefix computes the rest from exactly the state that it would have computed itself. Pages that decoding
wrote are not shared: one token at a time rounds differently from a chunk.

Chunk i ends before token S + W + (i + 1) chunk_tokens, with S sinks and a window of W tokens. Where pages
alone are not the state at that place (`snapshots`), a request goes on from the last of its chunks of which
the state was kept. It is kept at the end of a prompt's last whole chunk, where a prompt begins to differ
from those before it, and everywhere if that takes little.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import numpy as np

from tqai.server.engine.pages import PagePool
from tqai.server.engine.snapshots import Snapshot

__all__ = ["Chunk", "Found", "PrefixCache"]


@dataclass
class Chunk:
    """A complete chunk of one prompt.

    Attributes:
        key: hash of its tokens and all before them.
        pages: its pages in the layers that see everything.
        snapshot: the state after it, or None.
    """

    key: bytes
    pages: list[int]
    snapshot: Snapshot | None = None


@dataclass(frozen=True)
class Found:
    """The longest known prefix from which a request can go on.

    Attributes:
        chunks: how many; 0 where nothing was found.
        known: chunks that are known, though their state may not be.
        pages: of the layers that see everything, held once more.
        snapshot: the state after them, its pages held once more.
    """

    chunks: int = 0
    known: int = 0
    pages: list[int] = field(default_factory=list)
    snapshot: Snapshot | None = None


class PrefixCache:
    """See the module's text. `first` tokens come before the first chunk (sinks and window). The first of
    `pools` is that of the layers that see everything, where `shares_pages` says that there are any."""

    def __init__(
        self,
        pools: list[PagePool],
        first: int,
        chunk_tokens: int,
        settings: str,
        needs_state: bool = False,
        shares_pages: bool = True,
    ) -> None:
        self.pools, self.first, self.chunk_tokens = pools, first, chunk_tokens
        self.needs_state, self.shares_pages = needs_state, shares_pages
        self._root = hashlib.sha256(settings.encode()).digest()
        self._entries: OrderedDict[bytes, Chunk] = OrderedDict()
        self._holds: list[Counter[int]] = [Counter() for _ in pools]

    @property
    def pages(self) -> int:
        """Pages that the cache holds in the first pool. May be asked for from any thread."""
        return len(self._holds[0])

    def evictable(self, pool: int = 0) -> int:
        """Pages that only the cache holds."""
        references = self.pools[pool].references
        return sum(references[page] == count for page, count in list(self._holds[pool].items()))

    def find(self, tokens: list[int]) -> Found:
        """The longest known prefix of `tokens`, its pages held once more for the caller. At least one
        token is always left to compute."""
        found: list[bytes] = []
        for key in self.keys(tokens, len(tokens) - 1):
            if key not in self._entries:
                break
            found.append(key)
        # the root last, so that it is the newest: a chunk is evicted before those that it builds on
        for key in reversed(found):
            self._entries.move_to_end(key)
        known, snapshot = len(found), None
        while found and self.needs_state:
            snapshot = self._entries[found[-1]].snapshot
            if snapshot is not None:
                break
            found.pop()
        pages = [page for key in found for page in self._entries[key].pages]
        self.pools[0].hold(pages)
        if snapshot is not None:
            for number, pool in enumerate(self.pools):
                pool.hold(snapshot.pages(number))
        return Found(len(found), known, pages, snapshot)

    def add(self, chunks: list[Chunk]) -> None:
        """Remember the chunks of one prompt, from its first on, held once more; their snapshots' pages are
        the cache's from now on, or given back."""
        for chunk in chunks:
            entry = self._entries.get(chunk.key)
            if entry is None:
                entry = self._entries[chunk.key] = Chunk(chunk.key, chunk.pages)
                self.pools[0].hold(chunk.pages)
                self._holds[0].update(chunk.pages)
            if chunk.snapshot is not None and entry.snapshot is None:
                entry.snapshot, chunk.snapshot = chunk.snapshot, None
                for number, holds in enumerate(self._holds):
                    holds.update(entry.snapshot.pages(number))
        for chunk in reversed(chunks):
            self._entries.move_to_end(chunk.key)

    def evict(self, wanted: int, pool: int = 0) -> int:
        """Give up chunks that no request uses, least recently used first, until `wanted` pages of a pool
        are freed or there are no more; of chunks that are in use, the state. Returns how many were freed:
        with `evictable` of them at most, all of those."""
        before = self.pools[pool].free
        for key in list(self._entries):
            if self.pools[pool].free - before >= wanted:
                break
            references, entry = self.pools[0].references, self._entries[key]
            self._drop_snapshot(entry)
            if all(references[page] == self._holds[0][page] for page in entry.pages):
                self._release(0, entry.pages)
                del self._entries[key]
        return self.pools[pool].free - before

    def clear(self) -> None:
        """Forget everything."""
        for entry in self._entries.values():
            self._drop_snapshot(entry)
            self._release(0, entry.pages)
        self._entries.clear()

    def _drop_snapshot(self, entry: Chunk) -> None:
        if entry.snapshot is not None:
            for number in range(len(self.pools)):
                self._release(number, entry.snapshot.pages(number))
            entry.snapshot = None

    def _release(self, pool: int, pages: list[int]) -> None:
        self.pools[pool].release(pages)
        self._holds[pool].subtract(pages)
        for page in pages:
            if not self._holds[pool][page]:
                del self._holds[pool][page]

    def keys(self, tokens: list[int], limit: int) -> list[bytes]:
        """One key per complete chunk within the first `limit` tokens; each covers all tokens before."""
        count = max(limit - self.first, 0) // self.chunk_tokens
        octets = np.asarray(tokens[: self.first + count * self.chunk_tokens], dtype="<i8").tobytes()
        keys, digest, start = [], self._root, 0
        for index in range(count):
            stop = 8 * (self.first + (index + 1) * self.chunk_tokens)
            digest = hashlib.sha256(digest + octets[start:stop]).digest()
            keys.append(digest)
            start = stop
        return keys
