"""Evaluates a Program in torch, op by op. Where the rows come from (a step over paged state, or whole sequences) is
behind `Rows`; this file only knows which function of `torch_ops` each kind of op is."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from inhouse.core.errors import UsageError
from inhouse.runtime import torch_moe as moe
from inhouse.runtime import torch_ops as ops
from inhouse.runtime.ops import train_widths
from inhouse.runtime.program import Axis, Op, Program
from inhouse.runtime.torch_ops import QuantRows

TorchValue = Tensor | QuantRows
Observe = Callable[[Op, Sequence[TorchValue], Sequence[TorchValue]], None]


class Rows(Protocol):
    """What an evaluation runs over: the arrays behind the row axes, and what needs more than a row at a time."""

    def ids(self, source: str, axis: Axis) -> Tensor:
        """int64 [rows]: `tokens`, `positions` or `types` of an axis, or the prefix of each row's sequence."""

    def select(self, x: Tensor) -> Tensor:
        """x [T, width] -> [S, width]."""

    def sequences(self, axis: Axis) -> tuple[Tensor, int]:
        """int64 [rows], ascending: which sequence each row belongs to; and how many sequences there are."""

    def attention(self, op: Op, inputs: Sequence[Tensor], weights: Sequence[Tensor | None]) -> Tensor:
        """The op `attention`: inputs q, k, v (cross: q), weights (bias table, sinks), either absent or None."""

    def write_cross(self, op: Op, k: Tensor, v: Tensor) -> None:
        """The op `write_cross`."""

    def adapt(self, op: Op, x: TorchValue, made: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the op `linears` made, with what the rows' adapters add."""


def evaluate(
    program: Program, weights: Mapping[str, Tensor], rows: Rows, observe: Observe | None = None
) -> dict[str, Tensor]:
    """Runs every op; role -> tensor. Raises UsageError if a weight that the Program names is missing.

    A value is dropped after its last reader, so that inference holds one layer at a time. `observe` is called
    after each op with its inputs and outputs (calibration, statistics).
    """
    kept = {value.id for value in program.outputs.values()}
    values = evaluate_ops(program.ops, {}, kept, weights, rows, observe)
    return {role: _tensor(values[value.id]) for role, value in program.outputs.items()}


def evaluate_ops(
    ops: Sequence[Op],
    given: Mapping[int, TorchValue],
    kept: Collection[int],
    weights: Mapping[str, Tensor],
    rows: Rows,
    observe: Observe | None = None,
) -> dict[int, TorchValue]:
    """Runs a run of a Program's ops over values made before it; value id -> tensor, of those in `kept`."""
    last = {value.id: i for i, op in enumerate(ops) for value in op.inputs}
    values: dict[int, TorchValue] = dict(given)
    for i, op in enumerate(ops):
        inputs = [values[value.id] for value in op.inputs]
        outputs = _OPS[op.kind](op, inputs, [_weight(weights, op, name) for name in op.weights], rows)
        if observe is not None:
            observe(op, inputs, outputs)
        for value, tensor in zip(op.outputs, outputs, strict=True):
            if value.id in last or value.id in kept:
                values[value.id] = tensor
        for value in op.inputs:
            if last[value.id] == i and value.id not in kept:
                values.pop(value.id, None)
    return {key: tensor for key, tensor in values.items() if key in kept}


def _weight(weights: Mapping[str, Tensor], op: Op, name: str) -> Tensor | None:
    if not name:
        return None
    if name not in weights:
        raise UsageError(f"op {op.kind} of layer {op.layer} needs the weight {name}, which was not given", param=name)
    return weights[name]


def _tensor(value: TorchValue) -> Tensor:
    if isinstance(value, QuantRows):
        raise UsageError(
            "quantised rows stand where floats are expected", remedy="A rewrite made an ill-formed Program"
        )
    return value


def _given(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise UsageError("an op lacks a weight that it needs", remedy="The builder made an ill-formed Program")
    return weight


Run = Callable[[Op, Sequence[TorchValue], Sequence[Tensor | None], Rows], list[TorchValue]]


def _embed(op: Op, xs: Sequence[TorchValue], ws: Sequence[Tensor | None], rows: Rows) -> list[TorchValue]:
    ids = rows.ids(str(op.attrs["source"]), Axis(str(op.attrs["axis"])))
    return [ops.embed(ids, _given(ws[0]), offset=int(op.attrs["offset"]), scale=float(op.attrs["scale"]))]


def _embed_train(op: Op, xs: Sequence[TorchValue], ws: Sequence[Tensor | None], rows: Rows) -> list[TorchValue]:
    ids = rows.ids(str(op.attrs["source"]), Axis(str(op.attrs["axis"])))
    return [ops.embed_train(ids, [_given(w) for w in ws], train_widths(op.attrs), scale=float(op.attrs["scale"]))]


def _rms_norm(op: Op, xs: Sequence[TorchValue], ws: Sequence[Tensor | None], rows: Rows) -> list[TorchValue]:
    eps, offset = float(op.attrs["eps"]), float(op.attrs["offset"])
    return [ops.rms_norm(_tensor(xs[0]), _given(ws[0]), eps=eps, heads=int(op.attrs["heads"]), offset=offset)]


def _layer_norm(op: Op, xs: Sequence[TorchValue], ws: Sequence[Tensor | None], rows: Rows) -> list[TorchValue]:
    bias = ws[1] if len(ws) > 1 else None
    return [ops.layer_norm(_tensor(xs[0]), _given(ws[0]), bias, eps=float(op.attrs["eps"]))]


def _linears(op: Op, xs: Sequence[TorchValue], ws: Sequence[Tensor | None], rows: Rows) -> list[TorchValue]:
    half, x = len(ws) // 2, xs[0]
    if op.attrs["narrow"]:
        x = _tensor(x).to(torch.bfloat16).float()
    return [*rows.adapt(op, xs[0], ops.linears(x, [_given(w) for w in ws[:half]], ws[half:]))]


def _rotary(op: Op, xs: Sequence[TorchValue], ws: Sequence[Tensor | None], rows: Rows) -> list[TorchValue]:
    axis, factor, frequencies = Axis(str(op.attrs["axis"])), float(op.attrs["factor"]), _given(ws[0])
    positions = rows.ids("positions", axis)
    if op.attrs["source"] == "positions":
        return [ops.rotary(positions, frequencies, factor=factor)]
    return [ops.two_part_rotary(positions, rows.ids("prefixes", axis), frequencies, factor=factor)]


def _rope(op: Op, xs: Sequence[TorchValue], ws: Sequence[Tensor | None], rows: Rows) -> list[TorchValue]:
    head_dim, interleaved = int(op.attrs["head_dim"]), bool(op.attrs["interleaved"])
    return [ops.rope(_tensor(xs[0]), _tensor(xs[1]), head_dim=head_dim, interleaved=interleaved)]


def _attention(op: Op, xs: Sequence[TorchValue], ws: Sequence[Tensor | None], rows: Rows) -> list[TorchValue]:
    return [rows.attention(op, [_tensor(x) for x in xs], ws)]


def _write_cross(op: Op, xs: Sequence[TorchValue], ws: Sequence[Tensor | None], rows: Rows) -> list[TorchValue]:
    rows.write_cross(op, _tensor(xs[0]), _tensor(xs[1]))
    return []


def _pool(op: Op, xs: Sequence[TorchValue], ws: Sequence[Tensor | None], rows: Rows) -> list[TorchValue]:
    sequences, count = rows.sequences(op.inputs[0].axis)
    mode, normalize = str(op.attrs["mode"]), bool(op.attrs["normalize"])
    return [ops.pool(_tensor(xs[0]), sequences, count, mode=mode, normalize=normalize)]


def _glu(op: Op, xs: Sequence[TorchValue], ws: Sequence[Tensor | None], rows: Rows) -> list[TorchValue]:
    limit, offset = float(op.attrs["limit"]), float(op.attrs["offset"])
    return [ops.glu(_tensor(xs[0]), _tensor(xs[1]), str(op.attrs["act"]), limit=limit, offset=offset)]


def _route(op: Op, xs: Sequence[TorchValue], ws: Sequence[Tensor | None], rows: Rows) -> list[TorchValue]:
    a = op.attrs
    return [
        moe.route(
            _tensor(xs[0]), ws[0] if ws else None, top_k=int(a["top_k"]), normalize=bool(a["normalize"]),
            scoring=str(a["scoring"]), scale=float(a["scale"]), groups=int(a["groups"]),
            top_groups=int(a["top_groups"]), group_score=str(a["group_score"]), jitter=float(a["jitter"]),
        )
    ]  # fmt: skip


def _expert_linears(op: Op, xs: Sequence[TorchValue], ws: Sequence[Tensor | None], rows: Rows) -> list[TorchValue]:
    half = len(ws) // 2
    weights = [_given(w) for w in ws[:half]]
    return [*moe.expert_linears(xs[0], _tensor(xs[1]), weights, ws[half:], int(op.attrs["experts"]))]


_OPS: Mapping[str, Run] = {
    "embed": _embed,
    "embed_train": _embed_train,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "quantize_rows": lambda op, xs, ws, rows: [
        ops.quantize_rows(_tensor(xs[0]), group=int(op.attrs["group"]), powers=bool(op.attrs["powers"]))
    ],
    "linears": _linears,
    "rotary": _rotary,
    "rope": _rope,
    "attention": _attention,
    "write_cross": _write_cross,
    "act": lambda op, xs, ws, rows: [ops.act(_tensor(xs[0]), str(op.attrs["act"]))],
    "glu": _glu,
    "add": lambda op, xs, ws, rows: [_tensor(xs[0]) + _tensor(xs[1])],
    "mul": lambda op, xs, ws, rows: [_tensor(xs[0]) * _tensor(xs[1])],
    "scale": lambda op, xs, ws, rows: [_tensor(xs[0]) * float(op.attrs["by"])],
    "soft_cap": lambda op, xs, ws, rows: [ops.soft_cap(_tensor(xs[0]), float(op.attrs["cap"]))],
    "select_rows": lambda op, xs, ws, rows: [rows.select(_tensor(xs[0]))],
    "select_columns": lambda op, xs, ws, rows: [_tensor(xs[0])[:, _given(ws[0]).long()]],
    "pool": _pool,
    "route": _route,
    "dispatch": lambda op, xs, ws, rows: [moe.dispatch(_tensor(xs[0]), _tensor(xs[1]))],
    "expert_linears": _expert_linears,
    "combine": lambda op, xs, ws, rows: [moe.combine(_tensor(xs[0]), _tensor(xs[1]))],
    "scale_rows": lambda op, xs, ws, rows: [_tensor(xs[0]) * _tensor(xs[1])],
    "concat": lambda op, xs, ws, rows: [ops.concat(_tensor(xs[0]), _tensor(xs[1]), heads=int(op.attrs["heads"]))],
    "head_linears": lambda op, xs, ws, rows: [ops.head_linears(xs[0], _given(ws[0]), heads=int(op.attrs["heads"]))],
}
