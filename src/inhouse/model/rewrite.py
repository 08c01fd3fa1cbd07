"""Rewrites: functions from Program to Program. Values are renumbered as ops come and go; weights keep their names."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnsupportedError
from inhouse.runtime.ops import Builder
from inhouse.runtime.packed import WHOLE_ROW, activation_group
from inhouse.runtime.program import Op, Program, ProgramSet, Value, WeightSpec


class Rewriter:
    """Copies a Program op by op; a subclass overrides `rewrite` for the ops that it changes.

    `self.emit(...)` appends an op over new values, `self.copy(op)` appends `op` unchanged.
    """

    def __init__(self, program: Program, weights: Mapping[str, WeightSpec]) -> None:
        self._program = program
        self._builder = Builder(program.name, weights)
        self._new: dict[int, Value] = {}  # id in the old Program -> value in the new one

    def run(self) -> Program:
        """The rewritten Program; raises UsageError if the rewrite made an ill-formed one."""
        for op in self._program.ops:
            self._builder.layer = op.layer
            self.rewrite(op)
        return self._builder.finish(**{role: self._new[value.id] for role, value in self._program.outputs.items()})

    def rewrite(self, op: Op) -> None:
        """Appends what `op` becomes and binds its outputs."""
        self.copy(op)

    def copy(self, op: Op) -> None:
        """Appends `op` over the new values of its inputs."""
        self.bind(op.outputs, self.emit(replace(op, inputs=self.inputs(op))))

    def inputs(self, op: Op) -> tuple[Value, ...]:
        """The new values that stand for the op's inputs."""
        return tuple(self._new[value.id] for value in op.inputs)

    def emit(self, op: Op) -> tuple[Value, ...]:
        """Appends an op whose inputs are new values; returns its outputs."""
        return self._builder.op(op.kind, *op.inputs, weights=op.weights, **op.attrs)

    def bind(self, old: tuple[Value, ...], new: tuple[Value, ...]) -> None:
        """From here on, `new` stand for `old`."""
        for before, after in zip(old, new, strict=True):
            self._new[before.id] = after


def known_weights(programs: ProgramSet) -> dict[str, WeightSpec]:
    """Every name that ops of the set may use: its weights and its constants."""
    constants = {name: WeightSpec(name, array.shape, "vector") for name, array in programs.constants.items()}
    return {**programs.weights, **constants}


def quantize_activations(programs: ProgramSet, formats: Mapping[str, str]) -> ProgramSet:
    """Puts `quantize_rows` in front of every linear whose weight is in a code format.

    Args:
        formats: canonical weight name -> packed format; names that are not there are floats.

    Linears that need the same granularity of the same value share one quantised input; a `linears` op with both kinds
    of weights is split in two. Raises UnsupportedError for an unknown format.
    """
    groups = {name: activation_group(fmt) for name, fmt in formats.items()}
    known = known_weights(programs)
    rewritten = {name: _Quantize(program, known, groups).run() for name, program in programs.programs.items()}
    return replace(programs, programs=rewritten)


def order_columns(programs: ProgramSet, columns: Mapping[str, npt.NDArray[np.int64]]) -> ProgramSet:
    """Puts `select_columns` in front of every linear whose weight keeps its input columns in another order.

    Args:
        columns: canonical weight name -> int64 [in]: column j of the weight takes input columns[j].

    Linears of one order share the reordered input; a `linears` op with weights of several orders is split. Raises
    UnsupportedError where another op than `linears` reads such a weight.
    """
    if not columns:
        return programs
    names: dict[str, str] = {}  # weight -> constant
    constants: dict[bytes, str] = {}
    arrays = dict(programs.constants)
    for weight, order in columns.items():
        name = constants.setdefault(order.tobytes(), f"const.columns.{len(constants)}")
        arrays[name], names[weight] = order.astype(np.float32), name
    programs = replace(programs, constants=arrays)
    known = known_weights(programs)
    rewritten = {name: _Order(program, known, names).run() for name, program in programs.programs.items()}
    return replace(programs, programs=rewritten)


