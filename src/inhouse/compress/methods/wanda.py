"""Wanda: weights times the norm of their inputs, compared within each output row (Sun et al. 2023, arXiv 2306.11695).

The weights that stay do not change, unless `refit` asks for the least-squares fit to the mask. One number for each
input is all that the mask asks of the data; the fit asks for the Gram matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from inhouse.compress.sparsity import held, keep, masked, parse_pattern, refit
from inhouse.compress.stats import LinearStats
from inhouse.compress.values import Natural
from inhouse.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class WandaOptions:
    """sparsity: a share (0.5, 50%) or N:M (2:4). by_row: as the paper has it; else over the whole matrix.
    refit: conjugate-gradient steps that fit the kept weights to the outputs of all (0: none, as in the paper)."""

    sparsity: str | float = 0.5
    by_row: bool = True
    refit: Natural = 0

    def __post_init__(self) -> None:
        parse_pattern(self.sparsity)


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
    scores = held(wanda_scores(weight, mean_square), prior)
    mask = keep(scores, parse_pattern(options.sparsity), by_row=options.by_row)
    return mask if prior is None else mask & prior


def wanda(weight: Tensor, stats: LinearStats | None, options: WandaOptions, fmt: str = "") -> Tensor:
    """The mask, bool [out, in], or with `refit` the weights f32 [out, in]; weights that are 0 already stay so. Without
    statistics (embeddings of their own, experts that saw no token) inputs count alike: magnitudes by row.

    Raises UsageError where `refit` finds no Gram matrix among the statistics.
    """
    mean_square = torch.ones(weight.shape[1]) if stats is None else stats.mean_square
    mask = wanda_mask(weight, mean_square, options, weight != 0)
    if not options.refit or stats is None:
        return mask
    if stats.gram is None:
        raise UsageError("refit needs the Gram matrix of the inputs", param="refit")
    return refit(masked(weight, weight != 0), mask, stats.gram, steps=options.refit)


def wanda_needs(options: WandaOptions) -> str:
    """What calibration must give."""
    return "gram" if options.refit else "moments"
