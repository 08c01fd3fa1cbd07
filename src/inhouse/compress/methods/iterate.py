"""Iterative pruning: score anew, prune a little more, heal, look, until the target or the quality gate.

Sources: gradual schedule (Zhu and Gupta 2017, arXiv 1710.01878); at most a third a round, then distill (Minitron,
2407.14679). Knows neither scores nor training: rounds are functions given by the caller, so that any pruning page and
any healing works.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from inhouse.core.errors import UsageError

State = TypeVar("State")


@dataclass(frozen=True, slots=True)
class Round:
    """One round: the share it pruned to, what the measure said after healing, whether the gate let it through."""

    number: int
    target: float
    value: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Iterated(Generic[State]):
    """How it ended: the last good state (None: not even the first round passed), every round, and why it stopped."""

    state: State | None
    rounds: list[Round] = field(default_factory=list)
    reason: str = ""

    @property
    def reached(self) -> float:
        """The share of the last good round; 0 if there is none."""
        return max((r.target for r in self.rounds if r.passed), default=0.0)


def cubic_schedule(start: float, end: float, rounds: int) -> list[float]:
    """s_t = s_f + (s_0 - s_f) (1 - t / T)^3 for t = 1 .. T: fast at first, slow at the end."""
    _check(start, end, rounds)
    return [end + (start - end) * (1 - t / rounds) ** 3 for t in range(1, rounds + 1)]


def geometric_schedule(start: float, end: float, rounds: int) -> list[float]:
    """What is left shrinks by the same factor every round."""
    _check(start, end, rounds)
    return [1 - (1 - start) * ((1 - end) / (1 - start)) ** (t / rounds) for t in range(1, rounds + 1)]


def _check(start: float, end: float, rounds: int) -> None:
    if rounds < 1 or not 0 <= start < end < 1:
        raise UsageError(f"{rounds} rounds from {start} to {end}: at least one, 0 <= start < end < 1", param="rounds")


def iterate(
    state: State,
    targets: Sequence[float],
    *,
    prune: Callable[[State, float], State],
    heal: Callable[[State, int], State],
    measure: Callable[[State], float],
    gate: float | None = None,
) -> Iterated[State]:
    """Runs rounds until the last target or until the gate breaks; a state is never changed in place.

    Args:
        state: where it starts.
        targets: share pruned after each round, rising.
        prune: (state, target) -> pruned state. It scores by statistics of the state that it is given, so scores are
            recomputed in every round.
        heal: (state, round from 0) -> healed state.
        measure: what the gate looks at, lower is better (a loss).
        gate: a round whose measure is above it is thrown away, and the round before is the result; None: no gate.

    Raises UsageError unless targets rise within (0, 1).
    """
    if not targets or any(not 0 < t < 1 for t in targets) or list(targets) != sorted(set(targets)):
        raise UsageError(f"targets {list(targets)} must rise within 0 and 1", param="targets")
    good: State | None = None
    rounds: list[Round] = []
    for number, target in enumerate(targets):
        state = heal(prune(state, target), number)
        value = measure(state)
        passed = gate is None or value <= gate
        rounds.append(Round(number, target, value, passed))
        if not passed:
            kept = "no round is kept" if good is None else f"round {number - 1} is kept"
            return Iterated(good, rounds, f"the gate of {gate:g} broke at {target:.1%} ({value:g}); {kept}")
        good = state
    return Iterated(good, rounds, "the target was reached")
