"""`PrefixCache`: complete chunks of pages, found by the hash of all tokens up to their end.

Pages never change once they are written, so sharing needs no copies. A chunk's numbers depend on the
tokens before it alone, because prefill always cuts prompts at the same places: a request that finds a
prefix computes the rest from exactly the state that it would have computed itself. Pages that decoding
wrote are not shared: one token at a time rounds differently from a chunk.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from tqai.server.engine.pages import PagePool

__all__ = ["PrefixCache"]


@dataclass(frozen=True)
class _Entry:
    pages: list[int]


class PrefixCache:
    """See the module's text. `first` tokens come before the first chunk (sinks)."""

    def __init__(self, pool: PagePool, first: int, chunk_tokens: int, settings: str) -> None:
        self.pool, self.first, self.chunk_tokens = pool, first, chunk_tokens
        self._root = hashlib.sha256(settings.encode()).digest()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._pages = 0

    @property
    def pages(self) -> int:
        """Pages that the cache holds. May be asked for from any thread."""
        return self._pages

    @property
    def evictable(self) -> int:
        """Pages that only the cache holds."""
        references = self.pool.references
        return sum(references[page] == 1 for entry in self._entries.values() for page in entry.pages)

    def find(self, tokens: list[int]) -> list[int]:
        """Pages of the longest known prefix of `tokens`, held once more for the caller. At least one
        token is always left to compute."""
        found: list[bytes] = []
        for key in self._keys(tokens, len(tokens) - 1):
            if key not in self._entries:
                break
            found.append(key)
        # the root last, so that it is the newest: a chunk is evicted before those that it builds on
        for key in reversed(found):
            self._entries.move_to_end(key)
        pages = [page for key in found for page in self._entries[key].pages]
        self.pool.hold(pages)
        return pages

    def add(self, tokens: list[int], pages: list[int]) -> None:
        """Remember the complete chunks among the first `tokens`, whose pages are `pages` in order."""
        per_chunk = self.chunk_tokens // 64
        fresh = []
        for index, key in enumerate(self._keys(tokens, len(tokens))):
            if key in self._entries:
                fresh.append(key)
                continue
            own = pages[index * per_chunk : (index + 1) * per_chunk]
            self.pool.hold(own)
            self._entries[key] = _Entry(own)
            self._pages += len(own)
            fresh.append(key)
        for key in reversed(fresh):
            self._entries.move_to_end(key)

    def evict(self, wanted: int) -> int:
        """Give up chunks that no request uses, least recently used first, until `wanted` pages are freed
        or there are no more; returns how many were."""
        freed = 0
        for key in list(self._entries):
            if freed >= wanted:
                break
            entry = self._entries[key]
            if all(self.pool.references[page] == 1 for page in entry.pages):
                self.pool.release(entry.pages)
                del self._entries[key]
                freed += len(entry.pages)
        self._pages -= freed
        return freed

    def clear(self) -> None:
        """Forget everything."""
        for entry in self._entries.values():
            self.pool.release(entry.pages)
        self._entries.clear()
        self._pages = 0

    def _keys(self, tokens: list[int], limit: int) -> list[bytes]:
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
