"""What commands print: JSON or tables on standard output, progress on standard error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

__all__ = ["CommandError", "Steps", "console", "format_bytes", "print_json", "steps", "warn"]


class CommandError(Exception):
    """A command cannot do what it was asked; the message is the one line that the user sees."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def print_json(result: dict[str, Any]) -> None:
    """One JSON object on standard output. Numbers that JSON does not know (NaN, inf) become null."""
    print(json.dumps(_plain(result), indent=2, ensure_ascii=False, allow_nan=False))


def console() -> Console:
    """The rich console on standard output."""
    from rich.console import Console

    return Console()


class Steps:
    """A progress bar on standard error that counts the steps of a long command."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def begin(self, description: str) -> None:
        """Say what runs now."""
        self._progress.update(self._task, description=description)

    def done(self, count: int = 1) -> None:
        """Count steps as finished."""
        self._progress.advance(self._task, count)


@contextmanager
def steps(total: int) -> Iterator[Steps]:
    """A `Steps` of `total` steps; drawn only where standard error is a terminal, and removed at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        yield Steps(progress, progress.add_task("starting", total=total))


def warn(message: str) -> None:
    """One line on standard error that is no error."""
    print(f"tqai: {message}", file=sys.stderr)


def format_bytes(count: int) -> str:
    """Bytes for people: '812 B', '3.4 KiB', '12.0 MiB'."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
