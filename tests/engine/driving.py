"""How the engine's tests drive it: without a thread, invariants checked after every step, results by choice."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from inhouse.engine.engine import Engine
from inhouse.engine.request import (
    EngineConfig,
    Event,
    Failed,
    Finished,
    PromptEvent,
    Request,
    TokenEvent,
    TokenLogprob,
)
from inhouse.runtime.executor import Executor
from inhouse.runtime.sampling import ReferenceSampler, Sampler

EOS = 7


@dataclass
class Result:
    """All that a request gave."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)
    prompt: tuple[TokenLogprob, ...] = ()
    finished: dict[int, Finished] = field(default_factory=dict)
    failed: dict[int, Failed] = field(default_factory=dict)
    lasts: int = 0

    def feed(self, events: list[Event]) -> None:
        assert not self.lasts, "an event after the last"
        for event in events:
            match event:
                case TokenEvent():
                    self.tokens.setdefault(event.choice, []).extend(event.tokens)
                    self.logprobs.setdefault(event.choice, []).extend(event.logprobs)
                case PromptEvent():
                    self.prompt = event.logprobs
                case Finished():
                    self.finished[event.choice] = event
                    self.lasts += event.last
                case Failed():
                    self.failed[event.choice] = event
                    self.lasts += event.last


def make_engine(executor: Executor, sampler: Sampler | None = None, **limits: object) -> Engine:
    """An engine without a thread."""
    config = EngineConfig(**({"blocks": {g.name: 64 for g in executor.programs.groups}} | limits))  # type: ignore[arg-type]
    return Engine(executor, config, {EOS}, "digest", sampler=sampler or ReferenceSampler(), start=False)


def run_all(
    engine: Engine, requests: Iterable[Request], between: Callable[[int], None] = lambda step: None
) -> list[Result]:
    """Submits all at once and steps until nothing runs; `between` is called before each step with its number."""
    results = []
    for request in requests:
        results.append(Result())
        engine.submit(request, results[-1].feed)
    drive(engine, between)
    assert all(result.lasts == 1 for result in results)
    return results


def drive(engine: Engine, between: Callable[[int], None] = lambda step: None) -> int:
    """Steps until nothing runs, checking invariants; returns the number of steps."""
    for number in range(100_000):
        between(number)
        busy = engine.step()
        engine.check()
        if not busy:
            assert engine.stats().running == engine.stats().waiting == 0
            return number
    raise AssertionError("the engine never rests")
