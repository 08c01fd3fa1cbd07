"""What a step is: a fixed set of flat arrays, and the proof that they are well formed.

The table in `Step` states each array's dtype, length and meaning; it is the only place that does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UsageError
from inhouse.runtime.program import ProgramSet, StateGroup, StateKind

BLOCK_SIZE = 16  # positions in a block; divides the 256 positions of an attention partition

I32 = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


def static_blocks(column: npt.NDArray[np.integer], sink: int, stride: int) -> Bools:
    """Which blocks, by their place in the sequence, a window group keeps for good."""
    kept: Bools = column < sink // BLOCK_SIZE
    return kept | (column % stride == 0) if stride else kept


def _zeros() -> I32:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Step:
    """One step over N sequences with T tokens in all, S of whose rows are sampled. Owned by the caller; an executor
    reads it during `run` and keeps nothing of it.

    Rows of one sequence are contiguous and in ascending position; sequences stand in the order of `lengths`.
    Position p of sequence n lives in block `tables[group][n, p // BLOCK_SIZE]`, slot `p % BLOCK_SIZE`. A cross group
    is addressed alike, by encoder position: `encode`, whose tokens are the encoder's, writes it; `step` reads the
    first `encoder_lengths[n]` positions. An array with a default that is left out becomes zeros of its length.
    """

    tokens: I32  # [T] token ids
    positions: I32  # [T] absolute position of each token
    sequences: I32  # [T] row of `tables` and `lengths` each token belongs to, ascending
    lengths: I32  # [N] positions stored once this step is done (last position + 1)
    tables: Mapping[str, I32]  # state group -> [N, M] block ids; -1 where none is lent
    sampled: I32  # [S] rows whose logits are wanted; may be empty
    adapters: I32  # [N] LoRA slot of each sequence; 0: none
    types: I32 = field(default_factory=_zeros)  # [T] token types (BERT's segments)
    prefixes: I32 = field(default_factory=_zeros)  # [N] positions below it see one another (mask `prefix`)
    encoder_lengths: I32 = field(default_factory=_zeros)  # [N] encoder positions stored in the cross groups

    def __post_init__(self) -> None:
        for name, count in (("types", self.tokens), ("prefixes", self.lengths), ("encoder_lengths", self.lengths)):
            if not getattr(self, name).size and count.size:
                object.__setattr__(self, name, np.zeros(count.size, np.int32))


@dataclass(frozen=True, slots=True)
class StepRules:
    """What one Program asks of its steps; made once by `step_rules`, used at every step."""

    vocab_size: int
    context_length: int
    types: int  # rows of the smallest table that token types index; 0: none does
    groups: tuple[StateGroup, ...]  # groups stored and read by the step's own positions
    cross: tuple[StateGroup, ...]  # groups read by encoder position


def step_rules(programs: ProgramSet, program: str) -> StepRules:
    """The rules of the Program called `program`. Only the state groups that its ops name are asked for."""
    own: dict[str, StateGroup] = {}
    cross: dict[str, StateGroup] = {}
    types: list[int] = []
    for op in programs.programs[program].ops:
        if "group" in op.attrs and isinstance(op.attrs["group"], str):
            (cross if op.attrs.get("cross") else own)[op.attrs["group"]] = programs.group(op.attrs["group"])
        if op.attrs.get("recent"):
            own[str(op.attrs["recent"])] = programs.group(str(op.attrs["recent"]))
        if op.kind == "embed" and op.attrs["source"] == "types":
            types.append(programs.weights[op.weights[0]].shape[0] - int(op.attrs["offset"]))
    kept = tuple(group for group in own.values() if group.kind is not StateKind.RECURRENT)
    return StepRules(programs.vocab_size, programs.context_length, min(types, default=0), kept, tuple(cross.values()))


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(f"ill-formed step: {message}", remedy="This is a fault of the scheduler; report it")


def _array(name: str, array: I32, ndim: int = 1) -> None:
    _need(array.dtype == np.int32 and array.ndim == ndim, f"{name} must be int32 with {ndim} axes")
    _need(bool(array.flags.c_contiguous), f"{name} must be contiguous")


def _within(name: str, array: I32, low: int, high: int) -> None:
    if array.size:
        lowest, highest = int(array.min()), int(array.max())
        _need(low <= lowest and highest < high, f"{name} holds {lowest}..{highest}, allowed {low}..{high - 1}")


def check_step(rules: StepRules, step: Step, blocks: Mapping[str, int]) -> None:
    """Proves a step well formed before any kernel sees it; raises UsageError naming the array and the value.

    An executor indexes memory by these arrays, so nothing unchecked may pass: this is what keeps a faulty
    scheduler from becoming memory corruption. `blocks` is what was allocated in each state group.
    """
    _check_arrays(rules, step)
    rows = step.tokens.size
    if rows:
        same = step.sequences[1:] == step.sequences[:-1]
        _need(bool(np.all(step.sequences[1:] >= step.sequences[:-1])), "sequences must ascend")
        _need(
            bool(np.all(step.positions[1:][same] == step.positions[:-1][same] + 1)),
            "positions of one sequence must ascend by one",
        )
        _need(bool(np.all(step.positions < step.lengths[step.sequences])), "a position lies beyond its length")
    _need(bool(np.all(step.prefixes <= step.lengths)), "a prefix ends beyond its length")
    first = np.full(step.lengths.size, np.iinfo(np.int32).max, np.int32)
    np.minimum.at(first, step.sequences, step.positions)
    used = first != np.iinfo(np.int32).max
    for group in rules.groups:
        start = np.maximum(first - group.window + 1, 0) if group.window else np.zeros_like(first)
        _check_table(group, step, blocks, used, start, step.lengths)
    for group in rules.cross:
        _need(bool(np.all(step.encoder_lengths[used] > 0)), "a sequence reads cross state and has encoder_lengths 0")
        _check_table(group, step, blocks, used, np.zeros_like(first), step.encoder_lengths)


def _check_arrays(rules: StepRules, step: Step) -> None:
    """Type, length and range of every array but the tables."""
    rows, count = step.tokens.size, step.lengths.size
    for name, length in (
        ("tokens", rows), ("positions", rows), ("sequences", rows), ("types", rows), ("lengths", count),
        ("adapters", count), ("prefixes", count), ("encoder_lengths", count), ("sampled", step.sampled.size),
    ):  # fmt: skip
        array: I32 = getattr(step, name)
        _array(name, array)
        _need(array.size == length, f"{name} has {array.size} entries, needs {length}")
    _within("tokens", step.tokens, 0, rules.vocab_size)
    _within("positions", step.positions, 0, rules.context_length)
    _within("sequences", step.sequences, 0, max(count, 1))
    _within("lengths", step.lengths, 0, rules.context_length + 1)
    _within("sampled", step.sampled, 0, max(rows, 1))
    _within("types", step.types, 0, rules.types or np.iinfo(np.int32).max)
    _within("prefixes", step.prefixes, 0, rules.context_length + 1)
    _within("encoder_lengths", step.encoder_lengths, 0, rules.context_length + 1)


def _check_table(group: StateGroup, step: Step, blocks: Mapping[str, int], used: Bools, start: I32, end: I32) -> None:
    """Every block that the step writes or reads must be lent: positions start[n] to end[n] of each sequence used, and
    the static blocks before them."""
    name = group.name
    table = step.tables.get(name)
    if table is None:
        raise UsageError(f"ill-formed step: no block table for state group {name}")
    _array(f"tables[{name}]", table, 2)
    _within(f"tables[{name}]", table, -1, max(blocks.get(name, 0), 1))
    _need(table.shape[0] == step.lengths.size, f"tables[{name}] must have one row a sequence")
    last = (end + BLOCK_SIZE - 1) // BLOCK_SIZE  # one past the last block
    _need(bool(np.all(last[used] <= table.shape[1])), f"tables[{name}] is too short for the lengths")
    column = np.arange(table.shape[1], dtype=np.int32)[None, :]
    needed = (column >= start[:, None] // BLOCK_SIZE) | static_blocks(column, group.sink, group.stride)
    needed &= (column < last[:, None]) & used[:, None]
    _need(bool(np.all(table[needed] >= 0)), f"tables[{name}] lacks a block that the step needs")
