"""Requests generated from the served OpenAPI schema, for the test and for scripts/fuzz_server.py."""

import warnings
from collections import Counter

import hypothesis
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import MODEL

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
LARGEST = {"max_tokens": 5, "max_completion_tokens": 5, "max_output_tokens": 5, "n": 3}


def fuzz(url: str, examples: int, seed: int) -> Counter[tuple[str, str, int]]:
    """Send `examples` valid and as many invalid requests to every operation; answers by operation, kind
    and status. Any 5xx and any answer that the schema does not allow is raised.

    Most bodies are given the name of the model served and few tokens to generate, so that they reach it.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    seen: Counter[tuple[str, str, int]] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:
            # without a body there is nothing to be wrong: any text may be a model's name
            if mode.is_negative and not operation.body:
                continue
            run_operation(operation, mode, examples, seed, seen)
    return seen


def run_operation(operation, mode, examples, seed, seen):
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        body = case.body
        if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) % 4 != 1:
            body["model"] = MODEL
            for name, largest in LARGEST.items():
                if isinstance(body.get(name), int):
                    body[name] = body[name] % (largest + 1)
        answer = case.call(timeout=120)
        seen[operation.label, mode.value, answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        send()
