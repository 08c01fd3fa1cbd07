"""Neurons that say nothing new: constant ones go into the next bias, duplicates into one another.

A neuron (FFN channel) whose output hardly varies over the calibration text is a bias in disguise (Srinivas and Babu
2015, arXiv 1507.06149, merge equal neurons; FLAP, arXiv 2312.11983, folds means into biases). Here nothing is removed
that cannot be folded: without a next bias, constants are merged into one carrier, which stays. What was folded is left
as zeros, so that a structured cut finds it with score 0 and removes it without a trace.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class NeuronOptions:
    """`tolerance`: a neuron is constant when its standard deviation is below this share of its root mean square."""

    tolerance: float = 1e-4
    duplicates: bool = True


@dataclass(frozen=True, slots=True)
class Folded:
    """The next matrix after folding, its bias, and the neurons that no longer do anything."""

    weight: Tensor  # [out, in], columns of `silent` are 0
    bias: Tensor | None  # [out]
    silent: tuple[int, ...]


def constant_neurons(mean: Tensor, mean_square: Tensor, tolerance: float) -> Tensor:
    """Which neurons are near-constant, bool [in]; silent ones (always 0) are among them. f64 inside."""
    square = mean_square.double()
    variance = (square - mean.double().square()).clamp_min(0.0)
    return variance <= tolerance**2 * square


def fold_constants(
    weight: Tensor, bias: Tensor | None, mean: Tensor, mean_square: Tensor, tolerance: float
) -> Folded:
    """Takes near-constant inputs out of a matrix.

    Args:
        weight: f32 [out, in] of the next linear; `bias` [out] or None where the model has none.
        mean, mean_square: [in] of its inputs over the calibration tokens.

    With a bias it takes what the constants added. Without one, inputs that are exactly 0 go, and constants other than
    the largest are merged into it: its column then carries them all.
    """
    constant = constant_neurons(mean, mean_square, tolerance)
    silent = mean_square <= 0
    speaking = [int(i) for i in torch.nonzero(constant & ~silent).flatten()]
    w = weight.double().clone()
    gone = [int(i) for i in torch.nonzero(silent).flatten()]
    values = mean.double()
    if bias is not None:
        bias = (bias.double() + w[:, speaking] @ values[speaking]).float()
        gone += speaking
    elif len(speaking) > 1:
        carrier = max(speaking, key=lambda i: (abs(float(values[i])), -i))
        rest = [i for i in speaking if i != carrier]
        w[:, carrier] += w[:, rest] @ (values[rest] / values[carrier])
        gone += rest
    w[:, gone] = 0.0
    return Folded(w.float(), bias, tuple(sorted(gone)))


def merge_duplicates(gate: Tensor | None, up: Tensor, down: Tensor) -> Folded:
    """Merges neurons that compute the same, exactly.

    Args:
        gate: [ffn, hidden], with its bias as a last column where there is one; None: a plain MLP.
        up: [ffn, hidden], the same.
        down: [hidden, ffn].

    Two neurons are the same where gate rows are equal bit by bit and up rows are equal up to a factor (of a plain MLP:
    equal). The later one's column, times the factor, is added to the earlier one's.
    """
    key = up if gate is None else gate
    groups: dict[bytes, list[int]] = {}
    for i, row in enumerate(key.contiguous().numpy()):
        groups.setdefault(row.tobytes(), []).append(i)
    w = down.double().clone()
    gone: list[int] = []
    for members in groups.values():
        first: list[int] = []
        for i in members:
            into = next(((j, f) for j in first if (f := _factor(up[j], up[i], gate is not None)) is not None), None)
            if into is None:
                first.append(i)
                continue
            w[:, into[0]] += into[1] * w[:, i]
            w[:, i] = 0.0
            gone.append(i)
    return Folded(w.float(), None, tuple(sorted(gone)))


def _factor(one: Tensor, other: Tensor, scaled: bool) -> float | None:
    """f with other = f * one to the last bits of f32; None where there is no such f."""
    if torch.equal(one, other):
        return 1.0
    at = int(one.abs().argmax())
    if not scaled or float(one[at]) == 0.0:
        return None
    factor = float(other[at].double() / one[at].double())
    limit = 2.0**-22 * float(other.abs().max())
    return factor if float((other.double() - factor * one.double()).abs().max()) <= limit else None
