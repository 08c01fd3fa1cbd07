"""Runs a workload on a session and reports its speed: prompts alone, one stream, several streams.

Prompts are random token ids, drawn from a fixed seed; answers ignore end tokens, so that every run does equal work.
"""

import queue
import random
import statistics
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from inhouse.engine.request import Event, Failed, Finished, SamplingParams, Timings, make_request
from inhouse.engine.session import Session
from inhouse.plan.memory import weight_bytes


@dataclass(frozen=True, slots=True)
class Cell:
    """One workload: `streams` sequences at once, each with a prompt and an answer of that many tokens."""

    name: str
    streams: int
    prompt: int
    answer: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians over the rounds. Rates are over all streams together, in tokens a second; `weights_gb_s` is the rate at
    which decoding reads the packed weights (each step reads them once, however many streams share it)."""

    name: str
    streams: int
    prompt: int
    answer: int
    prefill_tokens_s: float
    decode_tokens_s: float
    first_token_s: float
    weights_gb_s: float
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


CELLS: tuple[Cell, ...] = (
    Cell("prefill 512", 1, 512, 1),
    Cell("decode, 1 stream", 1, 32, 128),
    Cell("decode, 8 streams", 8, 128, 128),
    Cell("decode, 32 streams", 32, 128, 128),
)


def fit(cell: Cell, context: int, limit: int) -> Cell:
    """The cell cut to a model's context and to the engine's limit of sequences."""
    answer = min(cell.answer, max(1, context // 2))
    return Cell(cell.name, min(cell.streams, limit), min(cell.prompt, context - answer), answer)


def measure(session: Session, cell: Cell, rounds: int = 3, seed: int = 0) -> Measured:
    """Runs a cell `rounds` times after one warm-up. Raises what the engine raises."""
    draw = random.Random(seed)
    runs = [_round(session, cell, draw) for _ in range(rounds + 1)][1:]
    prefill, decode, first = (statistics.median(column) for column in zip(*runs, strict=True))
    weights = weight_bytes(session.model.weights)
    steps = decode / cell.streams
    return Measured(
        cell.name, cell.streams, cell.prompt, cell.answer, prefill, decode, first, steps * weights / 1e9, rounds
    )


def _round(session: Session, cell: Cell, draw: random.Random) -> tuple[float, float, float]:
    """(prefill tokens/s, decode tokens/s, median seconds to the first token) of one round."""
    ends = list(_run(session, cell, draw))
    first = [t.queue + t.prefill for t in ends]
    prefill = cell.streams * cell.prompt / max(first)
    span = max(t.total for t in ends) - max(first)
    decode = cell.streams * (cell.answer - 1) / span if cell.answer > 1 and span > 0 else 0.0
    return prefill, decode, statistics.median(first)


def _run(session: Session, cell: Cell, draw: random.Random) -> Iterator[Timings]:
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    vocab = session.engine.vocab_size
    for _ in range(cell.streams):
        prompt = [draw.randrange(vocab) for _ in range(cell.prompt)]
        session.engine.submit(make_request(f"bench-{uuid.uuid4().hex}", prompt, params, cell.answer), events.put)
    left = cell.streams
    while left:
        for event in events.get():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                left -= 1
                yield event.timings
