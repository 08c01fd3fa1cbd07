"""Scales between producers and consumers over a whole model, by whatever rule a page has.

One calibrated pass gives each rule the statistics in front of its consumers; the scales found are folded in at the end,
so that the pass runs on the model as it was (folding does not change what it computes). Knows graphs and folds, no
rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inhouse.compress.blocks import BlockRunner, Tap
from inhouse.compress.calibrate import Calibration
from inhouse.compress.folding import fold_linear, fold_norm, gather, spread
from inhouse.compress.graph import LinearFold, NormFold, linear_folds, norm_folds
from inhouse.compress.stats import LinearStats
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from inhouse.core.progress import Progress

FOLDS = ("norm", "v_o", "up_down")


@dataclass(frozen=True, slots=True)
class Consumers:
    """What reads one input: matrices f32 [out_i, in], the statistics of it, and how scales must agree between columns
    (those that several query heads read of one value head)."""

    names: tuple[str, ...]
    weights: list[Tensor]
    stats: LinearStats
    tie: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Found:
    """A rule's answer: scales f32 [in]; matrices that it also changed, by name, in the order of the model as it was
    (before scaling); a record."""

    scales: Tensor
    changed: dict[str, Tensor]
    record: dict[str, Any]


Rule = Callable[[Consumers], Found]


def equalize(
    work: Work, calibration: Calibration | None, kinds: Sequence[str], gram: bool, rule: Rule,
    report: dict[str, Any], progress: Progress,
) -> None:  # fmt: skip
    """Applies a rule to every fold of the kinds given. Raises UsageError for an unknown kind, or where none is."""
    unknown = [kind for kind in kinds if kind not in FOLDS]
    if unknown or not kinds:
        raise UsageError(f"there is no fold {', '.join(unknown)}", remedy=f"Known: {', '.join(FOLDS)}", param="folds")
    if calibration is None:
        raise UsageError("smoothing needs calibration texts", param="calibration")
    folds: dict[tuple[str, ...], NormFold | LinearFold] = {}
    if "norm" in kinds:
        folds |= {fold.consumers: fold for fold in norm_folds(work.program)}
    folds |= {(fold.consumer,): fold for fold in linear_folds(work.program) if fold.kind in kinds}
    if not folds:
        raise UsageError("this model has nothing to fold scales into", param="folds")
    scales: dict[tuple[str, ...], Tensor] = {}

    def visit(tap: Tap) -> None:
        names = tuple(tap.names)
        fold = folds.get(names)
        if fold is None:
            return
        stats = next(iter(tap.stats.values()))
        weights = [work.value(name) for name in names]
        found = rule(Consumers(names, weights, stats, _tie(fold)))
        scales[names] = found.scales
        report["+".join(names)] = found.record
        for name, value in found.changed.items():
            work.put(name, value)

    wanted = {name for names in folds for name in names}
    BlockRunner(work, calibration, work.folder).run(visit, lambda name: gram and name in wanted, progress)
    for names, found in scales.items():
        _apply(work, folds[names], found)


def _tie(fold: NormFold | LinearFold) -> Callable[[Tensor], Tensor]:
    return (lambda s: spread(fold, gather(fold, s))) if isinstance(fold, LinearFold) else (lambda s: s)


def _apply(work: Work, fold: NormFold | LinearFold, scales: Tensor) -> None:
    if isinstance(fold, NormFold):
        names = [fold.gain, *filter(None, [fold.bias]), *fold.consumers]
        changed = fold_norm(fold, scales, {name: work.value(name) for name in names})
    else:
        names = [fold.producer, *filter(None, [fold.bias]), fold.consumer]
        changed = fold_linear(fold, gather(fold, scales), {name: work.value(name) for name in names})
    for name, value in changed.items():
        work.put(name, value)


def scaled_gram(gram: Tensor, scales: Tensor) -> Tensor:
    """The Gram matrix of x / s."""
    wide = scales.to(gram.dtype)
    return gram / torch.outer(wide, wide)
