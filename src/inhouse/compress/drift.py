"""Rounding a layer against what the layers before it have become: targets of the first path, inputs of the second.

Along one path run the weights as the stage found them, along the other those rounded so far. Each matrix is first
replaced by the one whose output on the second path's inputs is nearest to what the first path's were (closed form); a
matrix that writes into the residual stream also makes up what the stream has lost before it. Then it is rounded with
feedback on the second path's Gram matrix, and the gain of the norm in front is re-solved for the rounded matrices.
Frantar et al. 2022 (2210.17323); Li et al. 2025 (GPTAQ, 2504.02692). Needs `linears`; others are left alone and named.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inhouse.compress.blocks import Block
from inhouse.compress.fallbacks import KEY, fallback
from inhouse.compress.feedback import GptqOptions, gptq_codes
from inhouse.compress.graph import matrices_of
from inhouse.compress.grids import Grid
from inhouse.compress.quadratic import relative_error
from inhouse.compress.values import NotNegative
from inhouse.compress.work import Work
from inhouse.runtime.form import Form
from inhouse.runtime.packed import is_float
from inhouse.runtime.program import Op

F64_INPUTS = 2048  # wider sums are f32


@dataclass(frozen=True, slots=True)
class DriftOptions:
    """gptq: the rounding. ridge: share of the mean diagonal that draws a corrected matrix towards the original.
    residual: make up for the stream's loss too. norms: re-solve gains."""

    gptq: GptqOptions = field(default_factory=lambda: GptqOptions(refine=3))
    ridge: NotNegative = 0.01
    residual: bool = True
    norms: bool = True


class _Sums(NamedTuple):
    """Means over rows of products: gram x_now x_now^T, cross x_before x_now^T, stream (s_before - s_now) x_now^T (None
    where the op does not write into a stream)."""

    gram: Tensor
    cross: Tensor
    stream: Tensor | None
    rows: int = 1

    def ridge(self, share: float) -> float:
        """What is added to the diagonal: a share of its mean, and more where there are few rows for that many inputs,
        which a correction would be fitted to."""
        return (share + len(self.gram) / max(self.rows, 1)) * float(self.gram.diagonal().mean())


def drift_layer(work: Work, block: Block, choose: Callable[[str], str], options: DriftOptions) -> dict[str, Any]:
    """Rounds every matrix of a layer to the format that `choose(name)` says ("": it stays), puts forms and norms into
    `work`, and returns a record: the relative output error of each matrix, and fallbacks."""
    before = work.weights(block.layer, before=True)
    now = work.weights(block.layer)
    errors: dict[str, float] = {}
    fell: list[dict[str, str]] = []
    for at, op in enumerate(block.ops):
        names = [name for name in matrices_of(op) if choose(name)]
        if not names:
            continue
        if op.kind != "linears":
            why = f"matrices of {op.kind} are left as they are"
            fell += [fallback(name, f"gptaq {choose(name)}", "stays as it is", why) for name in names]
            continue
        sums = _sums(block, before, now, at, options.residual)
        for name in names:
            errors[name], plain = _round(work, name, before[name], now, sums, choose(name), options)
            if plain:
                fell.append(fallback(name, f"gptaq {choose(name)}", f"rtn {choose(name)}", plain))
        if options.norms:
            _resolve_norm(work, block, at, before, now, sums)
    return {"errors": errors} | ({KEY: fell} if fell else {})


def _round(
    work: Work, name: str, weight: Tensor, now: dict[str, Tensor], sums: _Sums, fmt: str, options: DriftOptions
) -> tuple[float, str]:
    wanted = _target(weight, sums, options.ridge)
    if is_float(fmt):
        work.put(name, wanted)
        now[name] = wanted
        return 0.0, ""
    grid = Grid(fmt, weight.shape[1])
    done = gptq_codes(wanted, sums.gram, grid, options.gptq)
    form = Form(grid.pack(done.codes, done.params))
    work.put_form(name, form)
    now[name] = torch.from_numpy(form.value())
    return relative_error(wanted, now[name], sums.gram), done.plain


