"""The pool: any number of threads gives the same result, several callers at once, and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from tqai.backends.base import ExactTokens
from tqai.backends.native.library import LIBRARY_VARIABLE


@pytest.fixture
def call(native, page_format, history):
    found, _, _ = history(page_format(4, 4, 64), 2, 2, 20)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 1, 64, generator=generator)
    recent = ExactTokens(*(torch.randn(2, 2, 5, 64, generator=generator) for _ in range(2)))
    return lambda: native.attend(query, found, None, recent, None, 0.125).out


def test_number_of_threads_does_not_matter(call):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = call()
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for _ in range(20):
                # other parts, other integer scales: equal to the rounding of the weights
                assert (call() - alone).norm() < 1e-3 * alone.norm()
    finally:
        torch.set_num_threads(before)


def test_several_callers_at_once(call):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    wanted, wrong = call(), []

    def work():
        for _ in range(50):
            if not torch.allclose(call(), wanted, rtol=1e-4, atol=1e-5):
                wrong.append(1)

    try:
        callers = [threading.Thread(target=work) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(before)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_works_after_fork(call):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted = call()
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.allclose(call(), wanted, rtol=1e-4, atol=1e-5) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


def test_environment_chooses_the_instruction_set(native, isas):
    code = "from tqai.backends.native.library import load_library; print(load_library().tqai_isa().decode())"
    for name in (isas[0], "nonsense"):
        environment = {**os.environ, "TQAI_CPU_ISA": name, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == (name if name in isas else isas[-1])


def test_a_missing_library_says_why():
    code = "from tqai.backends.native.library import load_library; load_library()"
    environment = {**os.environ, LIBRARY_VARIABLE: "/nowhere.so", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "BackendError" in done.stderr and "/nowhere.so: no such file" in done.stderr
