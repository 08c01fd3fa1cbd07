"""Runs a workload on a session and reports its speed beside what the machine could reach: prompts alone, one stream,
several streams.

Prompts are random token ids, drawn from a fixed seed; answers ignore end tokens, so that every run does equal work.
A rate of answers counts only what comes after every sequence has begun: an engine that admits prompts one after the
other makes tokens for the first ones before, in time that is not counted.
"""

import queue
import random
import statistics
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from inhouse.core.errors import UsageError
from inhouse.engine.request import Event, Failed, Finished, SamplingParams, Timings, TokenEvent, make_request
from inhouse.engine.session import Session
from inhouse.runtime.probe import Peaks
from inhouse.tune.limits import Chunk, Work, disturbed, mean_peaks, step_work


@dataclass(frozen=True, slots=True)
class Cell:
    """One workload: `streams` sequences at once, each with a prompt and an answer of that many tokens."""

    key: str
    streams: int
    prompt: int
    answer: int

    @property
    def prefill(self) -> bool:
        """Whether it is the prompt that is measured; else it is what follows."""
        return self.answer == 1


CELLS: tuple[Cell, ...] = (
    Cell("prefill512", 1, 512, 1),
    Cell("prefill4096", 1, 4096, 1),
    Cell("decode32", 1, 32, 128),
    Cell("decode2048", 1, 2048, 128),
    Cell("decode8192", 1, 8192, 128),
    Cell("batch8", 8, 128, 128),
    Cell("batch32", 32, 128, 128),
)
USUAL = ("prefill512", "decode32", "decode2048", "batch8", "batch32")
SHRINKABLE = 512  # a prompt of at most this is cut to a short context; a longer one is what its cell is about


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians over the rounds. Rates are over all streams together.

    `tokens_s`, `gb_s` (weights and cache read), `gop_s` (integer, float and attention operations) and `share` (of the
    roofline of `tune.limits`, at the mean of the peaks probed before and after) are those of what the cell is about:
    the prompt where the answer is one token, else what follows. `disturbed`: the two probes allow limits that differ
    by more than a tenth, so that the share says little.
    """

    cell: str
    streams: int
    prompt: int
    answer: int
    tokens_s: float
    gb_s: float
    gop_s: float
    share: float
    prefill_tokens_s: float
    decode_tokens_s: float
    first_token_s: float
    rounds: int
    disturbed: bool
    peaks: Peaks
    peaks_after: Peaks

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


class Begun(NamedTuple):
    """When every sequence had its first token (seconds), and how many tokens were out then, of all sequences."""

    time: float
    tokens: int


def choose(keys: str) -> list[Cell]:
    """The cells of a comma-separated list, `usual` or `all`; raises UsageError for an unknown one."""
    names = {"usual": USUAL, "all": tuple(c.key for c in CELLS)}.get(keys, tuple(keys.split(",")))
    known = {cell.key: cell for cell in CELLS}
    for name in names:
        if name not in known:
            raise UsageError(f"unknown cell {name!r}", remedy=f"Known: {', '.join(known)}, usual, all", param="cells")
    return [known[name] for name in names]


def fit(cell: Cell, context: int, limit: int) -> Cell | None:
    """The cell cut to the engine's limit of sequences and to a short context; None where it needs a longer one."""
    if cell.prompt > SHRINKABLE and cell.prompt + cell.answer > context:
        return None
    answer = min(cell.answer, max(1, context // 2))
    return Cell(cell.key, min(cell.streams, limit), min(cell.prompt, context - answer), answer)


def measure(session: Session, cell: Cell, probe: Callable[[], Peaks], rounds: int = 3, seed: int = 0) -> Measured:
    """Runs a cell `rounds` times after one warm-up, and `probe`, which gives the machine's peaks, before and after.
    Raises what the engine raises."""
    draw, before = random.Random(seed), probe()
    runs = [_round(session, cell, draw) for _ in range(rounds + 1)][1:]
    after = probe()
    prefill, decode, first = (statistics.median(column) for column in zip(*runs, strict=True))
    rate = prefill if cell.prefill else decode
    tokens, work = least_work(session, cell)
    times = rate / tokens  # how often a second that work is done
    return Measured(
        cell.key, cell.streams, cell.prompt, cell.answer, rate, work.bytes_read * times / 1e9, work.ops * times / 1e9,
        work.seconds(mean_peaks(before, after)) * times, prefill, decode, first, rounds,
        disturbed(work, before, after), before, after,
    )  # fmt: skip


def least_work(session: Session, cell: Cell) -> tuple[int, Work]:
    """Tokens and least work of what the cell is about: the whole prompts, or one step in the middle of the answers."""
    model, budget = session.model, session.engine.config.step_tokens
    programs, weights, kv_dtype = model.executor.programs, model.weights, model.executor.kv_dtype
    if not cell.prefill:
        chunk = Chunk(1, cell.prompt + cell.answer // 2)
        return cell.streams, step_work(programs, weights, kv_dtype, [chunk] * cell.streams)
    total = Work()
    for past in range(0, cell.prompt, budget):
        new = min(budget, cell.prompt - past)
        last = past + new == cell.prompt
        total += step_work(programs, weights, kv_dtype, [Chunk(new, past, int(last))])
    return cell.prompt, total


def begun(tokens: Sequence[tuple[str, float]], streams: int) -> Begun:
    """The end of the step in which the last of `streams` sequences had its first token, from (sequence, time) of every
    token in the order in which they came. The tokens of a step come one right after the other; before that sequence
    has its second token lies the end of the step, where they pause longest. Raises ValueError where a sequence has
    none."""
    first: dict[str, int] = {}
    for i, (name, _) in enumerate(tokens):
        first.setdefault(name, i)
    if len(first) < streams:
        raise ValueError(f"{len(first)} of {streams} sequences had a token")
    at = max(first.values())
    name = tokens[at][0]
    again = next((i for i in range(at + 1, len(tokens)) if tokens[i][0] == name), None)
    if again is None:
        return Begun(tokens[-1][1], len(tokens))
    last = max(range(at, again), key=lambda i: tokens[i + 1][1] - tokens[i][1])
    return Begun(tokens[last][1], last + 1)


def _round(session: Session, cell: Cell, draw: random.Random) -> tuple[float, float, float]:
    """(prefill tokens/s, decode tokens/s, median seconds to the first token) of one round."""
    ends, tokens = _run(session, cell, draw)
    first = [t.queue + t.prefill for t in ends]
    return cell.streams * cell.prompt / max(first), rate_of_answers(tokens, cell.streams), statistics.median(first)


def rate_of_answers(tokens: list[tuple[str, float]], streams: int) -> float:
    """Tokens a second of all streams together after the last of them had its first one; 0 where none came then."""
    start = begun(tokens, streams)
    span = tokens[-1][1] - start.time
    return (len(tokens) - start.tokens) / span if span > 0 else 0.0


def _run(session: Session, cell: Cell, draw: random.Random) -> tuple[list[Timings], list[tuple[str, float]]]:
    """The times of every sequence, and (sequence, time) of every token."""
    events: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    vocab = session.engine.vocab_size
    for _ in range(cell.streams):
        prompt = [draw.randrange(vocab) for _ in range(cell.prompt)]
        session.engine.submit(make_request(f"bench-{uuid.uuid4().hex}", prompt, params, cell.answer), events.put)
    ends: list[Timings] = []
    tokens: list[tuple[str, float]] = []
    while len(ends) < cell.streams:
        for event in events.get():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, TokenEvent):
                tokens += [(event.request_id, event.time)] * len(event.tokens)
            if isinstance(event, Finished):
                ends.append(event.timings)
    return ends, sorted(tokens, key=lambda token: token[1])
