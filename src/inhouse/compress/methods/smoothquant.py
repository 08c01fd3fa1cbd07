"""SmoothQuant: outliers of activations are moved into weights, so that both can be int8.

Xiao et al. 2022, arXiv 2211.10438: s_j = max|X_j|^a / max|W_j|^(1-a); x / s is folded into the norm in front, W s into
the columns. Meant for `i8_token` (int8 weights by row, activations by token); the float model stays what it is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inhouse.compress.calibrate import Calibration
from inhouse.compress.equalize import Consumers, Found, equalize
from inhouse.compress.folding import safe
from inhouse.compress.values import Share
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from inhouse.core.progress import Progress


@dataclass(frozen=True, slots=True)
class SmoothQuantOptions:
    """alpha: how much of the difficulty moves into the weights, 0..1. folds: of `norm`, `v_o`, `up_down`."""

    alpha: Share = 0.5
    folds: tuple[str, ...] = ("norm",)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha is {self.alpha}", remedy="Choose 0..1; 0.5 to 0.85 is usual", param="alpha")


def smooth_scales(max_abs: Tensor, consumers: list[Tensor], options: SmoothQuantOptions) -> Tensor:
    """Scales f32 [in] of the inputs of `consumers` (f32 [out_i, in]), whose largest magnitudes are `max_abs` [in]."""
    weights = torch.stack([matrix.abs().amax(0) for matrix in consumers]).amax(0)
    scales = max_abs.clamp(min=1e-9) ** options.alpha / weights.clamp(min=1e-9) ** (1 - options.alpha)
    return safe(torch.where((max_abs > 0) & (weights > 0), scales, torch.nan))


def smoothquant(
    work: Work, calibration: Calibration | None, options: SmoothQuantOptions, report: dict[str, Any], progress: Progress
) -> None:
    """Model scope: folds the scales of every fold into the weights; what the model computes stays what it was."""

    def rule(these: Consumers) -> Found:
        scales = safe(these.tie(smooth_scales(these.stats.max_abs, these.weights, options)))
        before, after = these.stats.max_abs, these.stats.max_abs / scales
        record = {"outliers_before": _spread(before), "outliers_after": _spread(after)}
        return Found(scales, {}, record)

    equalize(work, calibration, options.folds, False, rule, report, progress)


def _spread(values: Tensor) -> float:
    """How far the largest input lies above the usual one."""
    return float(values.max() / values.median().clamp(min=1e-9))
