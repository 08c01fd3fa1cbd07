"""A Program cut into pieces that run one after the other. Pure: knows ops and values, not tensors or weights."""

from collections.abc import Sequence
from dataclasses import dataclass

from inhouse.runtime.program import Op, Program

TAPPED = ("linears", "expert_linears", "head_linears")  # ops whose matrices are compressed


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of ops.

    given: ids of values made before it that it reads. kept: ids of its own values that later ops read. dead: ids that
    nothing reads any more once it has run. tap: the op that follows, if its matrices are compressed; its inputs are
    kept. layer: of its ops (of the tap, where it has none).
    """

    ops: tuple[Op, ...]
    given: tuple[int, ...]
    kept: tuple[int, ...]
    dead: tuple[int, ...]
    tap: Op | None
    layer: int


def segments(program: Program, finish: bool = False) -> list[Piece]:
    """Pieces that each end where the next op is one of TAPPED. The ops from the last of these on are left out, unless
    `finish`: nothing that is compressed comes after them."""
    taps = [i for i, op in enumerate(program.ops) if op.kind in TAPPED]
    bounds = [0, *taps, *([len(program.ops)] if finish else [])]
    return [_piece(program, first, stop) for first, stop in zip(bounds, bounds[1:], strict=False)]


def blocks(program: Program) -> list[Piece]:
    """Pieces of whole layers: what comes before the first, each layer, what comes after the last."""
    starts = [i for i, op in enumerate(program.ops) if i == 0 or op.layer != program.ops[i - 1].layer]
    bounds = [*starts, len(program.ops)]
    return [_piece(program, first, stop) for first, stop in zip(bounds, bounds[1:], strict=False)]


def _piece(program: Program, first: int, stop: int) -> Piece:
    ops = program.ops[first:stop]
    made = {value.id for op in ops for value in op.outputs}
    later = {value.id for op in program.ops[stop:] for value in op.inputs}
    outputs = {value.id for value in program.outputs.values()}
    before = {value.id for op in program.ops[:first] for value in op.outputs}
    read = dict.fromkeys(value.id for op in ops for value in op.inputs if value.id not in made)
    used = {value.id for op in program.ops[first:] for value in op.inputs}  # what had died earlier is dead already
    tap = program.ops[stop] if stop < len(program.ops) and program.ops[stop].kind in TAPPED else None
    return Piece(
        ops, tuple(read), tuple(i for i in sorted(made) if i in later | outputs),
        tuple(i for i in sorted(before & used) if i not in later | outputs), tap,
        ops[-1].layer if ops else tap.layer if tap is not None else -1,
    )  # fmt: skip


def widest(pieces: Sequence[Piece]) -> int:
    """Floats that one token takes at most while a piece runs, all its values counted (routed rows by their choices)."""
    return max((sum(_floats(op, piece.ops) for op in piece.ops) for piece in pieces), default=0)


def _floats(op: Op, ops: Sequence[Op]) -> int:
    width = sum(value.width for value in (*op.inputs, *op.outputs))
    routed = any(value.axis == "R" for value in (*op.inputs, *op.outputs))
    choices = [value.width // 2 for value in op.inputs if value.axis == "T"] if routed else []
    return width * max([*choices, 1]) if routed else width
