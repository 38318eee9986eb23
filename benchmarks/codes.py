"""What do encoding and decoding cost, by backend? Vectors of 128 per second, by codec and bits.

    python benchmarks/codes.py cpu mlx        some minutes on one core
    python benchmarks/codes.py cuda           on a GPU: the backends cuda, triton and torch

Nothing is timed before what a backend encodes decodes to core's numbers, with core's squared error to 0.3 %.
Keys and values of a float32 tensor (cuda, triton: bfloat16) are encoded, and decoded to float32. Each device
has an entry of its own in benchmarks/results/codes.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
import torch
from provenance import ROOT, provenance

from tqai.backends import load
from tqai.core.codec import CodecSpec, make_codec
from tqai.core.page import PAGE_TOKENS, PageFormat
from tqai.errors import TqaiError

RESULT = ROOT / "benchmarks" / "results" / "codes.json"
DIM, CHECKED_PAGES, SECONDS = 128, 2, 0.15
CODECS = {"scalar": (2, 3, 4, 8), "trellis": (2, 3, 4), "trellis256": (2, 3, 4)}
# Pages of 8 heads at a time: as many as keep the device busy, and few where a vector takes long.
PAGES = {"cuda": 512, "triton": 512, "torch cuda": 16, "native": 16, "torch cpu": 2, "mlx": 1, "core": 1}
SLOW = {"torch cpu", "mlx", "core"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("devices", nargs="+", choices=("cpu", "mlx", "cuda"))
    parser.add_argument("--commit", help="to note where there is no git checkout")
    parser.add_argument("--out", default=str(RESULT))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        with open(arguments.out, encoding="utf-8") as held:
            result = json.load(held)
    except FileNotFoundError:
        result = {}
    names = {
        "cpu": ("native", "torch cpu", "core"),
        "mlx": ("mlx",),
        "cuda": ("cuda", "triton", "torch cuda"),
    }
    for device in arguments.devices:
        about = provenance()
        gpu = torch.cuda.get_device_name() if device == "cuda" else None
        entry = {
            "provenance": {**about, "commit": about["commit"] or arguments.commit, "gpu": gpu},
            "rows": [],
        }
        result[device] = entry
        for name in names[device]:
            for codec, widths in CODECS.items():
                for bits in widths:
                    row = {"backend": name, "codec": codec, "bits": bits, **measured(name, codec, bits)}
                    entry["rows"].append(row)
                    print(row, flush=True)
                    with open(arguments.out, "w", encoding="utf-8") as out:
                        json.dump(result, out, indent=1)
    return 0


def measured(name: str, codec: str, bits: int) -> dict[str, Any]:
    """Rates of one backend, or why there are none."""
    page_format = PageFormat(*(make_codec(CodecSpec(codec, DIM, bits)) for _ in "kv"))
    pages = PAGES[name] if codec == "scalar" or name in ("cuda", "triton") else 1
    heads = 8 if codec == "scalar" or name not in SLOW else 1
    pages = max(pages, CHECKED_PAGES)
    vectors = torch.randn(pages, heads, PAGE_TOKENS, DIM, generator=torch.Generator().manual_seed(bits))
    try:
        encode, decode, canonical = _calls(name, page_format, vectors)
    except TqaiError as error:
        return {"refused": str(error)}
    encode()
    decoded = _numpy(decode()).astype(np.float64).reshape(vectors.shape)
    codes = canonical()
    some = slice(0, CHECKED_PAGES), slice(0, 1)  # of one head, as core is slow
    exact = page_format.key.decode(type(codes)(codes.codes[some], codes.scales[some]))
    assert np.linalg.norm(exact - decoded[some]) < 1e-5 * np.linalg.norm(exact), (name, codec, bits)
    found, wanted = _error(vectors[some].numpy(), decoded[some]), _core_error(codec, bits, vectors[some])
    assert abs(found / wanted - 1.0) < 3e-3, (name, codec, bits, found, wanted)
    count = 2 * pages * heads * PAGE_TOKENS
    return {
        "vectors_encoded_per_second": round(count / _seconds(encode)),
        "vectors_decoded_per_second": round(count / _seconds(decode)),
        "squared_error": found,
        "of_core": found / wanted,
    }


def _calls(name: str, page_format: PageFormat, vectors: torch.Tensor) -> tuple[Any, Any, Any]:
    """Encode; decode the keys; the key codes in canonical order. Both sides are encoded and decoded."""
    if name == "core":
        rows, held = vectors.numpy(), {}

        def encode() -> None:
            held["key"] = [page_format.key.encode(rows) for _ in "kv"]

        return (
            encode,
            lambda: [page_format.key.decode(part) for part in held["key"]].pop(),
            lambda: held["key"][0],
        )
    backend = load(name.partition(" ")[0])
    shape = (*vectors.shape[:2], page_format.page_bytes)
    if name == "mlx":
        import mlx.core as mx

        given, box = mx.array(vectors.numpy()), {}

        def encode() -> None:
            box["raw"] = encode_pages(given, given, page_format)
            mx.eval(box["raw"])

        def decode() -> Any:
            both = backend.decode(box["raw"], page_format, mx.float32)
            mx.eval(*both)
            return np.array(both.keys)

        from tqai.backends.mlx.pages import encode_pages

        return encode, decode, lambda: backend.to_canonical(box["raw"], page_format).key
    device = "cuda" if name in ("cuda", "triton", "torch cuda") else "cpu"
    dtype = torch.bfloat16 if name in ("cuda", "triton") else torch.float32
    vectors.copy_(vectors.to(dtype))
    reason = backend.refuses(page_format, device, str(dtype).removeprefix("torch."))
    if reason is not None:
        raise TqaiError(reason)
    on_device = vectors.to(device, dtype)
    raw = torch.empty(shape, dtype=torch.uint8, device=device)

    def encode() -> None:
        backend.encode(on_device, on_device, page_format, raw)
        _wait(device)

    def decode() -> Any:
        keys = backend.decode(raw, page_format, torch.float32).keys
        _wait(device)
        return keys

    return encode, decode, lambda: backend.to_canonical(raw, page_format).key


def _numpy(found: Any) -> Any:
    return found.cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _seconds(call: Any) -> float:
    """Least time of repeated calls."""
    best, end = np.inf, time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return float(best)


def _error(vectors: Any, decoded: Any) -> float:
    vectors = vectors.astype(np.float64)
    return float((np.square(vectors - decoded).sum(-1) / np.square(vectors).sum(-1)).mean())


def _core_error(codec: str, bits: int, vectors: torch.Tensor) -> float:
    made = make_codec(CodecSpec(codec, DIM, bits))
    return _error(vectors.numpy(), made.decode(made.encode(vectors.numpy())))


if __name__ == "__main__":
    sys.exit(main())
