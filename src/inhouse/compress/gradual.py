"""Iterative pruning of a model in hand: prune a little more, heal with the masks held, look, score anew, until the
target or the gate.

Sources: gradual schedule (Zhu and Gupta 2017, arXiv 1710.01878), healing by distillation (Minitron, 2407.14679). Puts
pruning pages, statistics and training together; knows no recipe. Every round's scores come from a fresh true-sequential
pass of the model as it then is, and what was dropped before stays dropped.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from inhouse.compress.activations import observe
from inhouse.compress.blocks import BlockRunner, Tap
from inhouse.compress.calibrate import Calibration
from inhouse.compress.fit import FitConfig, fit
from inhouse.compress.heal import HealOptions, as_data, heal, run_folder, teacher_of
from inhouse.compress.methods.iterate import cubic_schedule, geometric_schedule, iterate
from inhouse.compress.methods.magnitude import MagnitudeOptions, magnitude
from inhouse.compress.methods.sparsegpt import SparseGptOptions, sparse_gpt
from inhouse.compress.methods.wanda import WandaOptions, wanda, wanda_scores
from inhouse.compress.objective import CrossEntropy, Objective, Response
from inhouse.compress.slicing import layer_of
from inhouse.compress.sparsity import masked, outlier_share, parse_pattern, spread_ratios
from inhouse.compress.stats import LinearStats
from inhouse.compress.values import Count, NotNegative, Part, Share
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.model.moe import FLOAT_WEIGHTS
from inhouse.train.data import Dataset

State = Mapping[str, tuple[Tensor, Tensor | None]]  # name -> (weight, mask)
Score = Callable[[Tensor, LinearStats, float], Tensor]  # (weight, statistics, share) -> pruned weight or mask

METHODS: Mapping[str, Score] = {
    "magnitude": lambda weight, stats, share: magnitude(weight, stats, MagnitudeOptions(share, by_row=True)),
    "wanda": lambda weight, stats, share: wanda(weight, stats, WandaOptions(share)),
    "sparsegpt": lambda weight, stats, share: _tensor(sparse_gpt(weight, stats, SparseGptOptions(share))),
}
SCHEDULES = {"cubic": cubic_schedule, "geometric": geometric_schedule}


@dataclass(frozen=True, slots=True)
class GradualOptions(HealOptions):
    """Training options are those of one round.

    scores: magnitude, wanda or sparsegpt. sparsity: the share at the end. schedule: `cubic` or `geometric`, from 0.
    spread: layers with more outlier weights keep more, within so much of the share at hand (OWL, arXiv 2310.05175; 0.08
    there); 0: all alike. teacher: `base`, a model, or "" for cross-entropy alone. gate: the most that the validation
    loss may be above that of the model before, nats (with a teacher: divergence); a round above it is thrown away, and
    the rounds end. None: no gate.
    """

    scores: Literal["magnitude", "wanda", "sparsegpt"] = "sparsegpt"
    sparsity: Part = 0.5
    rounds: Count = 4
    schedule: Literal["cubic", "geometric"] = "cubic"
    spread: Share = 0.0
    teacher: str = "base"
    gate: NotNegative | None = None


def gradual(
    work: Work,
    calibration: Calibration | None,
    options: GradualOptions,
    report: dict[str, Any],
    progress: Progress = silent,
) -> None:
    """Prunes every linear of the layers in rounds; the last good round is what stays in `work`.

    `report` gets the rounds (target, loss, passed), the share `reached`, and why it ended. Raises UsageError without
    texts (20 rows at least, so that some are held out), for unknown options, or where not even the first round passes
    the gate; UnsupportedError for matrices that have a form already.
    """
    names = _check(work, calibration, options)
    assert calibration is not None
    data, held = as_data(calibration)
    if held is None:
        raise UsageError("rounds are judged on rows held out", remedy="Give 20 rows or more", param="calibration")
    goal: Objective = CrossEntropy()
    if options.teacher:
        goal = Response(teacher_of(work, options.teacher).live())
    losses: list[float] = []

    def prune(state: State, target: float) -> State:
        _restore(work, state)
        shares = dict.fromkeys(names, target)
        if options.spread:
            shares = _by_outliers(work, calibration, names, target, options.spread)
        _prune(work, calibration, shares, METHODS[options.scores], progress)
        return _snapshot(work)

    def mend(state: State, number: int) -> State:
        result = heal(
            work, data, options, objective=goal, validation=held, judge=goal,
            folder=run_folder(work, f"gradual-{number}"), progress=progress, label=f"healing round {number + 1}",
        )  # fmt: skip
        losses.append(_value(result.best))
        return _snapshot(work)

    base = 0.0 if options.teacher else _loss(work, held)
    targets = SCHEDULES[options.schedule](0.0, options.sparsity, options.rounds)
    start = _snapshot(work)
    ended = iterate(start, targets, prune=prune, heal=mend, measure=lambda state: losses[-1] - base, gate=options.gate)
    report |= {
        "rounds": [[one.target, one.value, one.passed] for one in ended.rounds],
        "reached": ended.reached, "ended": ended.reason,
    }  # fmt: skip
    _restore(work, ended.state if ended.state is not None else start)
    if ended.state is None:
        raise UsageError(f"no round passed: {ended.reason}", remedy="Prune less, heal longer, or widen the gate")


def _check(work: Work, calibration: Calibration | None, options: GradualOptions) -> list[str]:
    """The matrices that are pruned."""
    if calibration is None:
        raise UsageError("iterative pruning needs texts", remedy="Name them under calibration", param="calibration")
    if options.scores not in METHODS:
        raise UsageError(f"unknown scores {options.scores!r}", remedy=f"Use {', '.join(METHODS)}", param="scores")
    if options.schedule not in SCHEDULES:
        raise UsageError(f"unknown schedule {options.schedule!r}", remedy=f"Use {', '.join(SCHEDULES)}")
    if parse_pattern(options.sparsity).grouped:
        raise UsageError("rounds go by shares; N:M is pruned at once", remedy="Use a share such as 0.5")
    names = [n for n in work.matrices() if n.startswith("layers.") and not n.endswith(FLOAT_WEIGHTS)]
    formed = [name for name in names if work.form(name) is not None]
    if formed:
        raise UnsupportedError(f"{formed[0]} is codes or factors already; floats are pruned", param=formed[0])
    return names


def _prune(work: Work, calibration: Calibration, shares: Mapping[str, float], score: Score, progress: Progress) -> None:
    def visit(tap: Tap) -> None:
        for name, stats in tap.stats.items():
            if name not in shares:
                continue
            value = work.value(name)
            made = score(value, stats, shares[name])
            made = masked(value, made) if made.dtype is torch.bool else made
            work.put(name, made)
            work.put_mask(name, made != 0)

    BlockRunner(work, calibration, work.folder).run(visit, lambda name: name in shares, progress)


def _by_outliers(
    work: Work, calibration: Calibration, names: list[str], share: float, spread: float
) -> dict[str, float]:
    """The share of each matrix: that of its layer, by the outliers among |w| * |x| of all its matrices."""
    seen = observe(work.program, work.weights(), calibration.tokens, lengths=calibration.lengths)
    scores: dict[int, list[Tensor]] = {}
    for name in names:
        if name in seen.inputs:  # experts are not seen apart: they take the share of the rest
            scores.setdefault(layer_of(name), []).append(wanda_scores(work.value(name), seen.inputs[name].mean_square))
    layers = sorted(scores)
    outliers = [outlier_share(torch.cat([one.flatten() for one in scores[layer]])) for layer in layers]
    by_layer = dict(zip(layers, spread_ratios(outliers, share, spread), strict=True))
    return {name: by_layer.get(layer_of(name), share) for name in names}


def _snapshot(work: Work) -> State:
    return {name: (work.value(name).clone(), work.mask(name)) for name in work.names()}


def _restore(work: Work, state: State) -> None:
    """Puts a state back where it differs from what there is."""
    for name, (value, mask) in state.items():
        if not torch.equal(work.value(name), value):
            work.put(name, value)
        now = work.mask(name)
        if (now is None) != (mask is None) or (now is not None and mask is not None and not torch.equal(now, mask)):
            work.put_mask(name, mask)


def _loss(work: Work, held: Dataset) -> float:
    """Cross-entropy of the held-out rows before anything is pruned."""
    weights = {name: work.value(name) for name in work.names()}
    return _value(fit(work.programs, weights, held, FitConfig(steps=1), validation=held, minutes=0.0).best)


def _value(best: float | None) -> float:
    assert best is not None  # there was validation data
    return best


def _tensor(made: Any) -> Tensor:
    assert isinstance(made, Tensor)
    return made
