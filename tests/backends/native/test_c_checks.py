"""The C test programs: under sanitizers here, and for 64-bit Arm under an emulator."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def check(mode, seconds):
    # a fresh seed each time makes this a fuzz of bounded time; the message gives the seed again
    seed = random.SystemRandom().randrange(2**31)
    done = subprocess.run(
        ["sh", str(ROOT / "csrc" / "check.sh"), mode, str(seed), str(seconds)], capture_output=True, text=True
    )
    assert done.returncode == 0, f"csrc/check.sh {mode} {seed} {seconds}:\n{done.stdout}{done.stderr}"
    assert "without a difference" in done.stdout


def needs_sanitizer(name, tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "empty.c"
    source.write_text("int main(void) { return 0; }")
    flags = [f"-fsanitize={name}", "-o", str(tmp_path / "empty")]
    if subprocess.run([compiler, str(source), *flags], capture_output=True).returncode:
        pytest.skip(f"{compiler} has no sanitizer {name}")


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    needs_sanitizer("address,undefined", tmp_path)
    check("sanitize", 4)


@pytest.mark.slow
def test_threads_have_no_races(tmp_path):
    needs_sanitizer("thread", tmp_path)
    check("threads", 2)


@pytest.mark.slow
def test_neon_agrees_with_scalar():
    for tool in ("aarch64-linux-gnu-gcc", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} (Debian: qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross)")
    check("neon", 4)
