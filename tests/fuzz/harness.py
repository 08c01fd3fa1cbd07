"""Runs a range of inputs of one target under a limit of time and memory each, and says what came of them.

Knows limits and verdicts; does not know formats, processes or progress.
"""

import os
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from inhouse.core.errors import InhouseError

from .targets import Target, make_input

# Wall clock, so that waiting counts too; generous, because other processes may hold the cores.
SECONDS_PER_INPUT = 10.0
BYTES_BEYOND_START = 1 << 30


class TooSlow(BaseException):
    """An input took longer than its limit. Not an Exception, so that no reader can swallow it."""


@dataclass(slots=True)
class Outcome:
    """Counts of verdicts: `accepted`, or the class of the error; failures are (index, what happened)."""

    verdicts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    slowest_s: float = 0.0  # CPU time
    slowest_index: int = -1

    def add(self, other: "Outcome") -> None:
        self.verdicts += other.verdicts
        self.failures += other.failures
        if other.slowest_s > self.slowest_s:
            self.slowest_s, self.slowest_index = other.slowest_s, other.slowest_index

    @property
    def inputs(self) -> int:
        return sum(self.verdicts.values())


def run_range(target: Target, seed: int, begin: int, end: int, folder: Path, started: Callable[[int], None]) -> Outcome:
    """Runs inputs begin..end-1 in `folder`, which must be empty; `started(index)` is called before each."""
    outcome = Outcome()
    base = target.seeds()
    for name, data in target.beside().items():
        (folder / name).write_bytes(data)
    with _memory_limit(BYTES_BEYOND_START):
        for index in range(begin, end):
            started(index)
            data = make_input(target, base, seed, index)
            began = time.process_time()
            verdict, failure = run_input(target, data, folder)
            took = time.process_time() - began
            outcome.verdicts[verdict] += 1
            if failure:
                outcome.failures.append((index, failure))
            if took > outcome.slowest_s:
                outcome.slowest_s, outcome.slowest_index = took, index
    return outcome


def run_input(target: Target, data: bytes, folder: Path) -> tuple[str, str]:
    """(verdict, what broke the promise, or "" if it held)."""
    path = folder / "input"
    path.write_bytes(data)
    before = sorted(os.listdir(folder))
    try:
        with _time_limit(SECONDS_PER_INPUT):
            target.accept(path)
        verdict, failure = "accepted", ""
    except InhouseError as error:
        verdict, failure = type(error).__name__, "" if str(error) else "an error without a message"
    except TooSlow:
        verdict, failure = "failed", f"took more than {SECONDS_PER_INPUT} s"
    except Exception:
        verdict, failure = "failed", traceback.format_exc(limit=-4)
    if sorted(os.listdir(folder)) != before or path.read_bytes() != data:
        verdict, failure = "failed", "the folder changed"
    return verdict, failure


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def _memory_limit(beyond: int) -> Iterator[None]:
    """At most `beyond` bytes of address space more than now; an input that wants more gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + beyond
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
