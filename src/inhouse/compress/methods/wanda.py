"""Wanda: weights times the norm of their inputs, compared within each output row (Sun et al. 2023, arXiv 2306.11695).

The weights that stay do not change. One number for each input is all that it asks of the data.
"""

from dataclasses import dataclass

from torch import Tensor

from inhouse.compress.sparsity import Pattern, held, keep
from inhouse.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class WandaOptions:
    """`by_row`: as the paper has it; else over the whole matrix."""

    pattern: Pattern = Pattern()
    by_row: bool = True


def wanda_scores(weight: Tensor, mean_square: Tensor) -> Tensor:
    """|w_ij| * ||x_j||_2, f32 [out, in], up to a factor that all share; `mean_square` [in] is that of the inputs."""
    if mean_square.shape != (weight.shape[1],):
        raise UsageError(f"{weight.shape[1]} inputs were given statistics of {list(mean_square.shape)}")
    return weight.abs() * mean_square.to(weight.dtype).clamp_min(0.0).sqrt()


def wanda_mask(weight: Tensor, mean_square: Tensor, options: WandaOptions, prior: Tensor | None = None) -> Tensor:
    """What to keep of a matrix: bool [out, in].

    Args:
        weight: f32 [out, in].
        mean_square: [in], mean of x_j^2 over the calibration tokens.
        prior: an earlier mask; what it dropped stays dropped.
    """
    mask = keep(held(wanda_scores(weight, mean_square), prior), options.pattern, by_row=options.by_row)
    return mask if prior is None else mask & prior
