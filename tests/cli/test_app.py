"""The command as a process: start-up, version, help, exit codes, errors, pipes."""

import json
import os
import resource
import subprocess
import sys
import time

import pytest

import tqai

COMMANDS = ("demo", "info", "run", "compare", "benchmark", "bench-kv", "convert")


def process(*arguments: str, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "100", **variables}
    return subprocess.run(
        [sys.executable, "-m", "tqai", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )


def test_version():
    done = process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"tqai {tqai.__version__}\n", "")


def test_help_lists_every_command():
    done = process("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert f" {command} " in done.stdout


def test_without_arguments_it_prints_help(tqai_command):
    result = tqai_command()
    assert result.status == 0
    assert "COMMAND" in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(tqai_command, command):
    result = tqai_command(command, "--help")
    assert result.status == 0
    assert "--json" in result.out


def test_help_takes_under_half_a_second():
    """Of processor time, which on a quiet machine is the time, and which neighbours disturb less."""
    deadline, best = time.monotonic() + 60, float("inf")
    while best >= 0.5 and time.monotonic() < deadline:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert best < 0.5


def test_start_loads_no_framework():
    code = "import sys, tqai.cli.app; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"numpy", "torch", "transformers", "mlx"} & set(out.split())


def test_unknown_command_is_one_line_and_2():
    done = process("no-such-command")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no-such-command" in done.stderr


def test_failure_is_one_line_and_1():
    done = process("run", "x", "-m", "./no-such-folder")
    assert done.returncode == 1
    assert done.stderr == "tqai: error: model ./no-such-folder: no such folder\n"


def test_debug_shows_the_traceback():
    done = process("run", "x", "-m", "./no-such-folder", TQAI_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_unexpected_errors_are_one_line(tqai_command, monkeypatch):
    import tqai.cli.info

    def broken(_package):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(tqai.cli.info, "_version", broken)
    result = tqai_command("info")
    assert result.status == 1
    assert result.one_line() == "tqai: error: RuntimeError: first line (TQAI_DEBUG=1 shows where)\n"


def test_interrupt_is_130(tqai_command, monkeypatch):
    import tqai.cli.info

    def interrupted(_package):
        raise KeyboardInterrupt

    monkeypatch.setattr(tqai.cli.info, "_version", interrupted)
    result = tqai_command("info")
    assert result.status == 130
    assert "interrupted" in result.one_line()


def test_json_of_a_process_is_one_object_on_standard_output(tiny_model):
    done = process("demo", "-m", tiny_model, "--tokens", "400", "--facts", "1", "--max-tokens", "3", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"] == tiny_model


def test_run_streams_to_a_pipe_that_closes(tiny_model):
    command = [sys.executable, "-m", "tqai", "run", "In the", "-m", tiny_model, "--max-tokens", "200"]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reader.stdout is not None and reader.stderr is not None
    reader.stdout.close()
    errors = reader.stderr.read()
    reader.stderr.close()
    assert reader.wait(timeout=300) == 1
    assert "Traceback" not in errors and "BrokenPipe" not in errors


def test_completion_script():
    done = process("--show-completion", SHELL="/bin/bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "tqai" in done.stdout + done.stderr


def test_completion_offers_commands():
    variables = {"_TQAI_COMPLETE": "complete_bash", "COMP_WORDS": "tqai be", "COMP_CWORD": "1"}
    done = process(**variables)
    assert "benchmark" in done.stdout.split()
