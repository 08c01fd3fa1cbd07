"""One choice for each matrix under a budget: the multiple-choice knapsack behind ranks, bits and sparsities.

Knows costs and losses; does not know what is chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from inhouse.core.errors import UsageError

CELLS = 1 << 16  # steps of the budget; costs are rounded up to them, so it is never exceeded


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to store a matrix (or a group of matrices that must be stored alike)."""

    label: str
    cost: int  # bytes or parameters
    loss: float  # not negative; losses of all matrices add up


def allocate(options: Mapping[str, Sequence[Choice]], budget: int, cells: int = CELLS) -> dict[str, Choice]:
    """Least total loss with total cost at most `budget`.

    Exact where costs are multiples of their largest common cell (budget / `cells` rounded up, or 1); else each cost is
    rounded up to whole cells, which can only leave budget unused. Among equal losses the cheaper choice, then the
    earlier. Deterministic; O(options * cells).

    Raises UsageError if a matrix has no choice, or the cheapest of all exceed the budget (an unreachable target).
    """
    empty = [name for name, choices in options.items() if not choices]
    if empty:
        raise UsageError(f"{empty[0]} has nothing to choose from", param=empty[0])
    least = sum(min(choice.cost for choice in choices) for choices in options.values())
    if least > budget:
        raise UsageError(
            f"the target is {budget} for what is chosen, the smallest that these methods can reach is {least}",
            remedy="Raise the target, or allow stronger methods", param="budget",
        )  # fmt: skip
    cell = _cell(options, budget, cells)
    room = budget // cell
    names = sorted(options)
    best = np.zeros(room + 1)
    picks: list[np.ndarray] = []
    for name in names:
        best, pick = _add(best, [(-(-c.cost // cell), c.loss) for c in options[name]], room)
        picks.append(pick)
    if not np.isfinite(best[room]):  # rounding up to cells left no room: the cheapest still fit
        return {name: min(choices, key=lambda c: (c.cost, c.loss)) for name, choices in options.items()}
    at, found = int(np.flatnonzero(best == best[room])[0]), {}
    for name, pick in zip(reversed(names), reversed(picks), strict=True):
        chosen = options[name][int(pick[at])]
        found[name] = chosen
        at -= -(-chosen.cost // cell)
    return {name: found[name] for name in options}


def _cell(options: Mapping[str, Sequence[Choice]], budget: int, cells: int) -> int:
    """The unit of cost: what divides all of them, if that leaves no more than `cells` steps; else budget / cells."""
    common = int(np.gcd.reduce([choice.cost for choices in options.values() for choice in choices]))
    return max(1, common if common and budget // common <= cells else -(-budget // cells))


def _add(best: np.ndarray, choices: Sequence[tuple[int, float]], room: int) -> tuple[np.ndarray, np.ndarray]:
    """Least loss within each amount of room when one more matrix is placed, and which choice reaches it."""
    new = np.full(room + 1, np.inf)
    pick = np.zeros(room + 1, np.int32)
    for index, (cost, loss) in sorted(enumerate(choices), key=lambda entry: entry[1][0]):
        if cost > room:
            continue
        shifted = best[: room + 1 - cost] + loss
        better = shifted < new[cost:]
        new[cost:][better] = shifted[better]
        pick[cost:][better] = index
    return new, pick
