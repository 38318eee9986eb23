"""Requests to an engine, and what came of them."""

from typing import Any

from tqai.server.engine.engine import Engine
from tqai.server.engine.sampling import SamplingParams
from tqai.server.engine.sequence import Delta, Finished, GenerationRequest


class Outcome:
    """What came of a request."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    @property
    def tokens(self) -> list[int]:
        return [chosen.token for chosen in self.chosen]

    @property
    def chosen(self) -> list[Any]:
        return [chosen for event in self.events if isinstance(event, Delta) for chosen in event.chosen]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def end(self) -> Any:
        return self.events[-1]


def request(prompt: list[int], **params: Any) -> GenerationRequest:
    params.setdefault("temperature", 0.0)
    choice = params.pop("choice", 0)
    return GenerationRequest(list(prompt), SamplingParams(**params), choice)


def run(engine: Engine, requests: list[GenerationRequest]) -> list[Outcome]:
    """Submit all at once, wait, and return what came of each."""
    outcomes = [Outcome() for _ in requests]
    for wanted, outcome in zip(requests, outcomes, strict=True):
        engine.submit(wanted, outcome.events.append)
    assert engine.wait_idle(240)
    return outcomes


def run_one(engine: Engine, wanted: GenerationRequest) -> Outcome:
    (outcome,) = run(engine, [wanted])
    return outcome


def finished(outcome: Outcome) -> bool:
    return isinstance(outcome.end, Finished)
