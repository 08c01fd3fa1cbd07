"""Rewrites: functions from Program to Program. Values are renumbered as ops come and go; weights keep their names."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.ops import Builder
from inhouse.runtime.packed import WHOLE_ROW, activation_group, activation_powers, narrow_inputs
from inhouse.runtime.program import Op, Program, ProgramSet, Value, WeightSpec

NARROW = -2  # beside activation groups: floats rounded to bf16


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

    Linears that need the same granularity of the same value share one quantised input, with scales that are powers of
    two where all weights of an op allow it; wide floats in front of bf16 weights are rounded to bf16 (`narrow`); a
    `linears` op with several kinds of weights is split.
    Raises UnsupportedError for an unknown format.
    """
    known = known_weights(programs)
    rewritten = {name: _Quantize(program, known, formats).run() for name, program in programs.programs.items()}
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


def low_rank(programs: ProgramSet, ranks: Mapping[str, int], alone: Collection[str] = ()) -> ProgramSet:
    """Puts a side branch beside weights: y = x W^T + (x a^T) b^T.

    Args:
        ranks: canonical name `X.weight` -> k. New weights are `X.a.weight` [k, in] and `X.b.weight` [out, k]; an
            embedding's branch takes rows of b and multiplies them by `X.at.weight` [in, k], the transpose of a.
        alone: those of `ranks` of which nothing but the branch is left: y = (x a^T) b^T, and `X.weight` is gone.

    Linears of one op share one op for their a. Raises UsageError for a name that is no weight, UnsupportedError where
    another op reads such a weight, or where experts of one matrix differ in rank.
    """
    if not ranks:
        return programs
    weights: dict[str, WeightSpec] = {}
    read = {kind: _read_by(programs, kind) for kind in ("linears", "expert_linears", "embed")}
    for name in ranks:
        if name not in programs.weights or len(programs.weights[name].shape) != 2:
            raise UsageError(f"{name!r} has a side branch and is no matrix of the model", param=name)
    for name, spec in programs.weights.items():
        if name not in alone:
            weights[name] = spec
        if name not in ranks:
            continue
        stem, k, (rows, columns) = name.removesuffix(".weight"), ranks[name], spec.shape
        if name in read["embed"]:
            weights[f"{stem}.at.weight"] = WeightSpec(f"{stem}.at.weight", (columns, k), "linear")
        if name in read["linears"] | read["expert_linears"]:
            weights[f"{stem}.a.weight"] = WeightSpec(f"{stem}.a.weight", (k, columns), "linear")
        weights[f"{stem}.b.weight"] = WeightSpec(f"{stem}.b.weight", (rows, k), spec.kind)
    known = known_weights(programs) | weights
    rewritten = {
        name: _LowRank(program, known, ranks, frozenset(alone)).run() for name, program in programs.programs.items()
    }
    return replace(programs, programs=rewritten, weights=weights)


def _read_by(programs: ProgramSet, kind: str) -> set[str]:
    """Weights that ops of a kind read."""
    return {
        name for program in programs.programs.values() for op in program.ops if op.kind == kind for name in op.weights
    }


