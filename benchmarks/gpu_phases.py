"""Where the time of one launch of the attention kernel goes: time stamps of every block, by phase.

    python benchmarks/gpu_phases.py [--out benchmarks/results/gpu_phases.json]

The kernel is built with `-DSTAMPS`: thread 0 of every block writes the GPU's global timer at ten points
(`STAMP` in attend_split.cu). Launches follow one another from Python, so that they do not overlap, over
several caches, so that none is found in the L2 cache; the last launch's stamps are read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cuda.bindings import driver
from gpu_attention import DIM, HEADS, KV_HEADS, SCALING, filled
from gpu_timing import gpu_provenance

from tqai.backends.cuda import CudaBackend, attention
from tqai.backends.cuda import driver as launching
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat

CASES = ((1, 32768, 4, 2), (1, 4096, 4, 2))
STAMPS = {
    0: "begins",
    1: "constants loaded, first page asked for",
    2: "queries asked for",
    3: "queries rotated",
    4: "first page there",
    5: "pages done",
    6: "warps done",
    7: "warps merged (CLUSTER: and the cluster met)",
    8: "CLUSTER: column stored",
    9: "ends",
}
BLOCKS, PLACES = 256, 16


class _Spy:
    """The driver's bindings, noting the modules that are loaded."""

    def __init__(self) -> None:
        self.modules: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(driver, name)
        if name != "cuModuleLoadData":
            return found

        def load(code: bytes) -> Any:
            result = found(code)
            self.modules.append(result[1])
            return result

        return load


def phases(batch: int, length: int, bits_k: int, bits_v: int) -> dict[int, dict[str, int]]:
    """Stamp -> median, least and most nanoseconds since the first block began."""
    page_format = PageFormat(*(make_codec(CodecSpec("scalar", DIM, bits)) for bits in (bits_k, bits_v)))
    caches = [filled(CudaBackend(), page_format, batch, length) for _ in range(4)]
    query = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    recent = attention.Exact(
        *(torch.randn(batch, KV_HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    )
    attention.prepared(page_format, torch.bfloat16, query.device).macros["STAMPS"] = 1
    spy = _Spy()
    original, launching._driver = launching._driver, lambda: spy
    try:
        for _ in range(4):
            for _, history in caches:
                attention.attend_pages(
                    query, page_format, history.addresses, history.pages, SCALING, recent=recent
                )
        torch.cuda.synchronize()
    finally:
        launching._driver = original
    stamps = np.zeros((BLOCKS, PLACES), dtype=np.int64)
    for module in spy.modules:
        error, pointer, _ = driver.cuModuleGetGlobal(module, b"tqai_stamps")
        read = np.zeros_like(stamps)
        if int(error) == 0:
            driver.cuMemcpyDtoH(read.ctypes.data, pointer, read.nbytes)
        if read[:, 0].any():
            stamps = read
    stamps = stamps[stamps[:, 0] > 0]
    since = np.where(stamps > 0, stamps - stamps[:, 0].min(), -1)
    found = {}
    for place in STAMPS:
        times = since[:, place][since[:, place] >= 0]
        if len(times):
            most, least = int(times.max()), int(times.min())
            found[place] = {"median_ns": int(np.median(times)), "least_ns": least, "most_ns": most}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_phases.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases = {}
    for batch, length, bits_k, bits_v in CASES:
        name = f"B{batch} {length} K{bits_k}/V{bits_v}"
        cases[name] = phases(batch, length, bits_k, bits_v)
        print(name, {place: times["median_ns"] for place, times in cases[name].items()})
    report = {"where": gpu_provenance(arguments.commit), "stamps": STAMPS, "cases": cases}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
