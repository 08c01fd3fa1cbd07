"""What a step is: a fixed set of flat arrays, and the proof that they are well formed.

The table in `Step` states each array's dtype, length and meaning; it is the only place that does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UsageError
from inhouse.runtime.program import ProgramSet, StateKind

BLOCK_SIZE = 16  # positions in a block; divides the 256 positions of an attention partition

I32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Step:
    """One step over N sequences with T tokens in all, S of whose rows are sampled. Owned by the caller; an executor
    reads it during `run` and keeps nothing of it.

    Rows of one sequence are contiguous and in ascending position; sequences stand in the order of `lengths`.
    Position p of sequence n lives in block `tables[group][n, p // BLOCK_SIZE]`, slot `p % BLOCK_SIZE`.
    """

    tokens: I32  # [T] token ids
    positions: I32  # [T] absolute position of each token
    sequences: I32  # [T] row of `tables` and `lengths` each token belongs to, ascending
    lengths: I32  # [N] positions stored once this step is done (last position + 1)
    tables: Mapping[str, I32]  # state group -> [N, M] block ids; -1 where none is lent
    sampled: I32  # [S] rows whose logits are wanted; may be empty
    adapters: I32  # [N] LoRA slot of each sequence; 0: none
    encoder_tokens: I32 = field(default_factory=lambda: np.zeros(0, np.int32))  # [E]
    encoder_sequences: I32 = field(default_factory=lambda: np.zeros(0, np.int32))  # [E]


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


def check_step(programs: ProgramSet, step: Step, blocks: Mapping[str, int]) -> None:
    """Proves a step well formed before any kernel sees it; raises UsageError naming the array and the value.

    An executor indexes memory by these arrays, so nothing unchecked may pass: this is what keeps a faulty
    scheduler from becoming memory corruption. `blocks` is what was allocated in each state group.
    """
    for name in ("tokens", "positions", "sequences", "lengths", "sampled", "adapters"):
        _array(name, getattr(step, name))
    rows, count = step.tokens.size, step.lengths.size
    _need(step.positions.size == rows and step.sequences.size == rows, "tokens, positions, sequences differ in length")
    _need(step.adapters.size == count, "adapters must have one entry a sequence")
    _within("tokens", step.tokens, 0, programs.vocab_size)
    _within("positions", step.positions, 0, programs.context_length)
    _within("sequences", step.sequences, 0, max(count, 1))
    _within("sampled", step.sampled, 0, max(rows, 1))
    if rows:
        same = step.sequences[1:] == step.sequences[:-1]
        _need(bool(np.all(step.sequences[1:] >= step.sequences[:-1])), "sequences must ascend")
        _need(
            bool(np.all(step.positions[1:][same] == step.positions[:-1][same] + 1)),
            "positions of one sequence must ascend by one",
        )
        _need(bool(np.all(step.positions < step.lengths[step.sequences])), "a position lies beyond its length")
    for group in programs.groups:
        if group.kind in (StateKind.PAGED, StateKind.WINDOW):
            _check_table(group.name, group.window, step, blocks.get(group.name, 0))


def _check_table(name: str, window: int, step: Step, blocks: int) -> None:
    """Every block that the step writes or reads must be lent: from the window's start to the last position."""
    table = step.tables.get(name)
    if table is None:
        raise UsageError(f"ill-formed step: no block table for state group {name}")
    _array(f"tables[{name}]", table, 2)
    _within(f"tables[{name}]", table, -1, max(blocks, 1))
    _need(table.shape[0] == step.lengths.size, f"tables[{name}] must have one row a sequence")
    if not step.tokens.size:
        return
    first = np.full(step.lengths.size, np.iinfo(np.int32).max, np.int32)
    np.minimum.at(first, step.sequences, step.positions)
    used = first != np.iinfo(np.int32).max
    start = np.maximum(first - window + 1, 0) if window else np.zeros_like(first)
    last = (step.lengths + BLOCK_SIZE - 1) // BLOCK_SIZE  # one past the last block
    _need(bool(np.all(last[used] <= table.shape[1])), f"tables[{name}] is too short for the lengths")
    column = np.arange(table.shape[1], dtype=np.int32)[None, :]
    needed = (column >= start[:, None] // BLOCK_SIZE) & (column < last[:, None]) & used[:, None]
    _need(bool(np.all(table[needed] >= 0)), f"tables[{name}] lacks a block that the step needs")
