"""Quantization-aware training: the forward pass has the very values that will be stored, gradients pass them straight.

Sources: straight-through gradients (Bengio et al. 2013, arXiv 1308.3432; Jacob et al. 2017, arXiv 1712.05877); learned
step sizes, LSQ (Esser et al. 2019, arXiv 1902.08153) and zero points, LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576);
the float model as teacher (LLM-QAT, Liu et al. 2023, arXiv 2305.17888).

A weight w in a group with step s, zero point z (or minimum m) becomes v = s Q((w - m) / s) + m with Q the nearest level
between the lowest l and the highest h. Inside, dv/dw = 1 and dv/ds = Q - (w - m) / s; outside, dv/dw = 0, dv/ds = Q,
dv/dm = 1, dv/dz = -s. Steps and minimums are rounded to the format's own type in the forward pass, zero points to whole
numbers, so `pack` exports exactly what was trained. LSQ's gradient scale 1 / sqrt(n h) has no counterpart: steps are
learned as multiples of their first value, and Adam does not see the scale of a gradient.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inhouse.compress.grids import Grid, Params, Search
from inhouse.runtime.form import Form
from inhouse.runtime.packed import Packed


class FakeQuant:
    """A `fit.WeightHook` that puts a grid's values in a weight's place, bit for bit those that `pack` decodes to.

    Args:
        weight: f32 [out, in], what the grid is fitted to.
        importance: of its inputs, f32 [in], as of `Grid.fit`.
        learn_steps: learn steps (and zero points and minimums) beside the weight; formats with two levels of scales or
            power-of-two scales keep those they were fitted with.
    """

    def __init__(
        self,
        weight: Tensor,
        grid: Grid,
        importance: Tensor | None = None,
        *,
        learn_steps: bool = True,
        search: Search = "wls",
    ) -> None:
        self.grid = grid
        self._base = grid.fit(weight, importance, search)
        self._index = grid.index()
        self._learned: dict[str, Tensor] = {}
        if learn_steps and self._base.stored is None and grid.scale_mode == "free":
            self._learned["step"] = torch.ones_like(self._base.scale).requires_grad_()
            if self._base.zero is not None:
                self._learned["zero"] = torch.zeros_like(self._base.zero).requires_grad_()
            if self._base.offset is not None:
                self._learned["offset"] = torch.zeros_like(self._base.offset).requires_grad_()

    def parameters(self) -> Mapping[str, Tensor]:
        """`step` [out, groups]: factor of the first scale. `zero`: what is added to the first zero point, before
        rounding. `offset`: what is added to the first minimum, in units of the first scale."""
        return self._learned

    def params(self) -> Params:
        """What codes mean now, exactly as stored."""
        with torch.no_grad():
            return self._params()

    def __call__(self, weight: Tensor) -> Tensor:
        params = self.params()
        step = self._learned.get("step")
        zero, offset = self._learned.get("zero"), self._learned.get("offset")
        out: Tensor = _Fake.apply(weight, step, zero, offset, self, params)  # type: ignore[no-untyped-call]
        return out

    def codes(self, weight: Tensor) -> Tensor:
        """uint8 [out, in]."""
        return self.grid.round(weight.detach(), self.params(), self._index)

    def pack(self, weight: Tensor) -> Packed:
        """The weight as it will be stored: its values equal `self(weight)` bit for bit."""
        return self.grid.pack(self.codes(weight), self.params())

    def form(self, weight: Tensor) -> Form:
        """The same as a Form."""
        return Form(self.pack(weight))

    def _params(self) -> Params:
        base, learned = self._base, self._learned
        if not learned:
            return base
        scale = self.grid.storable(base.scale * learned["step"])
        zero = offset = None
        if base.zero is not None:
            low, high = 0, (1 << self.grid.format.bits) - 1
            zero = torch.round(base.zero + learned["zero"]).clamp(low, high)
        if base.offset is not None:
            offset = self.grid.storable(base.offset + base.scale * learned["offset"])
        return Params(scale, zero, offset)


class _Fake(torch.autograd.Function):
    """See the module: forward gives the stored values, backward LSQ's gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        step: Tensor | None,
        zero: Tensor | None,
        offset: Tensor | None,
        hook: FakeQuant,
        params: Params,
    ) -> Tensor:
        grid, index = hook.grid, hook._index
        codes = grid.round(weight, params, index)
        value = grid.decode(codes, params, index)
        ctx.hook, ctx.params = hook, params
        ctx.save_for_backward(weight, codes)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, codes = ctx.saved_tensors
        hook: FakeQuant = ctx.hook
        params: Params = ctx.params
        level, place, inside = _places(hook.grid, params, weight, codes)
        given = grads[0]
        to_step = to_zero = to_offset = None
        if hook._learned:
            slope = torch.where(inside, level - place, level)
            to_step = _by_group(hook.grid, given * slope, params) * hook._base.scale
            outside = torch.where(inside, torch.zeros_like(given), given)
            if params.zero is not None:
                to_zero = -_by_group(hook.grid, outside, params) * params.scale
            if params.offset is not None:
                to_offset = _by_group(hook.grid, outside, params) * hook._base.scale
        return given * inside, to_step, to_zero, to_offset, None, None


def _places(grid: Grid, params: Params, weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The level Q of each code, the place (w - m) / s of each weight, and whether it lies between the extremes."""
    index = grid.index()
    scale = params.scale[:, index]
    x = weight if params.offset is None else weight - params.offset[:, index]
    place = x * torch.where(scale == 0, 0.0, 1.0 / scale)
    if grid.format.table:
        levels = grid.levels()
        usable = levels[~levels.isnan()]
        return levels[codes.long()], place, (place >= usable.min()) & (place <= usable.max())
    zero = torch.full_like(scale, float(grid.format.zero)) if params.zero is None else params.zero[:, index]
    low, high = grid.code_range()
    inside = (place >= low - zero - 0.5) & (place <= high - zero + 0.5)
    return codes.to(weight.dtype) - zero, place, inside


def _by_group(grid: Grid, values: Tensor, params: Params) -> Tensor:
    """Sums [out, in] over the inputs of each group, [out, groups]."""
    return torch.zeros_like(params.scale).index_add_(1, grid.index(), values)