class _Order(Rewriter):
    def __init__(self, program: Program, weights: Mapping[str, WeightSpec], orders: Mapping[str, str]) -> None:
        super().__init__(program, weights)
        self._orders = orders
        self._ordered: dict[tuple[int, str], Value] = {}  # (new value, constant) -> its columns in that order

    def rewrite(self, op: Op) -> None:
        if not any(name in self._orders for name in op.weights):
            return self.copy(op)
        if op.kind != "linears":
            raise UnsupportedError(
                f"weights of op {op.kind} (layer {op.layer}) keep their columns in act-order",
                remedy="Quantise the model again without act-order, or with its static form.",
            )
        half = len(op.weights) // 2
        (x,) = self.inputs(op)
        by_order: dict[str, list[int]] = {}
        for i, name in enumerate(op.weights[:half]):
            by_order.setdefault(self._orders.get(name, ""), []).append(i)
        for order, which in by_order.items():
            weights = tuple(op.weights[i] for i in which) + tuple(op.weights[half + i] for i in which)
            made = self.emit(replace(op, inputs=(self._columns(x, order),), weights=weights))
            self.bind(tuple(op.outputs[i] for i in which), made)
        return None

    def _columns(self, x: Value, order: str) -> Value:
        if not order:
            return x
        key = (x.id, order)
        if key not in self._ordered:
            self._ordered[key] = self._builder.one("select_columns", x, weights=[order])
        return self._ordered[key]


class _Quantize(Rewriter):
    def __init__(self, program: Program, weights: Mapping[str, WeightSpec], groups: Mapping[str, int]) -> None:
        super().__init__(program, weights)
        self._groups = groups
        self._quantized: dict[tuple[int, int], Value] = {}  # (new value, group) -> its quantised rows

    def rewrite(self, op: Op) -> None:
        if op.kind == "linears":
            self._linears(op)
        elif op.kind == "expert_linears":
            self._experts(op)
        elif op.kind == "head_linears":
            self._heads(op)
        else:
            self.copy(op)

    def _linears(self, op: Op) -> None:
        half = len(op.weights) // 2
        (x,) = self.inputs(op)
        by_group: dict[int, list[int]] = {}
        for i, name in enumerate(op.weights[:half]):
            by_group.setdefault(self._groups.get(name, 0), []).append(i)
        for group, which in by_group.items():
            weights = tuple(op.weights[i] for i in which) + tuple(op.weights[half + i] for i in which)
            made = self.emit(replace(op, inputs=(self._rows(x, group),), weights=weights))
            self.bind(tuple(op.outputs[i] for i in which), made)

    def _experts(self, op: Op) -> None:
        """Each of the op's matrices on its own, since gate and up may differ in granularity. Where the experts of one
        differ among themselves it takes floats, which are right for every format."""
        half, experts = len(op.weights) // 2, int(op.attrs["experts"])
        x, routing = self.inputs(op)
        by_group: dict[int, list[int]] = {}
        for i in range(half // experts):
            found = {self._groups.get(name, 0) for name in op.weights[i * experts : (i + 1) * experts]}
            by_group.setdefault(found.pop() if len(found) == 1 else 0, []).append(i)
        for group, which in by_group.items():
            names = [op.weights[start + i * experts + e] for start in (0, half) for i in which for e in range(experts)]
            made = self.emit(replace(op, inputs=(self._rows(x, group), routing), weights=tuple(names)))
            self.bind(tuple(op.outputs[i] for i in which), made)

    def _heads(self, op: Op) -> None:
        """A head's elements must be whole groups of activations; else floats."""
        (x,) = self.inputs(op)
        group = self._groups.get(op.weights[0], 0)
        if group == WHOLE_ROW or (group and x.width // int(op.attrs["heads"]) % group):
            group = 0
        self.bind(op.outputs, self.emit(replace(op, inputs=(self._rows(x, group),))))

    def _rows(self, x: Value, group: int) -> Value:
        """`x` itself for float weights, else its quantised rows, made once."""
        if not group:
            return x
        key = (x.id, group)
        if key not in self._quantized:
            self._quantized[key] = self._builder.one("quantize_rows", x, group=0 if group == WHOLE_ROW else group)
        return self._quantized[key]
