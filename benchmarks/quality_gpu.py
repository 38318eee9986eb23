"""What makes the study fast on a GPU, and changes no result.

* The torch form of the trellis codec searches for paths in thousands of small kernels; here one CUDA kernel
  does the same search, one block per vector, and is checked against the torch form before it is used.
* optimum-quanto compiles an extension at its first use, in every process; shifts in torch do the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-4  # of the squared error of the paths, relative
SHARED_BYTES = 48 * 1024

SOURCE = """
// The cheapest path of one vector per block, one thread per state: window w leads from state w % STATES to
// state w / CHOICES. ways[step][state] in shared memory: by which choice a state was reached.
extern "C" __global__ void search(const float* targets, const float* levels, const long long* ends,
                                  long long* windows) {
    __shared__ float sums[2][STATES];
    __shared__ float wanted[STEPS];
    __shared__ unsigned char ways[STEPS][STATES];
    const long long row = blockIdx.x;
    const int state = threadIdx.x;
    float values[CHOICES];
    for (int c = 0; c < CHOICES; ++c) values[c] = levels[state * CHOICES + c];
    for (int i = state; i < STEPS; i += STATES) wanted[i] = targets[row * STEPS + i];
    const int end = CLOSED ? (int)ends[row] : 0;
    sums[0][state] = !CLOSED || state == end ? 0.0f : 1e30f;
    __syncthreads();
    for (int step = 0; step < STEPS; ++step) {
        const float target = wanted[step];
        float best = 3e38f;
        int by = 0;
        for (int c = 0; c < CHOICES; ++c) {
            const float error = values[c] - target;
            const float cost = sums[step & 1][(state * CHOICES + c) & (STATES - 1)] + error * error;
            if (cost < best) {
                best = cost;
                by = c;
            }
        }
        sums[(step + 1) & 1][state] = best;
        ways[step][state] = by;
        __syncthreads();
    }
    if (state != 0) return;
    int now = end;
    if (!CLOSED) {
        for (int s = 1; s < STATES; ++s)
            if (sums[STEPS & 1][s] < sums[STEPS & 1][now]) now = s;
    }
    for (int step = STEPS - 1; step >= 0; --step) {
        const int window = now * CHOICES + ways[step][now];
        windows[row * STEPS + step] = window;
        now = window & (STATES - 1);
    }
}
"""


@cache
def _kernel(states: int, choices: int, steps: int, closed: bool) -> Any:
    macros = {"STATES": states, "CHOICES": choices, "STEPS": steps, "CLOSED": int(closed)}
    lines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    return torch.cuda._compile_kernel(lines + SOURCE, "search")


def search(form: Any, targets: Tensor, ends: Tensor | None) -> Tensor:
    """`TorchTrellisCodec._path`, by one kernel."""
    rows, steps = targets.shape
    states = 1 << form.state_bits
    if steps * (states + 4) + 8 * states > SHARED_BYTES:
        raise RuntimeError(f"{steps} steps of {states} states do not fit the kernel's shared memory")
    windows = torch.empty((rows, steps), dtype=torch.int64, device=targets.device)
    if rows:
        run = _kernel(states, 1 << form.bits, steps, ends is not None)
        given = windows if ends is None else ends.contiguous()
        run((rows, 1, 1), (states, 1, 1), [targets.contiguous(), form.levels, given, windows])
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
