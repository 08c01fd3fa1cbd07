"""The door to the runtimes: what every executor promises. Knows neither engine nor model files."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnsupportedError
from inhouse.runtime.adapters import Adapter
from inhouse.runtime.packed import Packed
from inhouse.runtime.program import ProgramSet
from inhouse.runtime.step import I32, Step

F32 = npt.NDArray[np.float32]
Weight = Packed | F32  # matrices and embeddings are packed, vectors are plain float32
# Name -> bytes an element. int8: codes with one float scale for each token and kv head, K and V apart, as quantize_rows
# (runtime/ops.py) makes them of that head's elements when they are written.
KV_DTYPES: Mapping[str, int] = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}


class Executor(Protocol):
    """Runs the Programs of one model. One thread at a time may call `run`; each call is one step.

    Promises: `run` writes only the blocks that the step's own positions name, and reads only what the tables name;
    the outputs it returns stay valid until the next `run`; a step that fails raises ExecutorError and leaves
    other sequences' blocks as they were.
    """

    @property
    def name(self) -> str:
        """`native` or `torch`, with the device or ISA level: `native/avx512`, `torch/cpu`, `torch/cuda:0`."""

    @property
    def programs(self) -> ProgramSet: ...

    @property
    def kv_dtype(self) -> str: ...

    def allocate(self, blocks: Mapping[str, int]) -> None:
        """Makes room for that many blocks in each state group (block ids 0..n-1), dropping what was stored.
        Raises CapacityError when memory does not suffice."""

    def reserve(self, rows: int, sampled: int, sequences: int) -> None:
        """Makes room, beside the state, for steps of at most `rows` tokens, `sampled` rows of logits and `sequences`
        sequences, so that no such step allocates; a larger one still runs. Raises CapacityError when memory does not
        suffice."""

    def set_adapter(self, slot: int, adapter: Adapter | None) -> None:
        """Puts a LoRA adapter into slot 1, 2, ... in place of what was there; None empties the slot. Between steps
        only. Raises UsageError for matrices that do not fit, UnsupportedError for a weight that adapters cannot
        change (see `runtime.adapters`)."""

    def run(self, program: str, step: Step) -> Mapping[str, F32]:
        """Runs a Program over the step: role -> array (`logits` [S, vocab], `hidden` [T, width], `pooled` [N, width]).
        Raises ExecutorError, and UsageError for a step that breaks the table above."""

    def copy_blocks(self, group: str, source: I32, target: I32) -> None:
        """Copies block source[i] onto target[i], for all layers (fork of a sequence group)."""

    def read_blocks(self, group: str, blocks: I32) -> npt.NDArray[np.uint8]:
        """The bytes of those blocks, uint8 [len(blocks), block bytes] (save; the layout is the executor's own)."""

    def write_blocks(self, group: str, blocks: I32, data: npt.NDArray[np.uint8]) -> None:
        """Puts back what `read_blocks` gave (restore)."""

    def close(self) -> None:
        """Frees memory; the executor may not be used afterwards."""


def require(programs: ProgramSet, program: str) -> None:
    """Raises UnsupportedError if the model has no Program of that name."""
    if program not in programs.programs:
        raise UnsupportedError(f"this model has no program {program!r}; it has {', '.join(programs.programs)}")
