"""Ranks: how many directions a ratio leaves, and which ranks of a whole model cost least under one budget.

Knows spectra and the knapsack; does not know models.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from inhouse.compress.allocate import Choice, allocate
from inhouse.compress.spectrum import Spectrum, rank_choices


def rank_for(shape: tuple[int, int], ratio: float) -> int:
    """The largest rank whose factors save at least `ratio` of the matrix's numbers; 0 where there is none."""
    rows, columns = shape
    return int((1.0 - ratio) * rows * columns / (rows + columns))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A matrix that may be cut, and how much its error matters."""

    spectrum: Spectrum
    weight: float = 1.0  # loss of the model for one unit of squared output error


def measured_weight(spectrum: Spectrum, rank: int, loss: float) -> float:
    """The `Candidate.weight` at which the error of that rank is the loss that was measured with this matrix alone cut
    to it (never negative: noise may make a measured loss so)."""
    tail = float(spectrum.tail[rank])
    return max(loss, 0.0) / tail if tail > 0 else 0.0


def ranks_by_budget(candidates: Mapping[str, Candidate], budget: int, step: int = 1) -> dict[str, int]:
    """The rank of each matrix, 0 for those left whole, that keep at most `budget` numbers in all at the least loss.

    Thin matrices (k and v of grouped-query attention) are judged by their own loss, so they are cut less, or not.
    Raises UsageError for a budget below the smallest possible.
    """
    options = {
        name: [
            Choice("0", rows * columns, 0.0),
            *(
                Choice(str(rank), rank * (rows + columns), one.weight * float(one.spectrum.tail[rank]))
                for rank in rank_choices(one.spectrum, step)
            ),
        ]
        for name, one in candidates.items()
        for rows, columns in [one.spectrum.shape]
    }
    return {name: int(choice.label) for name, choice in allocate(options, budget).items()}
