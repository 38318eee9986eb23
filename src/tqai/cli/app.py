"""The typer application: commands, `--version`, and how errors end.

Exit codes: 0 done, 1 the command failed, 2 the command line or a setting is wrong, 130 interrupted.
An error is one line on standard error; with TQAI_DEBUG=1 the traceback follows instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import tqai
from tqai.cli.bench_kv import bench_kv
from tqai.cli.benchmark import benchmark
from tqai.cli.calibrate import calibrate
from tqai.cli.chat import chat
from tqai.cli.compare import compare
from tqai.cli.convert import convert
from tqai.cli.demo import demo
from tqai.cli.eval import evaluate
from tqai.cli.info import info
from tqai.cli.plan import plan
from tqai.cli.report import CommandError
from tqai.cli.run import run
from tqai.cli.serve import serve
from tqai.errors import ConfigError, TqaiError

__all__ = ["app", "main"]

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="tqai",
    help="Compresses the KV cache of language models and attends on the packed codes.",
    epilog="TQAI_DEBUG=1 shows the traceback of an error.",
    pretty_exceptions_enable=False,
)
for _command in (demo, info, run, compare, benchmark, bench_kv, convert, serve, chat, plan, calibrate):
    app.command()(_command)
app.command("eval")(evaluate)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"tqai {tqai.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` if None) and return its exit code."""
    try:
        status = app(args=arguments, prog_name="tqai", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader went away (`tqai run ... | head`). Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if os.environ.get("TQAI_DEBUG", "0") not in ("", "0"):
            raise
        return _fail(_one_line(error), _exit_code(error))
    if status == INTERRUPTED:  # typer has turned the interrupt into a status
        return _fail("interrupted", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _exit_code(error: Exception) -> int:
    if isinstance(error, CommandError):
        return error.exit_code
    return WRONG_USAGE if isinstance(error, ConfigError) or _is_usage_error(error) else FAILED


def _is_usage_error(error: Exception) -> bool:
    # typer raises click's errors, of its own copy of click in newer versions.
    return hasattr(error, "format_message") and getattr(error, "exit_code", None) == WRONG_USAGE


def _one_line(error: Exception) -> str:
    if hasattr(error, "format_message"):
        text = str(error.format_message())
    elif isinstance(error, TqaiError | CommandError):
        text = str(error)
    else:
        first = str(error).strip().partition("\n")[0]
        text = f"{type(error).__name__}: {first} (TQAI_DEBUG=1 shows where)"
    return " ".join(text.split())


def _fail(message: str, exit_code: int) -> int:
    print(f"tqai: error: {message}", file=sys.stderr)
    return exit_code
