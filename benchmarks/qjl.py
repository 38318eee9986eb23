"""What does the 1-bit sketch of the residual (`use_qjl`) cost or gain on the embedded model?

    python benchmarks/qjl.py    some minutes; writes the result

KL against the uncompressed model on held-out text, with the cache in the loop, for keys of 4 bits without
and with sketches of several sizes, for the paper's arrangement (one bit less and a sketch as long as the
vector), for a sketch on values too, and for spending the same bytes on more bits instead.
"""

from __future__ import annotations

import json
import sys

import torch
from provenance import ROOT, provenance

from tqai.demo import load
from tqai.demo.retrieval import document
from tqai.evaluation import cache_maker, evaluate_quality, split_documents

RESULT = ROOT / "benchmarks" / "results" / "qjl.json"
DOCUMENTS, TOKENS, PREFILL, CHUNK = 4, 768, 512, 32
VARIANTS = {
    "K4/V4": {},
    "K4/V4, sketch 32": {"use_qjl": True, "qjl_sketch_size": 32},
    "K4/V4, sketch 64": {"use_qjl": True, "qjl_sketch_size": 64},
    "K4/V4, sketch 128": {"use_qjl": True, "qjl_sketch_size": 128},
    "K4/V4, sketch 64, values too": {"codec": "qjl", "qjl_sketch_size": 64},
    "K3/V4, sketch 128 (4 bits as in the paper)": {"bits_k": 3, "use_qjl": True, "qjl_sketch_size": 128},
    "K5/V4": {"bits_k": 5},
}


def main() -> int:
    model, tokenizer = load(torch.float32, torch.device("cpu"))
    ids = torch.tensor(tokenizer.encode(document()[-60_000:]))
    documents = split_documents(ids, TOKENS, DOCUMENTS)
    makers = [
        cache_maker("K4/V4", model, label=name, backend="torch", **options)
        for name, options in VARIANTS.items()
    ]
    reports = evaluate_quality(model, documents, makers, prefill_tokens=PREFILL, chunk_tokens=CHUNK)
    rows = {name: report.to_dict() for name, report in reports.items()}
    base = rows["K4/V4"]["kl_mean"]["value"]
    for name, row in rows.items():
        row["kl_ratio"] = row["kl_mean"]["value"] / base
        print(f"{name}: KL {row['kl_mean']['value']:.5f}, {row['kl_ratio']:.2f}x", flush=True)
    settings = {"documents": DOCUMENTS, "tokens": TOKENS, "prefill_tokens": PREFILL, "chunk_tokens": CHUNK}
    RESULT.write_text(
        json.dumps({**provenance(), "settings": settings, "rows": rows}, indent=1) + "\n", "utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
