"""How fast are keys and values encoded on this GPU, against the copy bandwidth of the same run?

    python benchmarks/gpu_encode.py [--backends cuda,triton] [--out benchmarks/results/gpu_encode.json]

8 KV heads, head_dim 128, bfloat16, 4096 pages (1.07 GB of keys and values). The pages are compared with
core on a part before anything is timed: codes equal but for coordinates at a boundary. Beside `cuda` its
general kernel is timed, which encodes what the tensor cores are not used for.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gpu_attention import DIM, KV_HEADS, backends
from gpu_timing import copy_bandwidth, gpu_provenance, graph_us

from tqai.backends.cuda.codes import encode_generally
from tqai.backends.cuda.encode import tensor_encoding_is_right
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.packing import unpack
from tqai.core.page import PAGE_TOKENS, PageFormat

PAGES = 4096
PAIRS = ((4, 2), (4, 4), (3, 3), (8, 8))
MOST_APART = 2e-5


def apart(backend, page_format: PageFormat, keys: torch.Tensor, raw: torch.Tensor) -> float:
    """Share of the codes of the first pages that differ from core's."""
    got = backend.to_canonical(raw, page_format)
    shares = []
    for codec, encoded in ((page_format.key, got.key), (page_format.value, got.value)):
        wanted = codec.encode(keys.float().cpu().numpy())
        mine, right = (unpack(e.codes, codec.spec.bits, DIM) for e in (encoded, wanted))
        shares.append(float(np.mean(mine != right)))
    return max(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", default="cuda")
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu_encode.json")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    keys, values = (
        torch.randn(PAGES, KV_HEADS, PAGE_TOKENS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    rows = []
    for backend in backends(arguments.backends):
        for bits_k, bits_v in PAIRS:
            page_format = PageFormat(
                *(make_codec(CodecSpec("scalar", DIM, bits)) for bits in (bits_k, bits_v))
            )
            out = torch.empty(PAGES, KV_HEADS, page_format.page_bytes, dtype=torch.uint8, device="cuda")
            backend.encode(keys, keys, page_format, out)
            share = apart(backend, page_format, keys[:4], out[:4])
            if share > MOST_APART:
                raise SystemExit(
                    f"{backend.name} K{bits_k}/V{bits_v}: {share:.1e} of the codes differ: not timed"
                )
            time_us = graph_us([partial(backend.encode, keys, values, page_format, out)], replays=7)
            size = 2 * keys.numel() * keys.element_size()
            row = {
                "backend": backend.name,
                "bits_k": bits_k,
                "bits_v": bits_v,
                "graph_us": time_us,
                "input_bytes_per_s": size / (time_us * 1e-6),
                "of_copy_bandwidth": size / (time_us * 1e-6) / bandwidth,
                "codes_apart": share,
            }
            if backend.name == "cuda":
                row["tensor_cores"] = tensor_encoding_is_right(
                    page_format, keys.dtype, keys.device, encode_generally
                )
                row["general_us"] = graph_us(
                    [partial(encode_generally, keys, values, page_format, out)], replays=5
                )
            rows.append(row)
            rate = row["input_bytes_per_s"] / 1e12
            print(
                f"{backend.name:6} K{bits_k}/V{bits_v} {time_us:8.1f} us, {rate:.2f} TB/s of input,", end=" "
            )
            print(f"{row['of_copy_bandwidth']:.0%} of copy, apart {share:.1e}")
    report = {"where": gpu_provenance(arguments.commit), "copy_bytes_per_s": bandwidth, "rows": rows}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
