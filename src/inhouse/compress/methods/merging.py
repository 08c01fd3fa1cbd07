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
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.model.tokens.tokenizer import Tokenizer

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
    density: float = 1.0
    gamma: float = 0.01
    scale: float = 1.0
    t: float = 0.5
    normalize: bool | None = None
    rescale: Literal["inverse", "l1", "none"] = "inverse"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in MERGES:
            raise UsageError(f"unknown merge {self.method!r}", remedy=f"There are {', '.join(MERGES)}", param="method")
        if not 0 < self.density <= 1 or not 0 <= self.gamma < 1:
            raise UsageError(f"density {self.density} and gamma {self.gamma} must lie in 0..1", param="density")
        if not 0 <= self.t <= 1:
            raise UsageError(f"t is {self.t}, must lie in 0..1", param="t")
        if self.rescale not in ("inverse", "l1", "none"):
            raise UsageError(f"unknown rescale {self.rescale!r}", remedy="inverse, l1 or none", param="rescale")

    @property
    def needs_base(self) -> bool:
        return MERGES[self.method].base


@dataclass(frozen=True, slots=True)
class MergeStage(MergeOptions):
    """The recipe's stage: the model in hand is the base. models: references. weights: one each; () means 1 each."""

    models: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()


def check_models(options: MergeOptions, weights: Sequence[float]) -> None:
    """Raises UsageError for weights that the method can do nothing with."""
    if not weights:
        raise UsageError("no models to merge", param="models")
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
        raise UsageError(f"{o.method} needs the base that the models were tuned from", param="base")
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
        raise UsageError(f"{len(options.models)} models and {len(weights)} weights", param="weights")
    check_models(options, weights)
    plain = MergeOptions(**{f.name: getattr(options, f.name) for f in fields(MergeOptions)})
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="merge-", dir=work.folder)))
        others = [stack.enter_context(Work.open(m, scratch / str(i))) for i, m in enumerate(options.models)]
        for other in others:
            _check_same(work, other)
        for name in work.names():
            base = work.value(name) if plain.needs_base else None
            work.put(name, merge(name, base, [other.value(name) for other in others], weights, plain))
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
