"""Threads, torch's and our own: any number gives the same bits, several callers at once, after a fork."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from tqai.backends.base import ExactTokens
from tqai.backends.native.library import LIBRARY_VARIABLE
from tqai.backends.native.team import gomp_parallel


@pytest.fixture(params=["own", "team"])
def threads_of(request, native):
    """Whose threads the kernels run on."""
    if request.param == "team" and gomp_parallel() is None:
        pytest.skip("torch runs on no OpenMP runtime that is known here")
    native.use_own_threads(request.param == "own")
    yield request.param
    native.use_own_threads(False)


@pytest.fixture
def call(native, page_format, history, threads_of):
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
                assert torch.equal(call(), alone)  # the parts of a history depend on its pages alone
    finally:
        torch.set_num_threads(before)


def test_several_callers_at_once(call):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    wanted, wrong = call(), []

    def work():
        for _ in range(50):
            if not torch.equal(call(), wanted):
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
            os._exit(0 if torch.equal(call(), wanted) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)


def test_a_sequence_does_not_depend_on_its_batch(native, page_format, history, threads_of):
    """Alone, and beside longer and shorter ones: the same bits, whatever number of threads."""
    pages, counts = 290, torch.tensor([290, 9, 256, 64], dtype=torch.int32)
    found, _, _ = history(page_format(4, 2, 16), 4, 1, pages)
    recent = ExactTokens(*(torch.randn(4, 1, 5, 16) for _ in range(2)))
    query = torch.randn(4, 3, 1, 16)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            ragged = dataclasses.replace(found, counts=counts)
            together = native.attend(query, ragged, None, recent, None, 0.25)
            for i, count in enumerate(counts.tolist()):
                alone = dataclasses.replace(
                    found, table=found.table[i : i + 1, :count], addresses=found.addresses[i : i + 1, :count]
                )
                mine = ExactTokens(recent.keys[i : i + 1], recent.values[i : i + 1])
                single = native.attend(query[i : i + 1], alone, None, mine, None, 0.25)
                assert torch.equal(single.out[0], together.out[i]), (threads, count)
                assert torch.equal(single.lse[0], together.lse[i]), (threads, count)
                seen = torch.ones(1, 1, 1, 64 * count + 5, dtype=torch.bool)
                masked = native.attend(query[i : i + 1], alone, None, mine, seen, 0.25)
                assert torch.equal(single.out, masked.out), (threads, count)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads_of", ["own"], indirect=True)
def test_a_team_that_keeps_callers_waiting_is_left_alone_for_a_while(native, call):
    """What a host's team does beside a program that wants the cores too."""
    begun = []
    share = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def slow_to_end(function, data, threads, flags):
        begun.append((threads, flags))
        share(function)(data)
        time.sleep(0.2)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    wanted = call()
    native._library.tqai_use_team(ctypes.cast(slow_to_end, ctypes.c_void_p))
    try:
        calls = []
        for _ in range(26):
            assert torch.equal(call(), wanted)
            calls.append(len(begun))
    finally:
        native.use_own_threads(False)
        torch.set_num_threads(before)
    assert calls == [1] * 9 + [2] * 17, "eight calls without it, then sixteen"
    assert begun[0] == (3, 0)


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
