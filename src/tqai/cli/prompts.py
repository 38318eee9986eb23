"""What a model is given to read: `--file`, the prompt, `--chat`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tqai.cli.models import WRONG_USAGE, LoadedModel
from tqai.cli.report import CommandError

if TYPE_CHECKING:
    import torch

__all__ = ["check_new_tokens", "read_text", "token_ids"]


def check_new_tokens(max_tokens: int) -> None:
    """Refuse `--max-tokens` below 1."""
    if max_tokens < 1:
        raise CommandError(f"--max-tokens {max_tokens}: allowed are whole numbers from 1", WRONG_USAGE)


def read_text(path: str | None, option: str = "--file") -> str:
    """The text of `--file`, or of the option of another name, or nothing.

    Raises:
        CommandError: it cannot be read as UTF-8 text.
    """
    if path is None:
        return ""
    try:
        return Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise CommandError(f"{option} {path}: {reason}") from error


def token_ids(loaded: LoadedModel, prompt: str, file_text: str, chat: bool, new_tokens: int) -> torch.Tensor:
    """Ids `[1, tokens]` of file and prompt on the model's device, as one chat turn if `chat`.

    The prompt follows the file as it is given; a blank line comes between them unless the prompt begins
    with a line break.

    Raises:
        CommandError: nothing to read, no chat template, or more tokens than the model has positions for.
    """
    between = "\n\n" if file_text and not prompt.startswith("\n") else ""
    text = file_text + between + prompt
    tokenizer = loaded.tokenizer
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise CommandError(f"--chat: the tokenizer of {loaded.name} has no chat template", WRONG_USAGE)
        turn = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    else:
        ids = tokenizer.encode(text)
    if not ids:
        raise CommandError("the prompt is empty", WRONG_USAGE)
    limit = loaded.context_tokens
    if limit is not None and len(ids) + new_tokens > limit:
        raise CommandError(
            f"{len(ids)} prompt tokens and {new_tokens} new ones: {loaded.name} has only {limit} positions",
            WRONG_USAGE,
        )
    batch: torch.Tensor = loaded.batch(ids)
    return batch
