"""The knapsack against enumeration of all its choices."""

import itertools

import numpy as np
import pytest

from inhouse.compress.allocate import Choice, allocate
from inhouse.core.errors import UsageError


def made(seed: int, matrices: int = 6) -> dict[str, list[Choice]]:
    draw = np.random.default_rng(seed)
    return {
        f"m{i}": [Choice(str(j), int(draw.integers(1, 60)), float(draw.random())) for j in range(draw.integers(1, 5))]
        for i in range(matrices)
    }


@pytest.mark.parametrize("seed", range(25))
def test_the_optimum_is_that_of_enumeration(seed: int) -> None:
    options = made(seed)
    least = sum(min(c.cost for c in choices) for choices in options.values())
    for budget in (least, least + 17, least + 60, 10_000):
        found = allocate(options, budget)
        assert sum(c.cost for c in found.values()) <= budget
        every = itertools.product(*options.values())
        best = min(sum(c.loss for c in pick) for pick in every if sum(c.cost for c in pick) <= budget)
        assert sum(c.loss for c in found.values()) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_coarse_cells_never_exceed_the_budget(seed: int) -> None:
    options = made(seed, matrices=9)
    least = sum(min(c.cost for c in choices) for choices in options.values())
    for budget in range(least, least + 120, 13):
        assert sum(c.cost for c in allocate(options, budget, cells=20).values()) <= budget


def test_an_unreachable_budget_is_refused_with_the_least() -> None:
    with pytest.raises(UsageError, match="smallest that these methods can reach is 7"):
        allocate({"a": [Choice("x", 3, 0.0)], "b": [Choice("y", 4, 0.0)]}, 6)
    with pytest.raises(UsageError, match="nothing to choose"):
        allocate({"a": []}, 6)


def test_order_of_names_does_not_matter() -> None:
    options = made(3)
    turned = dict(reversed(options.items()))
    assert allocate(options, 150) == allocate(turned, 150)