class _LowRank(Rewriter):
    def __init__(
        self, program: Program, weights: Mapping[str, WeightSpec], ranks: Mapping[str, int], alone: Collection[str]
    ) -> None:
        super().__init__(program, weights)
        self._ranks, self._alone = ranks, alone

    def rewrite(self, op: Op) -> None:
        if not any(name in self._ranks for name in op.weights):
            return self.copy(op)
        if op.kind == "embed":
            return self._embed(op)
        if op.kind not in ("linears", "expert_linears"):
            raise UnsupportedError(f"a weight of op {op.kind} (layer {op.layer}) has a low-rank side branch")
        return self._linears(op)

    def _embed(self, op: Op) -> None:
        """scale * (W + b a)[ids]: rows of b carry the scale, too."""
        (name,) = op.weights
        stem = name.removesuffix(".weight")
        (rows,) = self.emit(replace(op, weights=(f"{stem}.b.weight",)))
        side = self._builder.one("linears", rows, weights=[f"{stem}.at.weight", ""])
        if name not in self._alone:
            side = self._builder.one("add", self.emit(op)[0], side)
        self.bind(op.outputs, (side,))

    def _linears(self, op: Op) -> None:
        """Matrices of the op, each one weight or as many as there are experts, and their biases."""
        half, each = len(op.weights) // 2, int(op.attrs.get("experts", 1))
        inputs = self.inputs(op)
        names = [op.weights[at : at + each] for at in range(0, half, each)]
        biases = [op.weights[half + at : half + at + each] for at in range(0, half, each)]
        which = [i for i, group in enumerate(names) if self._has_branch(group)]
        firsts = self._apply(op, inputs, [self._side(names[i], "a") for i in which], [("",) * each] * len(which))
        plain = [i for i in range(len(names)) if names[i][0] not in self._alone]
        made = dict(
            zip(plain, self._apply(op, inputs, [names[i] for i in plain], [biases[i] for i in plain]), strict=True)
        )
        for i, first in zip(which, firsts, strict=True):
            bias = ("",) * each if i in made else biases[i]
            (side,) = self._apply(op, (first, *inputs[1:]), [self._side(names[i], "b")], [bias])
            made[i] = self._builder.one("add", made[i], side) if i in made else side
        self.bind(op.outputs, tuple(made[i] for i in range(len(names))))

    def _apply(
        self, op: Op, inputs: tuple[Value, ...], names: Sequence[tuple[str, ...]], biases: Sequence[tuple[str, ...]]
    ) -> tuple[Value, ...]:
        if not names:
            return ()
        weights = tuple(name for group in (*names, *biases) for name in group)
        return self.emit(replace(op, inputs=inputs, weights=weights))

    def _has_branch(self, group: tuple[str, ...]) -> bool:
        found = {(self._ranks.get(name, 0), name in self._alone) for name in group}
        if len(found) > 1:
            raise UnsupportedError(
                f"experts of one matrix ({group[0]} ..) have side branches of different rank",
                remedy="Give all experts of a matrix the same rank.",
            )
        return found.pop()[0] > 0

    @staticmethod
    def _side(group: tuple[str, ...], which: str) -> tuple[str, ...]:
        return tuple(f"{name.removesuffix('.weight')}.{which}.weight" for name in group)


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
    def __init__(self, program: Program, weights: Mapping[str, WeightSpec], formats: Mapping[str, str]) -> None:
        super().__init__(program, weights)
        self._formats = formats
        self._groups = {name: activation_group(fmt) for name, fmt in formats.items()}
        self._quantized: dict[tuple[int, int, bool], Value] = {}  # (new value, group, powers) -> its quantised rows

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
            narrow = narrow_inputs(self._formats.get(name, ""), x.width)
            by_group.setdefault(NARROW if narrow else self._group(name, x), []).append(i)
        for group, which in by_group.items():
            names = tuple(op.weights[i] for i in which)
            weights = names + tuple(op.weights[half + i] for i in which)
            narrow = group == NARROW
            rows = x if narrow else self._rows(x, group, names)
            made = self.emit(replace(op, inputs=(rows,), weights=weights, attrs={**op.attrs, "narrow": narrow}))
            self.bind(tuple(op.outputs[i] for i in which), made)

    def _experts(self, op: Op) -> None:
        """Each of the op's matrices on its own, since gate and up may differ in granularity. Where the experts of one
        differ among themselves it takes floats, which are right for every format."""
        half, experts = len(op.weights) // 2, int(op.attrs["experts"])
        x, routing = self.inputs(op)
        by_group: dict[int, list[int]] = {}
        for i in range(half // experts):
            found = {self._group(name, x) for name in op.weights[i * experts : (i + 1) * experts]}
            by_group.setdefault(found.pop() if len(found) == 1 else 0, []).append(i)
        for group, which in by_group.items():
            names = [op.weights[start + i * experts + e] for start in (0, half) for i in which for e in range(experts)]
            made = self.emit(
                replace(op, inputs=(self._rows(x, group, names[: len(names) // 2]), routing), weights=tuple(names))
            )
            self.bind(tuple(op.outputs[i] for i in which), made)

    def _heads(self, op: Op) -> None:
        """A head's elements must be whole groups of activations; else floats."""
        (x,) = self.inputs(op)
        group = self._groups.get(op.weights[0], 0)
        if group == WHOLE_ROW or (group and x.width // int(op.attrs["heads"]) % group):
            group = 0
        self.bind(op.outputs, self.emit(replace(op, inputs=(self._rows(x, group, ()),))))

    def _group(self, name: str, x: Value) -> int:
        """Elements that share a scale; a row shorter than that (a side branch of low rank) stays floats."""
        group = self._groups.get(name, 0)
        return 0 if group > x.width else group

    def _rows(self, x: Value, group: int, weights: Sequence[str]) -> Value:
        """`x` itself for float weights, else its quantised rows for these weights, made once."""
        if not group:
            return x
        powers = bool(weights) and all(activation_powers(self._formats[name], x.width) for name in weights if name)
        key = (x.id, group, powers)
        if key not in self._quantized:
            self._quantized[key] = self._builder.one(
                "quantize_rows", x, group=0 if group == WHOLE_ROW else group, powers=powers
            )
        return self._quantized[key]