def _target(weight: Tensor, sums: _Sums, ridge: float) -> Tensor:
    """(W C + S + d W)(H + d I)^-1 with d of `_Sums.ridge`."""
    gram = sums.gram.double()
    size = sums.ridge(ridge)
    if size <= 0:
        return weight
    wide = weight.double()
    right = wide @ sums.cross.double() + size * wide
    if sums.stream is not None:
        right += sums.stream.double()
    factor, failed = torch.linalg.cholesky_ex(gram + size * torch.eye(len(gram), dtype=torch.float64))
    return weight if int(failed) else torch.cholesky_solve(right.T, factor).T.float()


def _sums(block: Block, before: Mapping[str, Tensor], now: Mapping[str, Tensor], at: int, residual: bool) -> _Sums:
    """Of the op at place `at`: both paths run up to it, chunk by chunk."""
    op = block.ops[at]
    width = op.inputs[0].width
    kind = torch.float64 if width <= F64_INPUTS else torch.float32
    gram, cross = torch.zeros(width, width, dtype=kind), torch.zeros(width, width, dtype=kind)
    stream_of = _stream(block.ops, at) if residual else None
    stream = None if stream_of is None else torch.zeros(op.outputs[0].width, width, dtype=kind)
    wanted = [op.inputs[0].id, *([] if stream_of is None else [stream_of])]
    count = 0
    for chunk in range(block.chunks):
        valid = block.valid(chunk)
        with torch.no_grad():
            old = block.values(block.original(chunk), before, wanted, chunk, at)
            new = block.values(block.given(chunk), now, wanted, chunk, at)
        x, y = old[wanted[0]][valid].to(kind), new[wanted[0]][valid].to(kind)
        gram.addmm_(y.T, y)
        cross.addmm_(x.T, y)
        if stream is not None and stream_of is not None:
            stream.addmm_((old[stream_of] - new[stream_of])[valid].to(kind).T, y)
        count += len(y)
    for total in (gram, cross, stream):
        if total is not None:
            total /= max(count, 1)
    return _Sums(gram, cross, stream, count)


def _stream(ops: tuple[Op, ...], at: int) -> int | None:
    """The value that the op's one output is added to, if the op has one and nothing else reads it."""
    op = ops[at]
    if len(op.outputs) != 1:
        return None
    reading = [other for other in ops if any(value.id == op.outputs[0].id for value in other.inputs)]
    if len(reading) != 1 or reading[0].kind != "add":
        return None
    others = [value.id for value in reading[0].inputs if value.id != op.outputs[0].id]
    made = {value.id for other in ops[:at] for value in other.outputs} | {
        value.id for other in ops for value in other.inputs
    } - {value.id for other in ops for value in other.outputs}
    return others[0] if len(others) == 1 and others[0] in made else None


def _resolve_norm(
    work: Work, block: Block, at: int, before: Mapping[str, Tensor], now: dict[str, Tensor], sums: _Sums
) -> None:
    """The gain g of the norm in front for which the rounded matrices' outputs are nearest to the original ones: least
    squares in g, drawn a little towards what it is. Only where nothing but this op reads the norm."""
    op = block.ops[at]
    source = op.inputs[0].id
    norm = next((o for o in block.ops[:at] if any(v.id == source for v in o.outputs)), None)
    reading = [o for o in block.ops if any(v.id == source for v in o.inputs)]
    if norm is None or norm.kind != "rms_norm" or int(norm.attrs["heads"]) != 1 or len(reading) != 1:
        return
    names = list(matrices_of(op))
    rounded = torch.cat([now[name] for name in names]).double()
    original = torch.cat([before[name] for name in names]).double()
    # With r the factors of the gain: sum over rows of |W^ diag(r) y - W x|^2.
    left = (rounded.T @ rounded) * sums.gram.double()
    right = ((rounded.T @ original) * sums.cross.double().T).sum(1)
    ridge = (1e-3 + len(left) / max(sums.rows, 1)) * left.diagonal().mean()
    if not float(ridge) > 0:
        return
    left = left + ridge * torch.eye(len(left), dtype=torch.float64)
    factors = torch.linalg.solve(left, right + ridge).float().clamp(0.5, 2.0)
    gain = norm.weights[0]
    offset = float(norm.attrs["offset"])
    changed = (now[gain] + offset) * factors - offset
    work.put(gain, changed)
    now[gain] = changed
