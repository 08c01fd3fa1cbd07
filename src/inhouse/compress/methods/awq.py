"""AWQ: inputs of large activations get a finer grid by scaling their columns up before rounding.

Lin et al. 2023, arXiv 2306.00978: s_j = mean|X_j|^a / mean|W_j|^(1-a) with a of a grid, alpha 0 (no scaling) among it,
chosen by the least output error of the rounded consumers; 1/s is folded into the producer. Then ranges are clipped
group by group, where that lowers the output error.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inhouse.compress.calibrate import Calibration
from inhouse.compress.equalize import Consumers, Found, equalize, scaled_gram
from inhouse.compress.folding import column_size, safe
from inhouse.compress.grids import Grid
from inhouse.compress.quadratic import losses
from inhouse.compress.values import Count
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from inhouse.core.progress import Progress

SHARES = tuple(1.0 - 0.05 * i for i in range(11))  # of a group's range, in the clip search


@dataclass(frozen=True, slots=True)
class AwqOptions:
    """steps: alphas tried between 0 and 1. duo: divide by the weights' own size to the power 1 - alpha. clip: search
    ranges. folds: of `norm`, `v_o`, `up_down`. format: that scales are searched for; the quantize stage that follows
    should use the same."""

    steps: Count = 20
    duo: bool = True
    clip: bool = True
    format: str = "i4_g32"
    folds: tuple[str, ...] = ("norm", "v_o", "up_down")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"awq with {self.steps} steps searches nothing", param="steps")


class AwqScales(NamedTuple):
    """Scales f32 [in], the alpha they came of (0: ones), and output errors with and without them."""

    scales: Tensor
    alpha: float
    error: float
    plain: float


def awq(
    work: Work, calibration: Calibration | None, options: AwqOptions, report: dict[str, Any], progress: Progress
) -> None:
    """Model scope: clips and folds scales into the weights. Without clipping the model computes what it did before."""

    def rule(these: Consumers) -> Found:
        gram = these.stats.gram
        assert gram is not None
        found = awq_scales(these.stats.mean_abs, gram, these.weights, options, these.tie)
        changed = {}
        if options.clip:
            local = scaled_gram(gram, found.scales)
            for name, weight in zip(these.names, these.weights, strict=True):
                changed[name] = clip_ranges(weight * found.scales, local, options.format) / found.scales
        return Found(found.scales, changed, {"alpha": found.alpha, "error": found.error, "plain": found.plain})

    equalize(work, calibration, options.folds, True, rule, report, progress)


def awq_scales(
    mean_abs: Tensor, gram: Tensor, consumers: list[Tensor], options: AwqOptions,
    tie: Callable[[Tensor], Tensor] = lambda scales: scales,
) -> AwqScales:  # fmt: skip
    """The best scales for matrices f32 [out_i, in] that read one input.

    mean_abs f32 [in]; gram f32 or f64 [in, in], the mean of x x^T; tie: makes scales agree between columns. Never
    worse than no scaling on that gram.
    """
    size = mean_abs.clamp(min=1e-9)
    own = column_size(consumers).clamp(min=1e-9)
    plain = _error(torch.ones_like(size), gram, consumers, options.format)
    best = AwqScales(torch.ones_like(size), 0.0, plain, plain)
    for step in range(1, options.steps + 1):
        alpha = step / options.steps
        raw = size**alpha / own ** (1 - alpha) if options.duo else size**alpha
        scales = safe(tie(safe(torch.where(mean_abs > 0, raw, torch.nan))))
        error = _error(scales, gram, consumers, options.format)
        if error < best.error:
            best = AwqScales(scales, alpha, error, plain)
    return best


def _error(scales: Tensor, gram: Tensor, consumers: list[Tensor], fmt: str) -> float:
    total = 0.0
    for weight in consumers:
        grid = Grid(fmt, weight.shape[1])
        scaled = weight * scales
        value = grid.nearest(scaled, grid.fit(scaled, search="minmax"), grid.index()) / scales
        total += float(losses(weight - value, gram).sum())
    return total


def clip_ranges(weight: Tensor, gram: Tensor, fmt: str) -> Tensor:
    """The matrix with each group cut to the share of its range that loses least, f32 [out, in].

    The loss of a group is its own part of the output (its block of the Gram matrix); a group is only cut where that
    lowers it.
    """
    grid = Grid(fmt, weight.shape[1])
    if not grid.one_level:
        return weight
    clipped = weight.clone()
    for start in range(0, weight.shape[1], grid.group):
        columns = slice(start, min(start + grid.group, weight.shape[1]))
        own, local = weight[:, columns], gram[columns, columns]
        index = torch.zeros(own.shape[1], dtype=torch.int64)
        best = torch.full((len(weight),), torch.inf, dtype=torch.float64)
        most = own.abs().amax(1, keepdim=True)
        for share in SHARES:
            cut = torch.minimum(torch.maximum(own, -most * share), most * share)
            value = grid.nearest(cut, grid.fit_group(cut, search="minmax"), index)
            loss = losses(own - value, local)
            better = loss < best
            best = torch.where(better, loss, best)
            clipped[:, columns] = torch.where(better[:, None], cut, clipped[:, columns])
    return clipped
