"""The fixture that makes unwritten memory visible does so."""

import numpy as np
import pytest
import torch


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_floats_are_nan(dtype):
    assert np.isnan(np.empty((3, 2), dtype)).all()
    assert np.isnan(np.empty_like(np.zeros(4, dtype))).all()


@pytest.mark.usefixtures("poisoned_allocations")
def test_numpy_bytes_are_all_ones():
    assert (np.empty(5, np.uint8) == 0xFF).all()
    assert (np.empty(5, np.int32) == -1).all()


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_torch_floats_are_nan(dtype):
    like = torch.zeros(3, dtype=dtype)
    for tensor in (torch.empty(3, dtype=dtype), torch.empty_like(like), like.new_empty(2)):
        assert tensor.isnan().all()


@pytest.mark.usefixtures("poisoned_allocations")
def test_torch_bytes_are_all_ones():
    assert (torch.empty(5, dtype=torch.uint8) == 0xFF).all()
    assert (torch.empty(5, dtype=torch.int64) == -1).all()


def test_without_the_fixture_nothing_is_patched():
    assert np.empty.__module__ == "numpy"
