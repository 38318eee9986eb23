"""Thousands of generated requests against a running server: the long form of tests/server/test_schema.py.

    python scripts/fuzz_server.py [--cases 5000] [--seed 0]

Serves the embedded model in this process, lets schemathesis generate valid and invalid requests from the
served OpenAPI schema for every operation, and writes what was answered to
benchmarks/results/serve_fuzz.json. Any 5xx, any answer outside the schema, and any page that is not given
back ends it with exit code 1. The same seed generates the same requests with the same versions.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "serve_fuzz.json"
LEAST_CASES = 5000
EXAMPLES = 40
"""Valid and as many invalid requests per operation and seed."""
PACKAGES = ("schemathesis", "hypothesis", "fastapi", "pydantic", "uvicorn", "sse-starlette")
sys.path[:0] = [str(ROOT / "tests" / "server"), str(ROOT / "benchmarks")]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=LEAST_CASES, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.WARNING)

    from fuzz import CHECKS, fuzz
    from provenance import provenance
    from serving import serving

    from tqai import demo
    from tqai.server.engine.engine import Engine
    from tqai.server.engine.settings import EngineSettings

    engine = Engine(*demo.load(), EngineSettings(max_running=8, max_kv_bytes=64 << 20))
    engine.start()
    counts: dict[tuple[str, str, int], int] = {}
    started, seed = time.time(), options.seed
    with serving(engine, max_output_tokens=5) as served:
        while sum(counts.values()) < options.cases:
            for case, count in fuzz(served.url, EXAMPLES, seed).items():
                counts[case] = counts.get(case, 0) + count
            seed += 1
            print(f"{sum(counts.values())} cases, {time.time() - started:.0f} s", flush=True)
    engine.wait_idle(60)
    leaked = engine.store.pool.used - engine.scheduler.prefixes.pages
    engine.stop()
    result = {
        "what": "Answers to generated requests, by operation, validity of the request, and status.",
        "provenance": provenance(),
        "cases": sum(counts.values()),
        "seconds": time.time() - started,
        "first_seed": options.seed,
        "last_seed": seed - 1,
        "examples_per_seed": EXAMPLES,
        "checks": [check.__name__ for check in CHECKS],
        "tools": {package: version(package) for package in PACKAGES},
        "server_errors": sum(count for (_, _, status), count in counts.items() if status >= 500),
        "schema_violations": 0,  # the first one ends the run
        "leaked_pages": leaked,
        "answers": [
            {"operation": operation, "requests": kind, "status": status, "count": count}
            for (operation, kind, status), count in sorted(counts.items())
        ],
    }
    print(json.dumps({name: value for name, value in result.items() if name != "answers"}))
    if options.cases >= LEAST_CASES:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["server_errors"] or leaked else 0


if __name__ == "__main__":
    sys.exit(main())
