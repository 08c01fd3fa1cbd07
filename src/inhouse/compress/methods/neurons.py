"""Neurons that say nothing new: constant ones go into the next bias, duplicates into one another.

A neuron (FFN channel) whose output hardly varies over the calibration text is a bias in disguise (Srinivas and Babu
2015, arXiv 1507.06149, merge equal neurons; FLAP, arXiv 2312.11983, folds means into biases). Here nothing is removed
that cannot be folded: without a next bias, constants are merged into one carrier, which stays. Every layer loses the
same number, since one config.json has one width; what more was folded is left as zeros.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inhouse.compress.activations import observe
from inhouse.compress.calibrate import Calibration
from inhouse.compress.slicing import Cut, Index, cut_spec, cut_weight
from inhouse.compress.values import Count, NotNegative
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class NeuronOptions:
    """`tolerance`: a neuron is constant when its standard deviation is below this share of its root mean square."""

    tolerance: NotNegative = 1e-4
    duplicates: bool = True
    multiple: Count = 1  # the width that stays is a multiple of it (256 keeps K-quants possible)


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


def fold_constants(weight: Tensor, bias: Tensor | None, mean: Tensor, mean_square: Tensor, tolerance: float) -> Folded:
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


def neurons(
    work: Work,
    calibration: Calibration | None,
    options: NeuronOptions,
    report: dict[str, Any],
    progress: Progress = silent,
) -> None:
    """Folds constant and duplicate neurons of every MLP, and removes as many from each as the poorest layer has.

    `report` gets `folded` (by layer), `removed` (of each layer) and `ffn`. Raises UnsupportedError for what is no
    decoder or has experts, UsageError where there are no texts.
    """
    spec = work.spec
    if not isinstance(spec, ModelSpec) or spec.moe is not None:
        raise UnsupportedError(f"{spec.family} has no plain MLP in every layer; neurons are folded in decoders' MLPs")
    if calibration is None:
        raise UsageError("constant neurons are found on texts", remedy="Give calibration texts", param="calibration")
    seen = observe(work.program, work.weights(), calibration.tokens, lengths=calibration.lengths, progress=progress)
    silent_ones: dict[int, Index] = {}
    for i in range(spec.layers):
        moments = seen.inputs[f"layers.{i}.mlp.down.weight"]
        silent_ones[i] = _fold_layer(work, spec, i, moments.mean, moments.mean_square, options)
    least = min(len(index) for index in silent_ones.values())
    width = -(-(spec.ffn - least) // options.multiple) * options.multiple
    if width < spec.ffn:
        _remove(work, spec, {i: index[: spec.ffn - width] for i, index in silent_ones.items()})
    folded = {str(i): len(index) for i, index in silent_ones.items()}
    report |= {"folded": folded, "removed": spec.ffn - min(width, spec.ffn), "ffn": min(width, spec.ffn)}


def _fold_layer(
    work: Work, spec: ModelSpec, layer: int, mean: Tensor, mean_square: Tensor, options: NeuronOptions
) -> Index:
    """Folds what one MLP has and puts the result; its neurons that do nothing any more, ascending."""
    mlp = f"layers.{layer}.mlp"
    down, up = work.value(f"{mlp}.down.weight"), _with_bias(work, f"{mlp}.up")
    gate = _with_bias(work, f"{mlp}.gate") if spec.gated else None
    gone: set[int] = {int(i) for i in torch.nonzero(~down.any(0)).flatten()}
    if options.duplicates:
        merged = merge_duplicates(gate, up, down)
        down, gone = merged.weight, gone | set(merged.silent)
    if gone:  # they are silent from here on, and no carrier
        mean, mean_square = mean.clone(), mean_square.clone()
        mean[sorted(gone)] = mean_square[sorted(gone)] = 0.0
    bias = work.value(f"{mlp}.down.bias") if spec.mlp_bias else None
    folded = fold_constants(down, bias, mean, mean_square, options.tolerance)
    gone |= set(folded.silent)
    if not torch.equal(folded.weight, work.value(f"{mlp}.down.weight")):
        work.put(f"{mlp}.down.weight", folded.weight)
    if bias is not None and folded.bias is not None and not torch.equal(folded.bias, bias):
        work.put(f"{mlp}.down.bias", folded.bias)
    return tuple(sorted(gone))


def _with_bias(work: Work, name: str) -> Tensor:
    weight = work.value(f"{name}.weight")
    if f"{name}.bias" not in work.names():
        return weight
    return torch.cat([weight, work.value(f"{name}.bias")[:, None]], 1)


def _remove(work: Work, spec: ModelSpec, gone: dict[int, Index]) -> None:
    """Cuts these neurons out of every MLP."""
    kept = {i: tuple(k for k in range(spec.ffn) if k not in set(index)) for i, index in gone.items()}
    cut = Cut(ffn=kept)
    work.replace_spec(cut_spec(spec, cut))
    for i in range(spec.layers):
        for part in ("gate", "up", "down"):
            for name in (f"layers.{i}.mlp.{part}.weight", f"layers.{i}.mlp.{part}.bias"):
                if name in work.names():
                    value = work.value(name)
                    cut_value = cut_weight(name, value, spec, cut)
                    if cut_value.shape != value.shape:
                        work.put(name, cut_value)
