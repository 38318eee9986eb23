"""What makes the study fast on a GPU, and changes no result.

* The torch form of the trellis codec searches for paths in thousands of small kernels; here one Triton kernel
  does the same search, one program per vector, and is checked against the torch form before it is used.
* optimum-quanto compiles an extension at its first use, in every process; shifts in torch do the same.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOLERANCE = 1e-4  # of the squared error of the paths, relative


@triton.jit
def _search(
    targets,
    levels,
    ends,
    ways,
    windows,
    steps: tl.constexpr,
    STATES: tl.constexpr,
    CHOICES: tl.constexpr,
    CLOSED: tl.constexpr,
):
    """The cheapest path of one vector: window w leads from state w % STATES to state w // CHOICES.

    ways is [rows, steps, STATES] uint8: by which choice a state was reached.
    """
    HIGH: tl.constexpr = STATES // CHOICES
    row = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, CHOICES)[:, None, None]
    b = tl.arange(0, HIGH)[None, :, None]
    c = tl.arange(0, CHOICES)[None, None, :]
    values = tl.load(levels + a * STATES + b * CHOICES + c)
    squares = values * values
    state = tl.arange(0, HIGH)[:, None] * CHOICES + tl.arange(0, CHOICES)[None, :]
    sums = tl.zeros([HIGH, CHOICES], dtype=tl.float32)
    end = 0
    if CLOSED:
        end = tl.load(ends + row).to(tl.int32)
        sums = tl.where(state == end, 0.0, 1e30)
    reached = tl.arange(0, CHOICES)[:, None] * HIGH + tl.arange(0, HIGH)[None, :]
    for step in range(steps):
        target = tl.load(targets + row * steps + step)
        cost = squares - 2.0 * target * values + sums[None, :, :]
        best = tl.min(cost, axis=2)
        by = tl.argmin(cost, axis=2)
        tl.store(ways + (row * steps + step) * STATES + reached, by.to(tl.uint8))
        least = tl.min(tl.min(best, axis=1), axis=0)
        sums = tl.reshape(best - least, [HIGH, CHOICES])
    tl.debug_barrier()
    now = end
    if not CLOSED:
        flat = tl.reshape(sums, [STATES])
        now = tl.argmin(flat, axis=0).to(tl.int32)
    for back in range(steps):
        step = steps - 1 - back
        by = tl.load(ways + (row * steps + step) * STATES + now).to(tl.int32)
        window = now * CHOICES + by
        tl.store(windows + row * steps + step, window.to(tl.int64))
        now = window % STATES


def search(form: Any, targets: Tensor, ends: Tensor | None) -> Tensor:
    """`TorchTrellisCodec._path`, by one kernel."""
    rows, steps = targets.shape
    states = 1 << form.state_bits
    windows = torch.empty((rows, steps), dtype=torch.int64, device=targets.device)
    if rows:
        ways = torch.empty((rows, steps, states), dtype=torch.uint8, device=targets.device)
        given = windows if ends is None else ends.contiguous()
        _search[(rows,)](
            targets.contiguous(),
            form.levels,
            given,
            ways,
            windows,
            steps,
            STATES=states,
            CHOICES=1 << form.bits,
            CLOSED=ends is not None,
            num_warps=4 if states > 64 else 1,
        )
    return windows


def fast_trellis(device: str) -> None:
    """Let `TorchTrellisCodec` search with the kernel, once it has found paths as good as torch's.

    Raises:
        RuntimeError: it has not.
    """
    from tqai.backends.torch_ops.trellis import TorchTrellisCodec
    from tqai.core.codec import CodecSpec, make_codec

    for name, bits in (("trellis", 2), ("trellis", 3), ("trellis", 4), ("trellis256", 3)):
        form = TorchTrellisCodec(make_codec(CodecSpec(name, 64, bits)), torch.device(device))
        check(form, torch.randn(32, 64, device=device) * form._per_deviation / 8)
    TorchTrellisCodec._path = search  # type: ignore[method-assign]


def check(form: Any, targets: Tensor) -> None:
    """Compare open and closed paths for `targets` `[rows, steps]` with those of the torch form.

    Raises:
        RuntimeError: the squared errors differ by more than `TOLERANCE`.
    """
    states = 1 << form.state_bits
    ends = torch.arange(targets.shape[0], device=targets.device) * 7 % states
    for given in (None, ends):
        errors = []
        for path in (type(form)._path(form, targets, given), search(form, targets, given)):
            follows = path[:, 1:] % states == path[:, :-1] // (1 << form.bits)
            if not bool(follows.all()) or (given is not None and bool((path[:, 0] % states != given).any())):
                raise RuntimeError("the search found no path")
            errors.append(float((form.levels[path] - targets).square().sum()))
        if not abs(errors[1] - errors[0]) <= TOLERANCE * errors[0]:
            raise RuntimeError(f"squared errors {errors[1]} instead of {errors[0]}")


def quanto_without_compiler() -> None:
    """Let optimum-quanto unpack with shifts in torch instead of building an extension."""
    try:
        from optimum.quanto.library.extensions.cpp import ext as cpp
    except ImportError:
        return

    def unpack(packed: Tensor, bits: int) -> Tensor:
        return torch.cat([(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)])

    library = type("Library", (), {"unpack": staticmethod(unpack)})
    cpp._lib = library
    if torch.cuda.is_available():
        from optimum.quanto.library.extensions.cuda import ext as cuda

        cuda._lib = library
