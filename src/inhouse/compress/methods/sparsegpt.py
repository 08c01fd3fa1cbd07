"""SparseGPT: one sweep over the columns that prunes, and lets the later columns answer for what was lost (Frantar and
Alistarh 2023, arXiv 2301.00774); with a grid it rounds what stays in the same sweep, as GPTQ does (arXiv 2210.17323).

With H = X^T X and U the upper Cholesky factor of H^-1, dropping w_j costs w_j^2 / U_jj^2 and is made up for by
w_{j+1..} -= w_j / U_jj * U_{j, j+1..}: optimal brain surgeon on what the sweep has not passed yet.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inhouse.compress.sparsity import Pattern, held, keep_groups, keep_matrix, masked, refit
from inhouse.core.errors import UsageError

Round = Callable[[Tensor, int], Tensor]
"""(weights of one column [out], its index) -> the values that the grid has for them [out]; 0 must stay 0."""


@dataclass(frozen=True, slots=True)
class SparseGptOptions:
    """`refit_steps`: conjugate-gradient steps that fit all kept weights to the mask afterwards (0: none; not with a
    grid). The sweep alone cannot change columns that it has passed."""

    pattern: Pattern = Pattern()
    block: int = 128  # columns whose mask is chosen at once
    damping: float = 0.01  # of the mean diagonal of H
    refit_steps: int = 0


def inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(U, dead): the upper Cholesky factor of the inverse of the damped Gram matrix, f64 [in, in], and the inputs
    that never were anything but 0, bool [in]. Damping grows tenfold until the matrix has a factor."""
    h = gram.double().clone()
    dead = h.diagonal() <= 0
    h.diagonal()[dead] = 1.0
    mean = float(h.diagonal().mean())
    for power in range(6):
        tried = h.clone()
        tried.diagonal().add_(damping * mean * 10.0**power)
        lower, bad = torch.linalg.cholesky_ex(tried)
        if int(bad) == 0:
            upper, worse = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(worse) == 0 and bool(torch.isfinite(upper).all()):
                return upper, dead
    raise UsageError("the statistics of the inputs have no Cholesky factor", remedy="Give more calibration text")


def sparsegpt(
    weight: Tensor, gram: Tensor, options: SparseGptOptions, prior: Tensor | None = None, grid: Round | None = None
) -> tuple[Tensor, Tensor]:
    """Prunes one matrix.

    Args:
        weight: f32 [out, in].
        gram: [in, in], mean or sum of x x^T over the calibration tokens.
        prior: an earlier mask; what it dropped stays dropped.
        grid: rounds the kept weights of a column; None: they stay floats.

    Returns (f32 [out, in] with exact zeros, mask bool [out, in]). Raises UsageError where shapes do not fit.
    """
    rows, width = weight.shape
    if gram.shape != (width, width):
        raise UsageError(f"{width} inputs were given a Gram matrix of {list(gram.shape)}")
    upper, dead = inverse_factor(gram, options.damping)
    w = weight.double().clone()
    w[:, dead] = 0.0
    mask = torch.zeros((rows, width), dtype=torch.bool)
    step = _block(options)
    for start in range(0, width, step):
        end = min(start + step, width)
        if not options.pattern.grouped:
            mask[:, start:end] = _choose(w, upper, options.pattern, prior, start, end)
        _sweep(w, upper, mask, (start, end), options.pattern, prior, grid)
    pruned = masked(w.float(), mask)
    if options.refit_steps and grid is None:
        pruned = refit(weight, mask, gram, steps=options.refit_steps)
    return pruned, mask


def _block(options: SparseGptOptions) -> int:
    """Columns chosen at once: whole groups of an N:M pattern."""
    unit = options.pattern.m or 1
    return max(unit, options.block // unit * unit)


def _choose(w: Tensor, upper: Tensor, pattern: Pattern, prior: Tensor | None, start: int, end: int) -> Tensor:
    """Mask of the columns start..end, from the weights as they are now."""
    before = None if prior is None else prior[:, start:end]
    scores = held((w[:, start:end] / upper.diagonal()[start:end]).square(), before)
    mask = keep_groups(scores, pattern.n, pattern.m) if pattern.grouped else keep_matrix(scores, pattern.sparsity)
    return mask if before is None else mask & before


def _sweep(
    w: Tensor,
    upper: Tensor,
    mask: Tensor,
    block: tuple[int, int],
    pattern: Pattern,
    prior: Tensor | None,
    grid: Round | None,
) -> None:
    """Goes through the columns of a block, then lets the later blocks answer for all of it at once. Groups of N:M are
    chosen when the sweep reaches them."""
    start, end = block
    errors = torch.zeros((w.shape[0], end - start), dtype=torch.float64)
    for j in range(start, end):
        if pattern.grouped and (j - start) % pattern.m == 0:
            last = min(j + pattern.m, end)
            mask[:, j:last] = _choose(w, upper, pattern, prior, j, last)
        column = w[:, j]
        kept = column if grid is None else grid(column.float(), j).double()
        left = torch.where(mask[:, j], kept, 0.0)
        error = (column - left) / upper[j, j]
        w[:, j] = left
        w[:, j + 1 : end] -= error[:, None] * upper[j, j + 1 : end]
        errors[:, j - start] = error
    w[:, end:] -= errors @ upper[start:end, end:]
