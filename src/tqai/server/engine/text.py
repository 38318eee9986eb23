"""Token ids to text as they come, and stop strings."""

from __future__ import annotations

from typing import Any

__all__ = ["Detokenizer", "StopStrings"]

REPLACEMENT = "�"
MAX_INCOMPLETE_TOKENS = 8
"""A character has at most 4 bytes; tokens of broken text would otherwise be held for ever."""


class Detokenizer:
    """Text of tokens that arrive one by one. Incomplete characters wait for their last byte."""

    def __init__(self, tokenizer: Any, before: list[int], skip_special_tokens: bool = True) -> None:
        """`before`: the tokens in front (some tokenizers decode by context); the last few are enough."""
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        self._tokens = list(before[-5:])
        self._start, self._read = 0, len(self._tokens)

    def add(self, token: int) -> str:
        """The text that `token` completes, "" while a character is incomplete."""
        self._tokens.append(token)
        known = self._decode(self._tokens[self._start : self._read])
        text = self._decode(self._tokens[self._start :])
        if text.endswith(REPLACEMENT) and len(self._tokens) - self._read < MAX_INCOMPLETE_TOKENS:
            return ""
        if len(text) <= len(known):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return text[len(known) :]

    def rest(self) -> str:
        """What is left at the end, incomplete as it may be."""
        known = self._decode(self._tokens[self._start : self._read])
        text = self._decode(self._tokens[self._start :])
        self._start = self._read = len(self._tokens)
        return text[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=self._skips, clean_up_tokenization_spaces=False
        )
        return text


class StopStrings:
    """Cuts text at the first stop string; holds back what may become one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop, self._held = stop, ""

    def add(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string was found."""
        if not self._stop:
            return text, False
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max(
            (size for stop in self._stop for size in range(1, len(stop)) if self._held.endswith(stop[:size])),
            default=0,
        )
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def rest(self) -> str:
        """What was held back, at the end."""
        shown, self._held = self._held, ""
        return shown
