"""Where the time of one launch of the attention kernel goes: time stamps of every block, by phase.

    python benchmarks/gpu_phases.py [--out benchmarks/results/gpu_phases.json]

The kernel is built with `-DSTAMPS`: thread 0 of every block writes the GPU's global timer at ten points
(`STAMP` in attend_split.cu). Launches follow one another over several caches, so that none is found in the L2
cache; the last launch's stamps are read. From Python they do not overlap, in a graph they do.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cuda.bindings import driver
from gpu_attention import DIM, HEADS, KV_HEADS, SCALING, filled
from gpu_timing import gpu_provenance

from tqai.backends.cuda import CudaBackend, attention, calls
from tqai.backends.cuda import driver as launching
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PageFormat

CASES = ((1, 32768, 4, 2), (8, 32768, 4, 4), (1, 131072, 4, 4), (1, 4096, 4, 2))
STAMPS = {
    0: "begins",
    1: "constants there, first pages asked for",
    2: "earlier launches over, queries asked for",
    3: "queries rotated",
    4: "first page there",
    5: "pages done",
    6: "all warps done",
    7: "warps merged; sent, or the cluster has met",
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


def phases(batch: int, length: int, bits_k: int, bits_v: int, overlap: bool) -> dict[int, dict[str, int]]:
    """Stamp -> nanoseconds of the blocks since the first of them began; with `overlap`, of the last launch of
    a graph, since the one before it was over."""
    page_format = PageFormat(*(make_codec(CodecSpec("scalar", DIM, bits)) for bits in (bits_k, bits_v)))
    caches = [filled(CudaBackend(), page_format, batch, length) for _ in range(4)]
    query = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    recent = attention.Exact(
        *(torch.randn(batch, KV_HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    )
    calls.prepared.cache_clear()
    calls._BY_IDENTITY.clear()
    launching._KERNELS.clear()
    calls.prepared(page_format, torch.bfloat16, query.device).macros["STAMPS"] = 1

    def launches() -> None:
        for _ in range(3):
            for _, history in caches:
                attention.attend_pages(
                    query,
                    page_format,
                    history.addresses,
                    history.pages,
                    SCALING,
                    recent=recent,
                    early=overlap,
                )

    spy = _Spy()
    original, launching._driver = launching._driver, lambda: spy
    try:
        launches()
        torch.cuda.synchronize()
        if overlap:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                launches()
            for _ in range(3):
                graph.replay()
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
    worked = stamps[stamps[:, 2] > 0]
    start = worked[:, 2].min() if overlap else stamps[:, 0].min()
    found = {}
    for place in STAMPS:
        times = stamps[:, place][stamps[:, place] > 0] - start
        if len(times):
            most, least = int(times.max()), int(times.min())
            found[place] = {"median_ns": int(np.median(times)), "least_ns": least, "most_ns": most}
            found[place]["blocks"] = len(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_phases.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cases = {}
    for (batch, length, bits_k, bits_v), overlap in product(CASES, (False, True)):
        name = f"B{batch} {length} K{bits_k}/V{bits_v}" + (", overlapping" if overlap else "")
        cases[name] = phases(batch, length, bits_k, bits_v, overlap)
        shown = {k: (t["least_ns"], t["median_ns"], t["most_ns"]) for k, t in cases[name].items()}
        print(name, shown, flush=True)
        torch.cuda.empty_cache()
        # after every case: a run that is stopped has not been for nothing
        report = {"where": gpu_provenance(arguments.commit), "stamps": STAMPS, "cases": cases}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
