"""Ranks of all linears under one budget: whitened SVD, each rank where the model loses least by it.

Every matrix is cut alone, at one ratio, and the model's divergence from itself measured; the loss of its other ranks
follows from their error (SVD-LLM v2, Wang et al. 2025, arXiv 2503.12340, with a measured loss in the place of a
theoretical one). The knapsack then shares the budget out. Thin matrices (k and v of grouped-query attention) and those
that the model leans on are cut less, or left whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inhouse.compress.calibrate import Calibration
from inhouse.compress.pack_as import pack_as
from inhouse.compress.ranks import Candidate, measured_weight, rank_for, ranks_by_budget
from inhouse.compress.spectrum import Spectrum, cut, decompose
from inhouse.compress.stats import Accumulator
from inhouse.compress.values import Count, Part
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from inhouse.core.progress import Progress, silent
from inhouse.runtime.form import Form
from inhouse.runtime.program import Op
from inhouse.runtime.torch_dense import forward


@dataclass(frozen=True, slots=True)
class RankBudget:
    """Options.

    ratio: share of the numbers of all linears of the layers to save, factors counted. method: of `spectrum.METHODS`.
    measure: the loss of each cut on the first `judges` rows of the calibration; else relative errors decide. probe: the
    ratio at which a matrix is cut alone. step: ranks are multiples of it. factors: format of the factors.
    """

    ratio: Part = 0.2
    method: str = "whitened"
    measure: bool = True
    judges: Count = 16
    probe: Part = 0.2
    step: Count = 1
    factors: str = "bf16"

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio < 1.0 or not 0.0 < self.probe < 1.0:
            raise UsageError(f"ratios {self.ratio} and {self.probe} must lie between 0 and 1", param="ratio")


def rank_budget(
    work: Work,
    calibration: Calibration | None,
    options: RankBudget,
    report: dict[str, Any],
    progress: Progress = silent,
) -> None:
    """Puts the low-rank form of every matrix that is cut. Raises UsageError without a calibration, or for a ratio that
    ranks cannot reach."""
    if calibration is None:
        raise UsageError("ranks are shared out by a calibration text", remedy="Give one", param="calibration")
    spectra, ranks = share_out(work, calibration, calibration.rows(0, options.judges), options, progress)
    for name, rank in ranks.items():
        if rank:
            a, b = cut(spectra[name], rank)
            work.put_form(name, Form(None, (pack_as(a, options.factors), pack_as(b, options.factors))))
    whole = sum(taken.left.shape[0] * taken.right.shape[1] for taken in spectra.values())
    kept = sum(_numbers(taken.shape, ranks[name]) for name, taken in spectra.items())
    report |= {"ranks": ranks, "saved": 1.0 - kept / whole}


def share_out(
    work: Work, calibration: Calibration, judges: Calibration, options: RankBudget, progress: Progress = silent
) -> tuple[dict[str, Spectrum], dict[str, int]]:
    """Every linear of the layers taken apart by moments of `calibration`, and its rank by losses on `judges`; 0 where
    it stays whole."""
    weights = work.weights()
    moments = input_moments(work, weights, calibration, progress)
    logs = None if not options.measure else log_probabilities(work, weights, judges)
    spectra, candidates = {}, {}
    for done, (name, (gram, mean_abs)) in enumerate(moments.items()):
        progress("measuring cuts", done, len(moments))
        taken = decompose(weights[name], options.method, gram=gram, mean_abs=mean_abs)
        spectra[name], rank = taken, max(1, rank_for(taken.shape, options.probe))
        if logs is None:
            loss = float(taken.tail[rank] / taken.tail[0].clamp(min=1e-300))
        else:
            a, b = cut(taken, rank, allow_larger=True)
            loss = divergence(work, {**weights, name: b @ a}, judges, logs)
        candidates[name] = Candidate(taken, measured_weight(taken, rank, loss))
    whole = sum(weights[name].numel() for name in spectra)
    return spectra, ranks_by_budget(candidates, int((1.0 - options.ratio) * whole), options.step)


def input_moments(
    work: Work, weights: Mapping[str, Tensor], calibration: Calibration, progress: Progress = silent
) -> dict[str, tuple[Tensor, Tensor]]:
    """(E[x x^T], mean |x|) in front of every linear of the layers, one pass of the model as it is."""
    found: dict[str, Accumulator] = {}

    def look(op: Op, inputs: Any, outputs: Any) -> None:
        if op.kind == "linears" and op.layer >= 0:
            for name in op.weights[: len(op.weights) // 2]:
                found.setdefault(name, Accumulator(inputs[0].shape[1], gram=True)).add(inputs[0])

    for row, ids in enumerate(_documents(calibration)):
        progress("moments", row, len(calibration.lengths))
        with torch.no_grad():
            forward(work.program, ids[None], weights, observe=look)
    stats = {name: one.finish() for name, one in found.items()}
    return {name: (one.gram, one.mean_abs) for name, one in stats.items() if one.gram is not None}


def log_probabilities(work: Work, weights: Mapping[str, Tensor], calibration: Calibration) -> list[Tensor]:
    """log p of every token at every position of each row, f32 [length, vocab]."""
    with torch.no_grad():
        return [
            forward(work.program, ids[None], weights)["logits"][0].log_softmax(-1) for ids in _documents(calibration)
        ]


def divergence(work: Work, weights: Mapping[str, Tensor], calibration: Calibration, logs: list[Tensor]) -> float:
    """Mean KL(p || q) in nats of a model q from what `log_probabilities` gave of p."""
    others = log_probabilities(work, weights, calibration)
    total = sum(float((p.double().exp() * (p.double() - q.double())).sum()) for p, q in zip(logs, others, strict=True))
    return total / max(1, sum(len(p) for p in logs))


def _documents(calibration: Calibration) -> list[Tensor]:
    return [row[: int(n)] for row, n in zip(calibration.tokens, calibration.lengths, strict=True)]


def _numbers(shape: tuple[int, int], rank: int) -> int:
    return rank * (shape[0] + shape[1]) if rank else shape[0] * shape[1]
