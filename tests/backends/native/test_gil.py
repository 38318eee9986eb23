"""Other Python threads run while a kernel does."""

from __future__ import annotations

import threading
import time

import torch


def test_python_goes_on_during_a_call(native, page_format):
    """With the lock held nothing could be noted between a call's begin and its end."""
    pages = page_format(4, 4, 128)
    rows = torch.randn(150, 8, 64, 128)
    out = torch.empty(150, 8, pages.page_bytes, dtype=torch.uint8)
    ends = []

    def work():
        ends.append(time.perf_counter())
        native.encode(rows, rows, pages, out)
        ends.append(time.perf_counter())

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    most = 0
    try:
        for _ in range(5):
            ends.clear()
            noted = []
            thread = threading.Thread(target=work)
            thread.start()
            while thread.is_alive():
                noted.append(time.perf_counter())
                time.sleep(5e-4)
            thread.join()
            begin, end = ends
            slack = (end - begin) / 5  # of what is Python's before and after the kernel
            most = max(most, sum(begin + slack < moment < end - slack for moment in noted))
    finally:
        torch.set_num_threads(before)
    assert most >= 5
