"""Output constrained to a JSON schema or a regular expression, by llguidance."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tqai.errors import ConfigError, UnsupportedError

__all__ = ["JSON_OPTIONS", "Constraint", "Grammars", "json_grammar", "regex_grammar"]

JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_grammar(schema: dict[str, Any]) -> str:
    """The grammar of JSON texts that fit `schema`."""
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": JSON_OPTIONS}}]})


def regex_grammar(pattern: str) -> str:
    """The grammar of texts that `pattern` matches as a whole."""
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_regex(pattern))


class Grammars:
    """Makes constraints for one tokenizer."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    @cached_property
    def _guide(self) -> Any:
        try:
            from llguidance import hf
        except ImportError as error:
            raise UnsupportedError(
                "constrained output needs llguidance: pip install 'tqai[serve]'"
            ) from error
        try:
            return hf.from_tokenizer(self._tokenizer, n_vocab=self._vocab_size)
        except (ValueError, TypeError) as error:
            raise UnsupportedError(
                f"constrained output is not to be had with this tokenizer: {error}"
            ) from error

    def check(self, grammar: str) -> None:
        """Raises ConfigError, with llguidance's reason, where the grammar cannot be used."""
        from llguidance import LLMatcher

        reason = LLMatcher.validate_grammar(grammar, self._guide)
        if reason and not reason.startswith("WARNING"):
            raise ConfigError(reason.partition("\n")[0])

    def constraint(self, grammar: str) -> Constraint:
        """A fresh constraint.

        Raises:
            ConfigError: the grammar cannot be used.
        """
        from llguidance import LLMatcher

        matcher = LLMatcher(self._guide, grammar, log_level=0)
        if matcher.is_error():
            raise ConfigError(str(matcher.get_error()).partition("\n")[0])
        return Constraint(matcher, self._vocab_size)


class Constraint:
    """What one request may still say."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> Tensor:
        """bool `[vocab]`: tokens that may come next."""
        bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._raise_error()
        allowed = torch.zeros(self._vocab_size, dtype=torch.bool)
        allowed[: bias.numel()] = bias[: self._vocab_size] > 0
        return allowed

    def take(self, token: int) -> None:
        """Go on with `token`."""
        self._matcher.consume_token(token)
        self._raise_error()

    @property
    def is_finished(self) -> bool:
        """Whether nothing more may come."""
        return bool(self._matcher.is_stopped())

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(f"the output constraint failed: {self._matcher.get_error()}".partition("\n")[0])
