"""The server keeps the promises of its own OpenAPI schema. The long run: scripts/fuzz_server.py."""

import pytest

pytest.importorskip("schemathesis")

from fuzz import fuzz
from serving import serving


def test_generated_requests_get_no_5xx_and_no_answer_outside_the_schema(make_engine):
    with make_engine() as engine, serving(engine, max_output_tokens=5) as served:
        seen = fuzz(served.url, examples=12, seed=0)
    statuses = {status for _, _, status in seen}
    assert {200, 400, 404} <= statuses and not any(status >= 500 for status in statuses)
    # how many are served is chance: what is drawn depends on the modules that are loaded, too
    assert any(seen["POST " + path, "positive", 200] for path in PATHS), seen


PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
