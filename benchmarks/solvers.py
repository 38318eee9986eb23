"""What do other codebook solvers and objectives gain over Lloyd-Max?

    python benchmarks/solvers.py    a few minutes; writes the result

Every codebook is measured by all three objectives: squared error and cosine exactly, the divergence of
attention on samples that no solver has seen. Gate: no codebook beats Lloyd-Max by more than the noise of
those samples (two standard errors of the paired difference, and 0.1 %).
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from typing import Any

from provenance import ROOT, provenance

from tqai.core.solvers import objective_value, solve_codebook

RESULT = ROOT / "benchmarks" / "results" / "solvers.json"
HEAD_DIM, BITS = 128, (2, 3, 4)
RUNS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("lloyd_max", "mse", {}),
    ("fuzzy", "mse", {}),
    ("cmaes", "mse", {}),
    ("cmaes", "cosine", {}),
    ("cmaes", "attention", {"max_generations": 50}),
)
UNSEEN = range(1000, 1040)


def main() -> int:
    rows, passed = [], True
    for bits in BITS:
        base: list[float] = []
        for solver, objective, options in RUNS:
            start = time.perf_counter()
            levels = solve_codebook(HEAD_DIM, bits, solver, objective, **options)
            seconds = time.perf_counter() - start
            half = levels.centroids[2 ** (bits - 1) :].astype(float)
            unseen = [objective_value(half, HEAD_DIM, "attention", seed=seed) for seed in UNSEEN]
            base = base or unseen
            difference = [own - other for own, other in zip(unseen, base, strict=True)]
            error = statistics.stdev(difference) / math.sqrt(len(difference)) if any(difference) else 0.0
            rows.append(
                {
                    "bits": bits,
                    "solver": solver,
                    "objective": objective,
                    "seconds": seconds,
                    "mse": objective_value(half, HEAD_DIM, "mse"),
                    "cosine": objective_value(half, HEAD_DIM, "cosine"),
                    "attention_seen": objective_value(half, HEAD_DIM, "attention"),
                    "attention_unseen": statistics.fmean(unseen),
                    "attention_gain": -statistics.fmean(difference) / statistics.fmean(base),
                    "attention_gain_error": error / statistics.fmean(base),
                }
            )
            gain, noise = rows[-1]["attention_gain"], rows[-1]["attention_gain_error"]
            passed &= gain <= max(2 * noise, 0.001)
            print(rows[-1], flush=True)
    print("passed" if passed else "FAILED: a codebook beats Lloyd-Max")
    RESULT.write_text(
        json.dumps({**provenance(), "head_dim": HEAD_DIM, "rows": rows}, indent=1) + "\n", "utf-8"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
