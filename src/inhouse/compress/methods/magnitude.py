"""Magnitude pruning: the smallest weights become zero (LeCun et al. 1989; Han et al. 2015, arXiv 1506.02626).

Needs no data. The baseline that methods with data must beat.
"""

from dataclasses import dataclass

from torch import Tensor

from inhouse.compress.sparsity import held, keep, parse_pattern
from inhouse.compress.stats import LinearStats


@dataclass(frozen=True, slots=True)
class MagnitudeOptions:
    """sparsity: a share (0.5, 50%) or N:M (2:4). by_row: the share is taken in every row, not over the matrix."""

    sparsity: str | float = 0.5
    by_row: bool = False

    def __post_init__(self) -> None:
        parse_pattern(self.sparsity)


def magnitude_mask(weight: Tensor, options: MagnitudeOptions, prior: Tensor | None = None) -> Tensor:
    """What to keep of a matrix: bool [out, in].

    Args:
        weight: f32 [out, in].
        prior: an earlier mask; what it dropped stays dropped.
    """
    mask = keep(held(weight.abs(), prior), parse_pattern(options.sparsity), by_row=options.by_row)
    return mask if prior is None else mask & prior


def magnitude(weight: Tensor, stats: LinearStats | None, options: MagnitudeOptions, fmt: str = "") -> Tensor:
    """The mask, bool [out, in]; weights that are 0 already stay so. `stats` and `fmt` are not asked."""
    return magnitude_mask(weight, options, weight != 0)
