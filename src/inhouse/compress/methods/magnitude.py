"""Magnitude pruning: the smallest weights become zero (LeCun et al. 1989; Han et al. 2015, arXiv 1506.02626).

Needs no data. The baseline that methods with data must beat.
"""

from dataclasses import dataclass

from torch import Tensor

from inhouse.compress.sparsity import Pattern, held, keep


@dataclass(frozen=True, slots=True)
class MagnitudeOptions:
    """`by_row`: the share is taken in every row, not over the matrix."""

    pattern: Pattern = Pattern()
    by_row: bool = False


def magnitude_mask(weight: Tensor, options: MagnitudeOptions, prior: Tensor | None = None) -> Tensor:
    """What to keep of a matrix: bool [out, in].

    Args:
        weight: f32 [out, in].
        prior: an earlier mask; what it dropped stays dropped.
    """
    mask = keep(held(weight.abs(), prior), options.pattern, by_row=options.by_row)
    return mask if prior is None else mask & prior
