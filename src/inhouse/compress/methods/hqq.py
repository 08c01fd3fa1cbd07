"""HQQ: scales and zero points by half-quadratic splitting, without calibration.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models": the error is split into a sparse
part (an l_p norm with p < 1, solved by generalised soft thresholding) and the rest, for which the zero point has a
closed form. Our formats keep whole zero points, between which little is to be chosen, so the scale is solved on the
same rest as well. A group keeps the best of all rounds by the l_p norm, min-max among them. For formats with zero
points (`u2`, `u3`, `u4`, `u8` families).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from inhouse.compress.grids import Grid, Params
from inhouse.compress.stats import LinearStats
from inhouse.compress.values import AtMostOne, Count, Positive
from inhouse.core.errors import UnsupportedError
from inhouse.runtime.form import Form


@dataclass(frozen=True, slots=True)
class HqqOptions:
    """norm: p of the error's norm. beta, kappa: weight of the splitting and its growth. rounds: of the iteration."""

    norm: AtMostOne = 0.7
    beta: Positive = 10.0
    kappa: Positive = 1.01
    rounds: Count = 20


def hqq(weight: Tensor, stats: LinearStats | None, options: HqqOptions, fmt: str) -> Form:
    """weight f32 [out, in] -> Form, without statistics. Raises UnsupportedError for formats without zero points."""
    grid = Grid(fmt, weight.shape[1])
    if not grid.format.zeros:
        raise UnsupportedError(f"hqq moves zero points, which format {fmt} has none of", remedy="Use u4_g64 or its kin")
    params = hqq_params(weight, grid, options)
    return Form(grid.pack(grid.round(weight, params, grid.index()), params))


def hqq_params(weight: Tensor, grid: Grid, options: HqqOptions) -> Params:
    """Params whose l_p error is, group by group, at most that of the min-max range."""
    start = grid.fit(weight, search="minmax")
    assert start.zero is not None
    low, high = grid.code_range()
    pad = grid.groups * grid.group - grid.inputs
    x = torch.nn.functional.pad(weight, (0, pad)).reshape(len(weight), grid.groups, grid.group)
    valid = torch.nn.functional.pad(torch.ones(grid.inputs), (0, pad)).reshape(grid.groups, grid.group)
    scale, zero = start.scale[..., None], start.zero[..., None].clone()
    best = Params(start.scale.clone(), start.zero.clone())
    least = _size(x, scale, zero, low, high, valid, options.norm)
    beta = options.beta
    for _ in range(options.rounds):
        level = (x * _inverse(scale) + zero).round().clamp(low, high) - zero
        size = x.abs().amax(-1, keepdim=True).clamp(min=1e-12)  # the splitting is of weights of size 1
        target = x - size * _shrink((x - scale * level) / size, beta, options.norm)
        squares = (level * level * valid).sum(-1, keepdim=True)
        solved = (target * level * valid).sum(-1, keepdim=True) / squares.clamp(min=1e-12)
        scale = grid.storable(torch.where(solved > 0, solved, scale))
        codes = (x * _inverse(scale) + zero).round().clamp(low, high)
        moved = ((codes - target * _inverse(scale)) * valid).sum(-1, keepdim=True) / valid.sum(-1)[:, None]
        zero = moved.round().clamp(low, high)
        beta *= options.kappa
        found = _size(x, scale, zero, low, high, valid, options.norm)
        better = found < least
        least = torch.where(better, found, least)
        assert best.zero is not None
        best = Params(torch.where(better, scale[..., 0], best.scale), torch.where(better, zero[..., 0], best.zero))
    return best


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def _size(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, valid: Tensor, norm: float) -> Tensor:
    codes = (x * _inverse(scale) + zero).round().clamp(low, high)
    return ((x - scale * (codes - zero)).abs().clamp(min=1e-12) ** norm * valid).sum(-1)


def _shrink(error: Tensor, beta: float, norm: float) -> Tensor:
    """The generalised soft threshold of l_p."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-8) ** (norm - 1) / beta).clamp(min=0)
