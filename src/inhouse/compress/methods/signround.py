"""Learned rounding: which way each weight is rounded, and how far each group is clipped, by signed gradient descent.

Sources: SignRound / AutoRound (Cheng et al. 2023, arXiv 2309.05516); signSGD.

v = s (clamp(round(w / s + V) + z) - z) with V within [-1/2, 1/2] and s = s0 * alpha, alpha within `clip`. Both are
learned against the block's (or matrix's) own output, mean square error over calibration inputs, each step
V -= lr sign(dL/dV) with lr falling linearly to 0. The best so far is kept, so the result is never worse than V = 0 on
those inputs; V = 0, alpha = 1 is plain rounding with the grid's scales.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inhouse.compress.blocks import Block
from inhouse.compress.grids import Grid, Params, Search
from inhouse.compress.values import Count, NotNegative, Positive, Seed
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.form import Form
from inhouse.runtime.packed import Packed

Batches = Sequence[Any]


@dataclass(frozen=True, slots=True)
class SignRoundOptions:
    """iters: steps, 200 in the paper. rate: of V; 0: 1 / iters, and 2 / iters at 3 bits or fewer. clip_rate: of
    alpha, as a share of `rate`. clip: least and greatest alpha. batch: inputs (rows) of a step. seed: of their draw."""

    iters: Count = 200
    rate: NotNegative = 0.0
    clip_rate: NotNegative = 0.5
    clip: tuple[Positive, Positive] = (0.5, 1.1)
    batch: Count = 512
    search: Search = "wls"
    seed: Seed = 0


class LearnedRounding:
    """One matrix under way: floats, the grid's parameters, V and alpha. A `fit.WeightHook` too.

    Raises UnsupportedError for grids that have no whole-number codes or scales that cannot be learned.
    """

    def __init__(
        self, weight: Tensor, grid: Grid, importance: Tensor | None = None, *, search: Search = "wls",
        clip: tuple[float, float] = (0.5, 1.1),
    ) -> None:  # fmt: skip
        if grid.format.table or not grid.one_level or grid.scale_mode != "free":
            raise UnsupportedError(f"format {grid.name} has no codes to round up or down by learning", param="format")
        self.grid, self.clip = grid, clip
        self._index = grid.index()
        self._base = grid.fit(weight, importance, search)
        self.shift = torch.zeros_like(weight, requires_grad=True)  # V
        self.alpha = torch.ones_like(self._base.scale, requires_grad=True)

    def parameters(self) -> Mapping[str, Tensor]:
        return {"shift": self.shift, "alpha": self.alpha}

    def params(self) -> Params:
        """What codes mean at this alpha, as stored."""
        with torch.no_grad():
            return Params(self.grid.storable(self._base.scale * self.alpha), self._base.zero, self._base.offset)

    def codes(self, weight: Tensor) -> Tensor:
        """uint8 [out, in]."""
        with torch.no_grad():
            params = self.params()
            return self.grid.round(weight + self.shift * params.scale[:, self._index], params, self._index)

    def __call__(self, weight: Tensor) -> Tensor:
        out: Tensor = _Rounded.apply(weight, self.shift, self.alpha, self)  # type: ignore[no-untyped-call]
        return out

    def pack(self, weight: Tensor) -> Packed:
        """What the present V and alpha store."""
        return self.grid.pack(self.codes(weight), self.params())

    def descend(self, rate: float, clip_rate: float) -> None:
        """One signed step; gradients must be there."""
        with torch.no_grad():
            for leaf, by, low, high in ((self.shift, rate, -0.5, 0.5), (self.alpha, clip_rate, *self.clip)):
                if leaf.grad is not None:
                    leaf.sub_(by * leaf.grad.sign()).clamp_(low, high)
                leaf.grad = None

    def state(self) -> tuple[Tensor, Tensor]:
        """Copies of V and alpha."""
        return self.shift.detach().clone(), self.alpha.detach().clone()

    def restore(self, state: tuple[Tensor, Tensor]) -> None:
        """Puts V and alpha back."""
        with torch.no_grad():
            self.shift.copy_(state[0])
            self.alpha.copy_(state[1])


class _Rounded(torch.autograd.Function):
    """Forward: the stored values. Backward, with Q the level, p = w / s and inside as in the clamp: dv/dV = s inside,
    dv/ds = Q - p inside, Q outside; to alpha through s0."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, shift: Tensor, alpha: Tensor, hook: LearnedRounding) -> Tensor:
        params, codes = hook.params(), hook.codes(weight)
        ctx.hook, ctx.params = hook, params
        ctx.save_for_backward(weight, shift, codes)
        return hook.grid.decode(codes, params, hook._index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, shift, codes = ctx.saved_tensors
        hook: LearnedRounding = ctx.hook
        params: Params = ctx.params
        grid, index = hook.grid, hook._index
        scale = params.scale[:, index]
        x = weight if params.offset is None else weight - params.offset[:, index]
        place = x * torch.where(scale == 0, 0.0, 1.0 / scale)
        zero = float(grid.format.zero) if params.zero is None else params.zero[:, index]
        low, high = grid.code_range()
        moved = place + shift + zero
        inside = (moved >= low - 0.5) & (moved <= high + 0.5)
        level = codes.to(weight.dtype) - zero
        given = grads[0]
        slope = torch.where(inside, level - place, level)
        to_alpha = torch.zeros_like(params.scale).index_add_(1, index, given * slope) * hook._base.scale
        return given * inside, given * scale * inside, to_alpha, None


def learn(
    rounded: Mapping[str, LearnedRounding],
    weights: Mapping[str, Tensor],
    loss: Callable[[Mapping[str, Tensor], Any], Tensor],
    batches: Batches,
    options: SignRoundOptions,
) -> list[float]:
    """Learns V and alpha of some matrices together; leaves the best so far in place.

    Args:
        rounded, weights: name -> matrix under way, and its floats.
        loss: (name -> values, batch) -> scalar: the block's output error on a batch.
        batches: all calibration batches. Each step takes one, drawn by seed; what counts as best is the mean over all
            of them, measured at the start and every tenth step.

    Returns the best mean loss so far at each measurement: non-increasing, the first that of plain rounding.
    """
    if not rounded or not batches:
        raise UsageError("learned rounding needs matrices and calibration inputs", param="calibration")
    rate = options.rate or _default_rate(rounded, options.iters)
    generator = torch.Generator().manual_seed(options.seed)
    best, history = _measure(rounded, weights, loss, batches), list[float]()
    history.append(best)
    kept = {name: matrix.state() for name, matrix in rounded.items()}
    for step in range(options.iters):
        batch = batches[int(torch.randint(len(batches), (), generator=generator))]
        value = loss({name: matrix(weights[name]) for name, matrix in rounded.items()}, batch)
        torch.autograd.backward(value)
        now = rate * (1.0 - step / options.iters)
        for matrix in rounded.values():
            matrix.descend(now, now * options.clip_rate)
        if (step + 1) % 10 == 0 or step + 1 == options.iters:
            found = _measure(rounded, weights, loss, batches)
            if found < best:
                best, kept = found, {name: matrix.state() for name, matrix in rounded.items()}
            history.append(best)
    for name, matrix in rounded.items():
        matrix.restore(kept[name])
    return history


def _default_rate(rounded: Mapping[str, LearnedRounding], iters: int) -> float:
    """The paper's: 1 / iters; twice that at 3 bits or fewer (AutoRound's best recipe)."""
    fewest = min(matrix.grid.format.bits for matrix in rounded.values())
    return (2.0 if fewest <= 3 else 1.0) / iters


def _measure(
    rounded: Mapping[str, LearnedRounding],
    weights: Mapping[str, Tensor],
    loss: Callable[[Mapping[str, Tensor], Any], Tensor],
    batches: Batches,
) -> float:
    with torch.no_grad():
        values = {name: matrix(weights[name]) for name, matrix in rounded.items()}
        return sum(float(loss(values, batch)) for batch in batches) / len(batches)


def signround(weight: Tensor, inputs: Tensor, options: SignRoundOptions, fmt: str) -> tuple[Form, list[float]]:
    """One matrix alone: f32 [out, in] against its own output on inputs f32 [n, in] -> (Form, best loss so far).

    Raises UnsupportedError for formats without whole-number codes, UsageError where inputs do not fit.
    """
    if inputs.dim() != 2 or inputs.shape[1] != weight.shape[1] or not len(inputs):
        raise UsageError(f"inputs {list(inputs.shape)} do not fit a matrix {list(weight.shape)}", param="calibration")
    rounded = LearnedRounding(
        weight, Grid(fmt, weight.shape[1]), inputs.square().mean(0), search=options.search, clip=options.clip
    )
    batches = list(_cut(inputs, options.batch))
    targets = {id(batch): batch @ weight.T for batch in batches}

    def loss(values: Mapping[str, Tensor], batch: Tensor) -> Tensor:
        return torch.nn.functional.mse_loss(batch @ values[""].T, targets[id(batch)])

    history = learn({"": rounded}, {"": weight}, loss, batches, options)
    return Form(rounded.pack(weight)), history


def _cut(inputs: Tensor, size: int) -> Iterator[Tensor]:
    for first in range(0, len(inputs), size):
        yield inputs[first : first + size]


def signround_block(work: Work, layer: int, block: Block, options: SignRoundOptions, fmt: str) -> dict[str, Any]:
    """One layer against its own output: learns V and alpha of all its linears together, inputs along the path that is
    quantised already, targets those of the original layer. Puts the forms; the pipeline saves.

    Raises UnsupportedError for formats without whole-number codes.
    """
    weights = work.weights(layer)
    linears = [name for name in block.names if name in weights and work.programs.weights[name].kind == "linear"]
    rounded = {
        name: LearnedRounding(
            weights[name], Grid(fmt, weights[name].shape[1]), search=options.search, clip=options.clip
        )
        for name in linears
    }
    if not rounded:
        return {}

    def loss(values: Mapping[str, Tensor], chunk: int) -> Tensor:
        made = block.forward(block.given(chunk), {**weights, **values}, chunk)
        target, valid = block.target(chunk), block.valid(chunk)
        parts = [torch.nn.functional.mse_loss(made[value][valid], target[value][valid]) for value in block.outputs]
        return torch.stack(parts).sum()

    history = learn(rounded, {name: weights[name] for name in linears}, loss, range(block.chunks), options)
    for name, matrix in rounded.items():
        work.put_form(name, Form(matrix.pack(weights[name])))
    return {"loss_rounded": history[0], "loss_learned": history[-1]}
