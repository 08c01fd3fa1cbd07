"""Decode speed of two models in turns within one process, so that what the machine does besides falls on both."""

import time

from inhouse.core.settings import load_settings
from inhouse.engine.request import SamplingParams, TokenEvent, make_request
from inhouse.engine.session import Session

TOKENS = 200  # of a decode


def decodes_in_turns(before: str, after: str, rounds: int) -> list[tuple[float, float]]:
    """Tokens a second after the first, of one greedy sequence on one thread; a round before these warms up."""
    settings = load_settings({"threads": 1, "max_sequences": 1})
    with Session.open(before, settings) as one, Session.open(after, settings) as other:
        return [(_speed(one, i), _speed(other, i)) for i in range(rounds + 1)][1:]


def _speed(session: Session, number: int) -> float:
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    request = make_request(f"speed-{number}", session.prompt_ids("Once upon a time"), params, TOKENS)
    times = [time.perf_counter() for event in session.engine.stream(request) if isinstance(event, TokenEvent)]
    return (len(times) - 1) / (times[-1] - times[0])
