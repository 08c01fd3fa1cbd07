"""SparseGPT: one sweep over the columns that prunes, and lets the later columns answer for what was lost (Frantar and
Alistarh 2023, arXiv 2301.00774); with a grid it rounds what stays in the same sweep, as GPTQ does (arXiv 2210.17323).

With H = X^T X and U the upper Cholesky factor of H^-1, dropping w_j costs w_j^2 / U_jj^2 and is made up for by
w_{j+1..} -= w_j / U_jj * U_{j, j+1..}: optimal brain surgeon on what the sweep has not passed yet.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inhouse.compress.grids import Grid
from inhouse.compress.pack_as import pack_as
from inhouse.compress.sparsity import Pattern, held, keep, masked, parse_pattern, refit
from inhouse.compress.stats import LinearStats
from inhouse.compress.values import Count, Natural, NotNegative
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.form import Form
from inhouse.runtime.packed import is_float

Round = Callable[[Tensor, int], Tensor]
"""(weights of one column [out], its index) -> the values that the grid has for them [out]; 0 must stay 0."""


@dataclass(frozen=True, slots=True)
class SparseGptOptions:
    """sparsity: a share (0.5, 50%) or N:M (2:4). block: columns whose mask is chosen at once. damping: of the mean
    diagonal of H. by_row: each row of a block gives the same share; False: the share is taken over all rows of the
    block, as the published code does, which starves rows of small weights (stories260K: perplexity 15.9, not 12.7).
    refit: conjugate-gradient steps that fit all kept weights to the mask afterwards (0: none; not with a grid): the
    sweep alone cannot change columns that it has passed."""

    sparsity: str | float = 0.5
    block: Count = 128
    damping: NotNegative = 0.01
    by_row: bool = True
    refit: Natural = 0

    def __post_init__(self) -> None:
        parse_pattern(self.sparsity)


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
    pattern = parse_pattern(options.sparsity)
    step = max(1, options.block)
    if pattern.grouped:  # whole groups
        step = max(pattern.m, step // pattern.m * pattern.m)
    for start in range(0, width, step):
        end = min(start + step, width)
        if not pattern.grouped:
            mask[:, start:end] = _choose(w, upper, prior, (start, end), pattern, options.by_row)
        _sweep(w, upper, mask, (start, end), pattern, prior, grid)
    pruned = masked(w.float(), mask)
    if options.refit and grid is None:
        pruned = refit(weight, mask, gram, steps=options.refit)
    return pruned, mask


def _choose(
    w: Tensor, upper: Tensor, prior: Tensor | None, columns: tuple[int, int], pattern: Pattern, by_row: bool
) -> Tensor:
    """Mask of some columns, from the weights as they are now."""
    start, end = columns
    before = None if prior is None else prior[:, start:end]
    scores = held((w[:, start:end] / upper.diagonal()[start:end]).square(), before)
    mask = keep(scores, pattern, by_row=by_row)
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
            mask[:, j:last] = _choose(w, upper, prior, (j, last), pattern, True)
        column = w[:, j]
        kept = column if grid is None else grid(column.float(), j).double()
        left = torch.where(mask[:, j], kept, 0.0)
        error = (column - left) / upper[j, j]
        w[:, j] = left
        w[:, j + 1 : end] -= error[:, None] * upper[j, j + 1 : end]
        errors[:, j - start] = error
    w[:, end:] -= errors @ upper[start:end, end:]


def sparse_gpt(weight: Tensor, stats: LinearStats | None, options: SparseGptOptions, fmt: str = "") -> Tensor | Form:
    """The pruned weights, f32 [out, in]; with a code format the Form of what was pruned and rounded in one sweep, its
    scales fitted to what pruning alone leaves. Weights that are 0 already stay so. Without statistics (embeddings of
    their own, experts that saw no token) inputs count alike and apart: magnitudes by row.

    Raises UsageError where there is no Gram matrix among the statistics, UnsupportedError for a format whose groups
    need not hold 0.
    """
    if stats is None:
        stats = _alike(weight.shape[1])
    if stats.gram is None:
        raise UsageError("sparsegpt needs the Gram matrix of the inputs", remedy="Give calibration texts")
    prior = weight != 0
    pruned, _ = sparsegpt(weight, stats.gram, options, prior=prior)
    if not fmt or is_float(fmt):
        return pruned if not fmt else Form(pack_as(pruned, fmt))
    grid = Grid(fmt, weight.shape[1])
    if not grid.keeps_zero:
        raise UnsupportedError(f"zeros do not stay zeros in {fmt}", remedy="Use a format with a zero point or none")
    params = grid.fit(pruned, stats.mean_square)
    index = grid.index()

    def column(values: Tensor, j: int) -> Tensor:
        return grid.nearest(values[:, None], params, index[j : j + 1])[:, 0]

    rounded, _ = sparsegpt(weight, stats.gram, options, prior=prior, grid=column)
    return Form(grid.pack(grid.round(rounded, params, index), params))


def _alike(inputs: int) -> LinearStats:
    ones = torch.ones(inputs)
    return LinearStats(1, ones, ones, ones, torch.eye(inputs))
