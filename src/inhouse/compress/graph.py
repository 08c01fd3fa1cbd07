"""What a Program's graph says to those who scale, rotate or share out: who reads a norm, who feeds whom, what is fused.

Derived from ops and values alone, never from names of a family. Knows no tensors.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from inhouse.runtime.program import Op, Program

MATRIX_OPS = ("linears", "expert_linears", "head_linears")


@dataclass(frozen=True, slots=True)
class NormFold:
    """A norm whose output only linears read: its gain (and bias) may be divided and their columns multiplied.

    norm: the op. gain, bias: its weights ("" where absent). consumers: matrices [out, width], each read once.
    """

    norm: Op
    gain: str
    bias: str
    consumers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LinearFold:
    """A linear that feeds another through something linear in it: rows of `producer` may be divided, columns of
    `consumer` multiplied. kind: `up_down` (through a gated product) or `v_o` (through attention, whose query head h
    reads value head h // (heads / kv_heads)). bias: of the producer, "" where absent."""

    kind: str
    producer: str
    bias: str
    consumer: str
    heads: int = 0
    kv_heads: int = 0
    v_dim: int = 0


def matrices_of(op: Op) -> tuple[str, ...]:
    """Names of an op's matrices, biases left out; () for other ops."""
    if op.kind not in MATRIX_OPS:
        return ()
    return tuple(op.weights) if op.kind == "head_linears" else tuple(op.weights[: len(op.weights) // 2])


def bias_of(op: Op, matrix: str) -> str:
    """The bias beside a matrix of `linears`, "" where there is none."""
    names = matrices_of(op)
    return op.weights[len(names) + names.index(matrix)] if op.kind == "linears" else ""


def uses(program: Program) -> Counter[str]:
    """How many ops use each weight (a tied embedding: two)."""
    return Counter(name for op in program.ops for name in op.weights if name)


def readers(program: Program) -> dict[int, list[Op]]:
    """Value id -> the ops that read it, in order."""
    found: dict[int, list[Op]] = {}
    for op in program.ops:
        for value in op.inputs:
            found.setdefault(value.id, []).append(op)
    return found


def fusion_groups(program: Program, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Matrices that must be stored alike, because runtimes run them as one: those of one op ({q, k, v}, {gate, up},
    the experts of a layer), and a tied embedding with itself. Each of `names` is in exactly one group."""
    wanted, seen, groups = set(names), set[str](), []
    for op in program.ops:
        group = tuple(dict.fromkeys(n for n in matrices_of(op) if n in wanted and n not in seen))
        if group:
            groups.append(group)
            seen |= set(group)
    alone = [(name,) for name in names if name not in seen]
    return alone + groups


def norm_folds(program: Program) -> list[NormFold]:
    """Every norm over the whole width that only linears read, all of whose matrices are used there alone."""
    reading, used = readers(program), uses(program)
    outputs = {value.id for value in program.outputs.values()}
    found = []
    for op in program.ops:
        if op.kind not in ("rms_norm", "layer_norm") or int(op.attrs.get("heads", 1)) != 1:
            continue
        users = reading.get(op.outputs[0].id, [])
        names = tuple(name for user in users for name in matrices_of(user) if user.kind == "linears")
        plain = bool(users) and all(user.kind == "linears" for user in users) and op.outputs[0].id not in outputs
        if plain and used[op.weights[0]] == 1 and all(used[name] == 1 for name in names):
            found.append(NormFold(op, op.weights[0], op.weights[1] if len(op.weights) > 1 else "", names))
    return found


def linear_folds(program: Program) -> list[LinearFold]:
    """v -> o and up -> down, where nothing else reads what is between them and each matrix is used once."""
    reading, used = readers(program), uses(program)
    maker = {value.id: (op, i) for op in program.ops for i, value in enumerate(op.outputs)}
    found = []
    for op in program.ops:
        if op.kind not in ("glu", "attention") or (op.kind == "attention" and not _plain_attention(op)):
            continue
        source = op.inputs[1 if op.kind == "glu" else 2]
        made = maker.get(source.id)
        after = reading.get(op.outputs[0].id, [])
        if made is None or made[0].kind != "linears" or len(reading[source.id]) != 1 or len(after) != 1:
            continue
        consumers = matrices_of(after[0]) if after[0].kind == "linears" else ()
        producer = matrices_of(made[0])[made[1]]
        if len(consumers) != 1 or used[producer] != 1 or used[consumers[0]] != 1:
            continue
        bias = bias_of(made[0], producer)
        if op.kind == "attention":
            heads, kv, dim = (int(op.attrs[key]) for key in ("heads", "kv_heads", "v_dim"))
            found.append(LinearFold("v_o", producer, bias, consumers[0], heads, kv, dim))
        elif not op.attrs["limit"] and not op.attrs["offset"]:
            found.append(LinearFold("up_down", producer, bias, consumers[0]))
    return found


def _plain_attention(op: Op) -> bool:
    """Attention whose output is linear in V, head by head, and whose V is a value of its own."""
    return not op.attrs.get("cross") and not op.attrs.get("v_from_k") and len(op.inputs) == 3
