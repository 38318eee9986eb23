"""`RequestPages`: which pages a request begins with, takes, shares and gives back, in every kind of layer."""

from __future__ import annotations

from tqai.server.engine.page_table import HeldPages
from tqai.server.engine.prefix import Chunk, Found, PrefixCache
from tqai.server.engine.sequence import Sequence
from tqai.server.engine.settings import EngineSettings
from tqai.server.engine.snapshots import Snapshots
from tqai.server.engine.store import TokenStore

__all__ = ["RequestPages"]

CHEAP_SHARE = 8
"""The state after a chunk is kept after every one if it takes at most this part of the chunk's pages."""


class RequestPages:
    """Pools, prefix cache and kept states of one engine.

    Attributes:
        prefixes: the prefix cache.
    """

    def __init__(self, store: TokenStore, settings: EngineSettings) -> None:
        self.store, self.chunk_tokens = store, settings.chunk_tokens
        self.pools, self.kinds = store.pools, store.kinds
        self.snapshots = Snapshots(store)
        sees_all = store.kinds[0].sliding_window is None
        self.prefixes = PrefixCache(
            store.pools,
            store.lead,
            settings.chunk_tokens,
            settings.label,
            needs_state=self.snapshots.are_needed,
            shares_pages=sees_all,
        )
        stored = CHEAP_SHARE * sum(self.snapshots.stored_pages)
        self._keeps_every_state = len(store.kinds) == 1 and sees_all and stored <= settings.chunk_tokens // 64

    def begin(self, sequence: Sequence, shares: bool, in_hand: int) -> bool:
        """Give a request the pages of what is known of its prompt, the state after that, and pages of the
        layers that see everything for the rest; False, with nothing held, if there is no room for all that
        it will hold at most, and `in_hand` pages of each kind beside it."""
        prompt = sequence.tokens[: sequence.prompt_tokens]
        found = self.prefixes.find(prompt) if shares else Found()
        stored = self._adopt(sequence, found)
        try:
            if not self._has_room_for(sequence, in_hand):
                self.leave(sequence)
                return False
            if found.snapshot is not None:
                self.snapshots.restore(found.snapshot)
        finally:
            for pool, pages in zip(self.pools, stored, strict=True):
                pool.release(pages)
        for number, kind in enumerate(self.kinds):
            if kind.sliding_window is None:
                pages = sequence.held[number].ids
                missing = self.store.pages_after(sequence.prompt_tokens) - len(pages)
                self.make_room(missing, number)
                pages += self.pools[number].take(missing)
        sequence.computed = self.store.lead + found.chunks * self.chunk_tokens if found.chunks else 0
        sequence.lead_done = self.store.lead == 0 or found.chunks > 0
        sequence.known_chunks = found.known
        sequence.chunks = (
            [Chunk(key, []) for key in self.prefixes.keys(prompt, len(prompt))] if shares else []
        )
        return True

    def _adopt(self, sequence: Sequence, found: Found) -> list[list[int]]:
        """Let a request hold what was found. Returns the pages with its state, to be given back when that
        has been brought back."""
        sequence.held = [HeldPages() for _ in self.pools]
        if self.prefixes.shares_pages:
            sequence.held[0].ids = list(found.pages)
        if found.snapshot is None:
            return [[] for _ in self.pools]
        for number, sight in enumerate(found.snapshot.sight):
            if sight is not None:
                sequence.held[number] = HeldPages(list(sight.ids), sight.gone)
        return found.snapshot.stored

    def _has_room_for(self, sequence: Sequence, in_hand: int) -> bool:
        for number, kind in enumerate(self.kinds):
            later = kind.most_pages(len(sequence.tokens), self.chunk_tokens)
            later -= len(sequence.held[number].live)
            if not self._could_have(later + in_hand, number):
                return False
        return True

    def _could_have(self, pages: int, number: int) -> bool:
        """Whether so many pages of a kind are free or would be after evicting. Counting those takes time."""
        free = self.pools[number].free
        return free >= pages or free + self.prefixes.evictable(number) >= pages

    def make_room(self, pages: int, number: int) -> bool:
        """Whether so many pages of a kind are free, after evicting prefixes that nobody uses."""
        pool = self.pools[number]
        if pool.free < pages:
            self.prefixes.evict(pages - pool.free, number)
        return pool.free >= pages

    def take_for_chunk(self, sequence: Sequence, stop: int) -> bool:
        """Take what the sliding layers need for a chunk that ends before token `stop`; False if there is
        no room for that. Can be repeated."""
        for number, (kind, held) in enumerate(zip(self.kinds, sequence.held, strict=True)):
            missing = self.store.pages_after(stop) - len(held.ids)
            if kind.sliding_window is not None and missing > 0:
                if not self.make_room(missing, number):
                    return False
                held.ids += self.pools[number].take(missing)
        return True

    def take_for_step(self, running: list[Sequence]) -> dict[int, list[int]] | None:
        """Fresh pages, one of each kind, for each running request whose next token completes one; None,
        with nothing taken, if there is no room for that."""
        due = [
            sequence.number
            for sequence in running
            if self.store.pages_after(sequence.computed + 1) > self.store.pages_after(sequence.computed)
        ]
        if not all(self.make_room(len(due), number) for number in range(len(self.pools))):
            return None
        taken = [pool.take(len(due)) for pool in self.pools]
        return {number: list(pages) for number, *pages in zip(due, *taken, strict=True)}

    def completed(self, sequence: Sequence, new_pages: list[int]) -> None:
        """A decode step has completed these pages of a request, one of each kind."""
        for held, page in zip(sequence.held, new_pages, strict=True):
            held.ids.append(page)
        self.give_back_unseen(sequence)

    def give_back_unseen(self, sequence: Sequence) -> None:
        """Give back the pages that no later token of a request sees."""
        for kind, pool, held in zip(self.kinds, self.pools, sequence.held, strict=True):
            gone = min(kind.gone(sequence.computed), len(held.ids))
            if gone > held.gone:
                pool.release(held.ids[held.gone : gone])
                held.gone = gone

    def note_chunk(self, sequence: Sequence) -> None:
        """Where a chunk has just become complete, keep what the prefix cache will want of it."""
        count, rest = divmod(sequence.computed - self.store.lead, self.chunk_tokens)
        if rest or not 0 < count <= len(sequence.chunks):
            return
        chunk, pages = sequence.chunks[count - 1], self.chunk_tokens // 64
        if self.prefixes.shares_pages:
            for number, one in enumerate(sequence.chunks[:count]):
                one.pages = sequence.held[0].ids[number * pages : (number + 1) * pages]
        is_last, differs = count == len(sequence.chunks), count == sequence.known_chunks
        if self.snapshots.are_needed and (is_last or differs or self._keeps_every_state):
            wanted = self.snapshots.stored_pages
            # not for the price of prefixes that are worth nothing without it
            if all(
                self._could_have(count, number) and self.make_room(count, number)
                for number, count in enumerate(wanted)
            ):
                chunk.snapshot = self.snapshots.take(sequence.held)

    def share(self, sequence: Sequence) -> None:
        """The whole prompt of a request has been computed, well: others may use its chunks."""
        self.prefixes.add(sequence.chunks)
        self.drop_kept(sequence)
        sequence.chunks = []

    def drop_kept(self, sequence: Sequence) -> bool:
        """Release the states that a prefill has kept for others; whether there were any."""
        dropped = False
        for chunk in sequence.chunks:
            if chunk.snapshot is not None:
                self.snapshots.release(chunk.snapshot)
                chunk.snapshot, dropped = None, True
        return dropped

    def leave(self, sequence: Sequence) -> None:
        """A request gives everything back."""
        for pool, held in zip(self.pools, sequence.held, strict=False):
            pool.release(held.live)
        sequence.held = []
        self.drop_kept(sequence)
        sequence.chunks = []
