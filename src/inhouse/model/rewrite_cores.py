"""Rewrites for tensors that are stored as cores: embeddings as tensor trains, stacks of experts as Tucker cores.

Knows names and shapes of the cores; does not know how they were found or where they lie.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.model.rewrite import Rewriter, known_weights
from inhouse.runtime.cores import core_name, outer_names, stack_of, train_ranks
from inhouse.runtime.program import Op, Program, ProgramSet, Value, WeightSpec


@dataclass(frozen=True, slots=True)
class TrainShape:
    """The tables of a tensor train: shapes [m_k, r_(k-1) n_k r_k], and the n_k."""

    tables: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]


def tensor_trains(programs: ProgramSet, trains: Mapping[str, TrainShape]) -> ProgramSet:
    """Embeddings read from tables of a train. Raises UsageError for a name or shape that is not the model's,
    UnsupportedError where another op reads the embedding (a tied head)."""
    weights = dict(programs.weights)
    for name, shape in trains.items():
        if name not in weights or weights[name].kind != "embedding":
            raise UsageError(f"{name!r} is stored as a tensor train and is no embedding of the model", param=name)
        check_train(name, weights[name].shape, shape)
        check_untied(programs, name)
        spec = weights.pop(name)
        for at, table in enumerate(shape.tables):
            weights[core_name(name, at)] = WeightSpec(core_name(name, at), table, spec.kind)
    known = known_weights(programs) | weights
    made = {name: _Trains(program, known, trains).run() for name, program in programs.programs.items()}
    return replace(programs, programs=made, weights=weights)


def check_train(name: str, shape: Sequence[int], train: TrainShape) -> None:
    """Raises UsageError unless the train makes a table of that shape."""
    train_ranks(train.tables, train.widths, shape[0])
    if math.prod(train.widths) != shape[1]:
        raise UsageError(f"the train of {name} is {list(train.widths)} wide, the model's rows {shape[1]}", param=name)


def check_untied(programs: ProgramSet, name: str) -> None:
    """Raises UnsupportedError where more than embeddings read the weight: a train gives rows one by one, a head needs
    the product with all of them, which the cores make no cheaper and the engine does not have."""
    readers = {op.kind for program in programs.programs.values() for op in program.ops if name in op.weights}
    if readers - {"embed"}:
        raise UnsupportedError(
            f"{name} is the head as well (tied embeddings); a tensor train serves rows, not logits",
            remedy="Leave it whole, quantise it, or use low rank, which serves both", param=name,
        )  # fmt: skip


class _Trains(Rewriter):
    def __init__(self, program: Program, known: Mapping[str, WeightSpec], trains: Mapping[str, TrainShape]) -> None:
        super().__init__(program, known)
        self._trains = trains

    def rewrite(self, op: Op) -> None:
        if not any(name in self._trains for name in op.weights):
            return self.copy(op)
        (name,) = op.weights
        shape = self._trains[name]
        if op.attrs["offset"]:
            raise UnsupportedError(f"{name} is read at an offset; a tensor train has none", param=name)
        names = [core_name(name, at) for at in range(len(shape.tables))]
        widths = ",".join(map(str, shape.widths))
        attrs = {key: op.attrs[key] for key in ("axis", "source", "scale")}
        return self.bind(op.outputs, self._builder.op("embed_train", weights=names, widths=widths, **attrs))


def tucker_stacks(programs: ProgramSet, stacks: Mapping[str, tuple[int, int]]) -> ProgramSet:
    """Experts' matrices as cores between two matrices that they share: y = left (core_e (right x)).

    Args:
        stacks: `layers.0.moe.experts.gate` -> (a, b): cores are [a, b].

    Raises UsageError for a stack that the model does not have, UnsupportedError for experts with biases.
    """
    weights: dict[str, WeightSpec] = {}
    found: set[str] = set()
    for name, spec in programs.weights.items():
        stack = stack_of(name)
        if stack not in stacks:
            weights[name] = spec
            continue
        (a, b), (left, right) = stacks[stack], outer_names(stack)
        if stack not in found:
            weights[right] = WeightSpec(right, (b, spec.shape[1]), "linear")
            weights[left] = WeightSpec(left, (spec.shape[0], a), "linear")
        found.add(stack)
        weights[name] = WeightSpec(name, (a, b), "linear")
    if set(stacks) - found:
        missing = sorted(set(stacks) - found)[0]
        raise UsageError(f"the model has no stack of experts {missing!r}", param=missing)
    known = known_weights(programs) | weights
    made = {name: _Tucker(program, known, stacks).run() for name, program in programs.programs.items()}
    return replace(programs, programs=made, weights=weights)


class _Tucker(Rewriter):
    def __init__(
        self, program: Program, known: Mapping[str, WeightSpec], stacks: Mapping[str, tuple[int, int]]
    ) -> None:
        super().__init__(program, known)
        self._stacks = stacks

    def rewrite(self, op: Op) -> None:
        """Matrices of the op one after the other; those that are whole keep the op's input."""
        if not any(stack_of(name) in self._stacks for name in op.weights):
            return self.copy(op)
        if op.kind != "expert_linears":
            raise UnsupportedError(f"weights of op {op.kind} (layer {op.layer}) are cores of a stack")
        half, experts = len(op.weights) // 2, int(op.attrs["experts"])
        x, routing = self.inputs(op)
        for i in range(half // experts):
            part = slice(i * experts, (i + 1) * experts)
            names, biases = op.weights[:half][part], op.weights[half:][part]
            self.bind((op.outputs[i],), (self._one(op, x, routing, names, biases),))
        return None

    def _one(self, op: Op, x: Value, routing: Value, names: tuple[str, ...], biases: tuple[str, ...]) -> Value:
        stack = stack_of(names[0])
        if stack in self._stacks and any(biases):
            raise UnsupportedError(f"experts of {stack} have biases, which cores do not", param=stack)
        if stack not in self._stacks:
            (y,) = self.emit(replace(op, inputs=(x, routing), weights=(*names, *biases)))
            return y
        left, right = outer_names(stack)
        inner = self._builder.one("linears", x, weights=[right, ""])
        (y,) = self.emit(replace(op, inputs=(inner, routing), weights=(*names, *biases)))
        return self._builder.one("linears", y, weights=[left, ""])
