"""Scales moved between a producer and its consumers, so that the float model stays what it is. Pure.

A norm's gain (or a linear's rows) is divided by s, the columns of what reads it are multiplied by s. Which producers
and consumers there are says `graph`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from inhouse.compress.graph import LinearFold, NormFold

SMALLEST, LARGEST = 1e-4, 1e4  # a scale beyond this says that an input is dead, not that it is small


def safe(scales: Tensor) -> Tensor:
    """Scales without zeros, infinities or extremes, normalised so that sqrt(max * min) is 1."""
    clean = torch.where(torch.isfinite(scales) & (scales > 0), scales, 1.0)
    clean = clean / (clean.max() * clean.min()).sqrt()
    return clean.clamp(SMALLEST, LARGEST)


def fold_norm(fold: NormFold, scales: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New values of the norm's weights and of all consumers, for scales f32 [width]."""
    offset = float(fold.norm.attrs.get("offset", 0.0))
    changed = {fold.gain: (weights[fold.gain] + offset) / scales - offset}
    if fold.bias:
        changed[fold.bias] = weights[fold.bias] / scales
    return changed | {name: weights[name] * scales for name in fold.consumers}


def fold_linear(fold: LinearFold, scales: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New values of producer, its bias and consumer, for scales f32 [rows of the producer]; a value head's scale is
    shared by the query heads that read it."""
    changed = {fold.producer: weights[fold.producer] / scales[:, None]}
    if fold.bias:
        changed[fold.bias] = weights[fold.bias] / scales
    return changed | {fold.consumer: weights[fold.consumer] * spread(fold, scales)}


def spread(fold: LinearFold, scales: Tensor) -> Tensor:
    """The producer's scales as those of the consumer's columns."""
    if fold.kind != "v_o":
        return scales
    times = fold.heads // fold.kv_heads
    return scales.reshape(fold.kv_heads, 1, fold.v_dim).expand(-1, times, -1).reshape(-1)


def gather(fold: LinearFold, values: Tensor) -> Tensor:
    """Values of the consumer's columns as those of the producer's rows: means over the query heads that share one."""
    if fold.kind != "v_o":
        return values
    return values.reshape(fold.kv_heads, fold.heads // fold.kv_heads, fold.v_dim).mean(1).reshape(-1)


def column_size(matrices: Sequence[Tensor]) -> Tensor:
    """Mean |W| of each input over several matrices [out_i, in], each row taken relative to its own largest weight."""
    relative = [matrix.abs() / matrix.abs().amax(1, keepdim=True).clamp(min=1e-12) for matrix in matrices]
    return torch.cat(relative).mean(0)
