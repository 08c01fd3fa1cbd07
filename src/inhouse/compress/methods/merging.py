"""Merging: one tensor out of the same tensor of several models.

With tau_i = theta_i - theta_0 (theta_0: the base that they were tuned from) and weights w_i:

    linear            sum w_i theta_i / sum w_i                        (model soups: Wortsman et al. 2022, 2203.05482)
    slerp             along the arc between base and one model, at t   (Shoemake 1985)
    task_arithmetic   theta_0 + lambda sum w_i tau_i                   (Ilharco et al. 2023, 2212.04089)
    ties              tau trimmed to the largest share `density`; per entry the sign of the weighted sum is elected and
                      the entries that have it are averaged by weight  (Yadav et al. 2023, 2306.01708)
    dare_linear       entries of tau dropped at random, the rest scaled up; then as task arithmetic
    dare_ties         the same, then signs elected as in ties          (Yu et al. 2024, 2311.03099)
    breadcrumbs       the share `gamma` of the largest and the smallest entries dropped
                                                                       (Davari and Belilovsky 2024, 2312.06795)
    breadcrumbs_ties  the same, then signs elected

Semantics and defaults are those that mergekit publishes, but for DARE's `rescale`: "inverse" is the paper's
1 / density, "l1" (mergekit's of today) keeps the sum of magnitudes. `merge` knows tensors alone,
`merge_stage` is the recipe's.
"""

import hashlib
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inhouse.compress.calibrate import Calibration
from inhouse.compress.values import AtMostOne, Finite, LessThanOne, Seed, Share, check_options, choice
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.model.tokens.tokenizer import Tokenizer

LARGEST = float(np.finfo(np.float32).max)  # of a weight
BASE = "Name it: --base MODEL"
PARALLEL = 0.9995  # |cosine| from which two vectors count as one direction: the arc is then the line


@dataclass(frozen=True, slots=True)
class _Row:
    """What a method does to each tau before they are summed."""

    drop: Literal["", "small", "random", "crumbs"] = ""
    elect: bool = False  # signs
    normalize: bool = False  # by default
    base: bool = True  # a base is needed


MERGES = {
    "linear": _Row(normalize=True, base=False),
    "slerp": _Row(),
    "task_arithmetic": _Row(),
    "ties": _Row("small", elect=True, normalize=True),
    "dare_linear": _Row("random"),
    "dare_ties": _Row("random", elect=True),
    "breadcrumbs": _Row("crumbs"),
    "breadcrumbs_ties": _Row("crumbs", elect=True),
}


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """How tensors are merged.

    density: share of each tau's entries that is kept. gamma: share of the largest dropped (breadcrumbs). scale: lambda.
    t: where on the arc (slerp). normalize: divide by the sum of weights; None: as the method does. rescale: of DARE.
    """

    method: str = "linear"
    density: AtMostOne = 1.0
    gamma: LessThanOne = 0.01
    scale: Finite = 1.0
    t: Share = 0.5
    normalize: bool | None = None
    rescale: Literal["inverse", "l1", "none"] = "inverse"
    seed: Seed = 0

    def __post_init__(self) -> None:
        choice(self.method, tuple(MERGES), "method")
        check_options(self)

    @property
    def needs_base(self) -> bool:
        return MERGES[self.method].base


@dataclass(frozen=True, slots=True)
class MergeStage(MergeOptions):
    """The recipe's stage: the model in hand is the base. models: references. weights: one each; () means 1 each."""

    models: tuple[str, ...] = ()
    weights: tuple[Finite, ...] = ()


def merges_nothing(options: "MergeStage") -> tuple[str, str] | None:
    """Why such a stage would do nothing, and the remedy."""
    return None if options.models else ("no models are named", "Give models: [REFERENCE, ...]")


def check_models(options: MergeOptions, weights: Sequence[float]) -> None:
    """Raises UsageError for weights that the method can do nothing with."""
    if not weights:
        raise UsageError("there are no models to merge", remedy="Name them: --model MODEL:WEIGHT", param="model")
    for weight in weights:
        if not abs(weight) <= LARGEST:
            raise UsageError(
                f"the weight {weight:g} is not finite in float32", remedy="Give a weight such as 0.5", param="model"
            )
    if options.method == "slerp" and len(weights) != 1:
        raise UsageError(f"slerp lies between the base and one model, {len(weights)} were given", param="models")
    normal = MERGES[options.method].normalize if options.normalize is None else options.normalize
    if normal and not abs(sum(weights)) > 1e-8:
        raise UsageError("the weights sum to 0", remedy="Give other weights, or --no-normalize", param="models")


