"""`ApiSettings`: who may ask for what."""

from __future__ import annotations

from dataclasses import dataclass

from tqai.errors import ConfigError

__all__ = ["ApiSettings"]


@dataclass(frozen=True)
class ApiSettings:
    """Names, keys and limits of the HTTP interface.

    Attributes:
        model_name: the model's name in requests and answers.
        api_keys: bearer tokens of which a request must bring one; none: no key is asked for.
        max_body_bytes: longer request bodies get 413.
        max_choices: most outputs of one request, n times the number of prompts.
        max_output_tokens: most tokens of one output; None: what the model's length leaves.
        chat_template: Jinja template instead of the tokenizer's own.
        allowed_origins: origins that browsers may call from; none: CORS stays off.
        retry_after_seconds: what 429 and 503 advise.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    max_choices: int = 16
    max_output_tokens: int | None = None
    chat_template: str | None = None
    allowed_origins: tuple[str, ...] = ()
    retry_after_seconds: int = 1

    def __post_init__(self) -> None:
        if any(not key for key in self.api_keys):
            raise ConfigError("api_keys: a key has at least one character")
        if self.max_body_bytes < 1 or self.max_choices < 1:
            raise ConfigError("max_body_bytes and max_choices: at least 1 is needed")
