"""Speed and memory of two models on this machine, measured in turns. Knows sessions; claims nothing about others."""

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any
from uuid import uuid4

from inhouse.core.settings import load_settings
from inhouse.engine.request import Failed, SamplingParams, TokenEvent, make_request
from inhouse.engine.session import Session
from inhouse.plan.memory import token_bytes

PROMPT, ANSWER, ROUNDS = 128, 48, 3


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over the rounds. Tokens a second at one stream; bytes of packed weights in memory; what K and V are kept
    as, and the bytes that one more token of a long sequence takes of them."""

    prefill: float
    decode: float
    weights: int
    kv_dtype: str
    kv_token: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(before: str, after: str, threads: int | None = None, rounds: int = ROUNDS) -> tuple[Speed, Speed]:
    """Both models, open at once, in turns: before, after, before, after ..."""
    settings = load_settings({"threads": threads, "max_sequences": 1, "prefix_cache": False})
    with Session.open(before, settings) as one, Session.open(after, settings) as two:
        sessions = (one, two)
        seen: tuple[list[tuple[float, float]], ...] = ([], [])
        for _ in range(rounds):
            for session, figures in zip(sessions, seen, strict=True):
                figures.append(_once(session))
        made = [
            Speed(
                median(f[0] for f in figures), median(f[1] for f in figures), session.model.report.nbytes,
                session.model.executor.kv_dtype,
                token_bytes(session.model.executor.programs, session.model.executor.kv_dtype),
            )
            for session, figures in zip(sessions, seen, strict=True)
        ]  # fmt: skip
    return made[0], made[1]


def _once(session: Session) -> tuple[float, float]:
    """(prefill, decode) tokens a second of one request."""
    context = session.engine.context_length
    prompt = min(PROMPT, context // 2)
    answer = min(ANSWER, context - prompt)
    ids = [3 + i % max(session.engine.vocab_size - 3, 1) for i in range(prompt)]
    request = make_request(f"speed-{uuid4()}", ids, SamplingParams(temperature=0.0, ignore_eos=True), answer)
    begun, times = time.perf_counter(), []
    for event in session.engine.stream(request):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, TokenEvent):
            times.append(time.perf_counter())
    return prompt / (times[0] - begun), (len(times) - 1) / max(times[-1] - times[0], 1e-9)