def merge(
    name: str, base: Tensor | None, tensors: Sequence[Tensor], weights: Sequence[float], o: MergeOptions
) -> Tensor:
    """The merged tensor, float32, of the shape that all have.

    Args:
        name: of the tensor; with the seed and the model's place it decides what DARE drops.
        base: theta_0; None where the method needs none.
        tensors: theta_i, each with its weight.
    """
    check_models(o, weights)
    shapes = {tuple(t.shape) for t in tensors} | ({tuple(base.shape)} if base is not None else set())
    if len(shapes) != 1:
        raise UsageError(f"{name}: the shapes {sorted(shapes)} differ", param=name)
    row = MERGES[o.method]
    stack = torch.stack([t.float() for t in tensors])
    by = torch.tensor(weights, dtype=torch.float32).reshape(-1, *[1] * (stack.dim() - 1))
    normal = row.normalize if o.normalize is None else o.normalize
    if not row.base:
        total = (stack * by).sum(0)
        return total / by.sum() if normal else total
    if base is None:
        raise UsageError(f"{o.method} needs the base that the models were tuned from", remedy=BASE, param="base")
    zero = base.float()
    if o.method == "slerp":
        return slerp(zero, stack[0], o.t)
    taus = torch.stack([_thinned(theta - zero, row.drop, o, f"{name}/{i}") for i, theta in enumerate(stack)])
    weighted = taus * by
    if row.elect:
        signs = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
        agree = (weighted.sign() == signs).float()
        total, weight = (weighted * agree).sum(0), (by * agree).sum(0)
        weight = torch.where(weight == 0, torch.ones_like(weight), weight)
    else:
        total, weight = weighted.sum(0), by.sum(0)
    return zero + o.scale * (total / weight if normal else total)


def check_sum(name: str, merged: Tensor, weights: Sequence[float], most: float = LARGEST) -> None:
    """Raises UsageError where a merged tensor has values beyond `most`, naming the weights that made them: what was
    merged is finite."""
    largest = float(merged.abs().max()) if merged.numel() else 0.0
    if not largest <= most:
        told = ", ".join(f"{weight:g}" for weight in weights)
        raise UsageError(
            f"{name}: with the weights {told} the merged values reach {largest:g}, its type holds {most:g}",
            remedy="Give smaller weights, or a smaller --lambda", param="model",
        )  # fmt: skip


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """a at t = 0, b at t = 1, both taken as one long vector; the weights of the arc between their directions are given
    to the vectors themselves. Nearly parallel ones: the line between them."""
    wide_a, wide_b = a.double(), b.double()
    norms = wide_a.norm() * wide_b.norm()
    cosine = float((wide_a * wide_b).sum() / norms) if norms > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return (wide_a + t * (wide_b - wide_a)).float()
    angle = math.acos(cosine)
    first, second = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return (first * wide_a + second * wide_b).float()


def _thinned(tau: Tensor, drop: str, o: MergeOptions, key: str) -> Tensor:
    """tau with the entries that the method drops set to 0."""
    if not drop or o.density == 1:
        return tau
    if drop == "random":
        kept = torch.from_numpy(_random(tau.numel(), o.seed, key) < o.density).reshape(tau.shape)
        thin = torch.where(kept, tau, torch.zeros_like(tau))
        if o.rescale == "inverse":
            return thin / o.density
        left = thin.abs().sum()
        return thin * (tau.abs().sum() / left) if o.rescale == "l1" and left > 0 else thin
    count = tau.numel()
    keep = int(o.density * count)
    largest = int(o.gamma * count) if drop == "crumbs" else 0
    smallest = count - keep - largest
    if smallest < 0:  # density + gamma exceed 1: fewer of the largest go
        largest, smallest = largest + smallest, 0
    order = torch.argsort(tau.abs().flatten(), stable=True)
    mask = torch.zeros(count, dtype=torch.bool)
    mask[order[smallest : count - largest]] = True
    return torch.where(mask.reshape(tau.shape), tau, torch.zeros_like(tau))


def _random(count: int, seed: int, key: str) -> npt.NDArray[np.float32]:
    """float32 [count] in [0, 1), a function of seed and key on every machine."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little"))).random(count, np.float32)


def merge_stage(work: Work, calibration: Calibration | None, options: MergeStage, report: dict[str, Any]) -> None:
    """Merges other models into the one in hand, weight by weight.

    Raises UsageError for models and weights that do not go together, UnsupportedError for shapes or vocabularies that
    differ.
    """
    weights = options.weights or (1.0,) * len(options.models)
    if len(weights) != len(options.models):
        raise UsageError(
            f"{len(options.models)} models and {len(weights)} weights",
            remedy="Give one weight for each",
            param="weights",
        )
    check_models(options, weights)
    plain = MergeOptions(**{f.name: getattr(options, f.name) for f in fields(MergeOptions)})
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="merge-", dir=work.folder)))
        others = [stack.enter_context(Work.open(m, scratch / str(i))) for i, m in enumerate(options.models)]
        for other in others:
            _check_same(work, other)
        for name in work.names():
            base = work.value(name) if plain.needs_base else None
            merged = merge(name, base, [other.value(name) for other in others], weights, plain)
            check_sum(name, merged, weights)
            work.put(name, merged)
        report["models"] = [other.digest for other in others]


def first_other_token(a: Tokenizer, b: Tokenizer) -> int | None:
    """The lowest id that means another token in `b`; None where the vocabularies are equal."""
    count = max(a.vocab_size, b.vocab_size)
    return next((i for i in range(count) if a.token_of(i) != b.token_of(i)), None)


def _check_same(work: Work, other: Work) -> None:
    a, b = work.tokenizer, other.tokenizer
    token = first_other_token(a, b)
    if token is not None:
        raise UnsupportedError(f"{other.reference} has another vocabulary: id {token} differs first", param="models")
    shapes = {name: work.shape(name) for name in work.names()}
    if shapes != {name: other.shape(name) for name in other.names()}:
        raise UnsupportedError(f"the weights of {other.reference} have other shapes or names", param="models")
