"""A few seconds of benchmarks/serve_soak.py: bad manners leave no page behind and cause no 5xx."""

import asyncio
import sys
from pathlib import Path

from serving import serving

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_bad_manners_leave_nothing_behind(make_engine, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import serve_soak

    monkeypatch.setattr(serve_soak, "MODEL", "demo")
    settings = {"max_body_bytes": serve_soak.MAX_BODY}
    with (
        make_engine(max_running=4, max_waiting=2, pages=120) as engine,
        serving(engine, **settings) as served,
    ):
        result = asyncio.run(serve_soak.soak(served.url, 3.0, None, clients=12))
    assert serve_soak.faults({**result, "exit_code": 0}) == []
    assert {"200", "429"} <= set(result["statuses"]), result["statuses"]
    assert result["actions"].get("leave")
    for name in ("serve_soak", "provenance"):
        sys.modules.pop(name, None)
