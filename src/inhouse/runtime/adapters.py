"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): what one is to an executor. Knows Programs and arrays;
knows no files and no names but canonical ones.

A linear y = x W^T of a row whose sequence has an adapter becomes y + (x A^T) B^T, in float, rank by rank and input by
input in one order; x is what the linear itself reads, rounded activations included. A row without an adapter (slot 0)
does no work and keeps its bits.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.program import ProgramSet

MAX_SLOTS = 4096
MAX_RANK = 4096

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to one linear: a float32 [rank, in], b float32 [out, rank] with the adapter's scale in it."""

    a: F32
    b: F32

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


def check_slots(slots: npt.NDArray[np.int32], held: Collection[int]) -> None:
    """Raises UnsupportedError if a step names a slot that holds no adapter; slot 0 is none."""
    for slot in set(slots.tolist()) - {0}:
        if slot not in held:
            raise UnsupportedError(f"the executor holds no adapter in slot {slot}", param="adapters")


Adapter = Mapping[str, LowRank]  # canonical name of a linear's weight -> what is added


def adaptable(programs: ProgramSet) -> dict[str, str]:
    """Weights that an adapter may change: those that op `linears` reads -> the constant with the order of its inputs
    ("": as they come). Experts, embeddings and heads' own matrices are read by other ops."""
    found: dict[str, str] = {}
    for program in programs.programs.values():
        made = {value.id: op for op in program.ops for value in op.outputs}
        for op in program.ops:
            if op.kind != "linears":
                continue
            source = made.get(op.inputs[0].id)
            if source is not None and source.kind == "quantize_rows":
                source = made.get(source.inputs[0].id)
            order = source.weights[0] if source is not None and source.kind == "select_columns" else ""
            found |= dict.fromkeys(op.weights[: len(op.weights) // 2], order)
    return found


def check_adapter(programs: ProgramSet, slot: int, adapter: Adapter) -> Adapter:
    """The adapter with the columns of each `a` in the order in which its linear reads its inputs.

    Raises UsageError (slot, shapes, values that are not finite), UnsupportedError (a weight that no `linears` reads).
    """
    if not 1 <= slot <= MAX_SLOTS:
        raise UsageError(f"adapter slot {slot}, allowed 1..{MAX_SLOTS}", param="slot")
    known, out = adaptable(programs), {}
    for name, low in adapter.items():
        if name not in known:
            raise UnsupportedError(
                f"an adapter cannot change {name}", remedy="Adapters change plain linear layers", param=name
            )
        rows, columns = programs.weights[name].shape
        rank = low.a.shape[0] if low.a.ndim == 2 else 0
        if low.a.shape != (rank, columns) or low.b.shape != (rows, rank) or not 1 <= rank <= MAX_RANK:
            raise UsageError(
                f"the adapter of {name} is {low.a.shape} and {low.b.shape}, its weight {(rows, columns)}",
                remedy="The adapter belongs to another model",
                param=name,
            )
        if not (np.isfinite(low.a).all() and np.isfinite(low.b).all()):
            raise UsageError(f"the adapter of {name} holds values that are not finite", param=name)
        a = low.a
        if known[name]:
            a = a[:, programs.constants[known[name]].astype(np.int64)]
        out[name] = LowRank(np.ascontiguousarray(a, np.float32), np.ascontiguousarray(low.b, np.float32))
    return out
