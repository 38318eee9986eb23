"""How fast could any kernel be that reads the packed bytes of a cache? The least times on this GPU.

    python benchmarks/gpu_floor.py [--out benchmarks/results/gpu_floor.json]

Kernels that do less than attention must (`gpu_floor.cu`), timed as `gpu_attention.py` times attention (CUDA
graphs of calls that rotate among inputs beyond the L2 cache), in the same run as attention itself and torch's
attention on bfloat16:

    empty     the grid of `attend_split.cu`, doing nothing
    bulk      the packed bytes by bulk copies into rings of shared memory, as attention reads them
    plain     the same bytes by loads of 16 bytes
    merged    each of them, and partial results brought together by the last block of a segment

each with launches in order, and as attention has them: overlapping, the reading of the next while the one
before ends. `floor_us` is the least of bulk and plain, `merged_floor_us` of those which merge. No attention
on these bytes can take less, and torch's time over it is the greatest ratio that can be reached.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cuda.core import Program, ProgramOptions
from gpu_attention import KV_HEADS, packed_row, sdpa_times
from gpu_timing import L2_ROTATION_BYTES, gpu_provenance, graph_us

from tqai.backends.cuda import CudaBackend
from tqai.backends.cuda.driver import Kernel, Launch, architecture
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PAGE_TOKENS, PageFormat

SIZES = tuple(product((1, 8), (4096, 32768, 131072)))
PAIRS = ((4, 2), (4, 4))
PART = 520
RINGS = ((12, 2), (8, 3))
MODES = {"empty": 0, "bulk": 1, "plain": 2}


class Params(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_uint64),
        ("stride", ctypes.c_int64),
        ("parts", ctypes.c_uint64),
        ("counters", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("units", ctypes.c_int32),
        ("waits", ctypes.c_int32),
    ]


def built(**macros: int) -> Kernel:
    from cuda.bindings import driver

    text = (Path(__file__).parent / "gpu_floor.cu").read_text("utf-8")
    settings = ProgramOptions(
        std="c++17",
        arch=architecture(torch.device("cuda")),
        define_macro=[(name, str(value)) for name, value in macros.items()],
    )
    error, module = driver.cuModuleLoadData(bytes(Program(text, "c++", settings).compile("cubin").code))
    assert int(error) == 0, error
    error, function = driver.cuModuleGetFunction(module, b"tqai_floor")
    assert int(error) == 0, error
    return Kernel(function, 0)


def floor_times(batch: int, length: int, unit: int) -> dict[str, dict[str, float]]:
    """Microseconds of each kernel, in order and overlapping."""
    segments, units = batch * KV_HEADS, length // PAGE_TOKENS
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    splits = max(1, min(processors // segments, -(-units // 12)))
    size = units * segments * unit
    sets = max(1, min(8, L2_ROTATION_BYTES // size + 1))
    inputs = [torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda") for _ in range(sets)]
    parts = torch.zeros(segments * splits * PART, device="cuda")
    counters = torch.zeros(segments, dtype=torch.int32, device="cuda")
    out = torch.zeros(segments * PART, device="cuda")
    times: dict[str, dict[str, float]] = {}

    def measure(name: str, mode: int, merge: int, warps: int, stages: int) -> None:
        kernel = built(MODE=mode, MERGE=merge, UNIT=unit, WARPS=warps, STAGES=stages)
        shared = warps * stages * unit if mode == 1 else 0
        times[name] = {}
        for kind, overlap in (("in_order_us", False), ("overlapping_us", True)):
            launch = Launch(kernel, (splits, segments), warps * 32, shared, 1, overlap)

            def call(data: torch.Tensor, launch: Launch = launch, waits: int = not overlap) -> None:
                params = Params(
                    data.data_ptr(), segments * unit, parts.data_ptr(), counters.data_ptr(), out.data_ptr()
                )
                params.units, params.waits = units, waits
                launch(bytes(params), torch.cuda.current_stream().cuda_stream)

            times[name][kind] = graph_us([partial(call, data) for data in inputs])

    measure("empty", 0, 0, 12, 2)
    measure("empty, merged", 0, 1, 12, 2)
    for warps, stages in RINGS:
        measure(f"bulk {warps}x{stages}", 1, 0, warps, stages)
        measure(f"bulk {warps}x{stages}, merged", 1, 1, warps, stages)
    for warps in (16, 32):
        measure(f"plain {warps}", 2, 0, warps, 1)
        measure(f"plain {warps}, merged", 2, 1, warps, 1)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_floor.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for batch, length in SIZES:
        sdpa = min(times["graph_us"] for times in sdpa_times(batch, length).values())
        for bits_k, bits_v in PAIRS:
            page_format = PageFormat(
                *(make_codec(CodecSpec("scalar", 128, bits)) for bits in (bits_k, bits_v))
            )
            torch.cuda.empty_cache()
            times = floor_times(batch, length, page_format.page_bytes)
            torch.cuda.empty_cache()
            attention = packed_row(CudaBackend(), batch, length, bits_k, bits_v)
            reading = [t for name, t in times.items() if name.startswith(("bulk", "plain"))]
            row = {
                "batch": batch,
                "tokens": length,
                "bits_k": bits_k,
                "bits_v": bits_v,
                "packed_bytes": attention["packed_bytes"],
                "sdpa_us": sdpa,
                "attention_us": attention["graph_us"],
                "floor_us": min(min(t.values()) for t in reading),
                "merged_floor_us": min(
                    min(t.values()) for name, t in times.items() if "merged" in name and "empty" not in name
                ),
                "times": times,
            }
            row["greatest_ratio"] = sdpa / row["floor_us"]
            rows.append(row)
            shown = {k: round(v, 1) for k, v in row.items() if k.endswith("_us")}
            print(
                f"B{batch} {length} K{bits_k}/V{bits_v} {shown} at most {row['greatest_ratio']:.2f}x",
                flush=True,
            )
    report = {"where": gpu_provenance(arguments.commit), "rows": rows}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
