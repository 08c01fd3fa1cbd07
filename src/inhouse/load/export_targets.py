"""The tensors of a file to be written, put together from canonical weights: derivation run backwards.

A target tensor holds one canonical weight, or several (fused q, k, v), with its rows in the target's order. Knows how
weights are read and laid side by side; not what a format looks like.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnsupportedError
from inhouse.core.tensors import TensorSource
from inhouse.load.packing import Part, make_weight
from inhouse.model.families.family import Derive
from inhouse.runtime.encode import joined
from inhouse.runtime.packed import FORMATS, Packed, is_float
from inhouse.runtime.packed_blocks import code_rows
from inhouse.runtime.packed_pack import CodeRows, narrow_bf16
from inhouse.runtime.packed_stored import AS_PACKED
from inhouse.store.stored_source import StoredSource

F32 = npt.NDArray[np.float32]
LOW_RANK = "low_rank"  # format of a Part that is a product of factors and has no matrix of its own


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor to be written. `shape` is as the file has it; `rows` x `width` as a linear [out, in] has it."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[Part, Derive], ...]
    transpose: bool

    @property
    def kind(self) -> str:
        """`vector`, `embedding`, `linear`, ... of what it holds."""
        return str(self.pieces[0][0].spec.kind)

    @property
    def canonical(self) -> str:
        return self.pieces[0][0].spec.name

    @property
    def matrix(self) -> tuple[int, int]:
        """[out, in]; several matrices one below the other where the file has more axes."""
        shape = (int(np.prod(self.shape[:-1])), self.shape[-1])
        return shape[::-1] if self.transpose else shape

    @property
    def formats(self) -> set[str]:
        """Packed formats of the weights in it; of sparse and vector-coded ones the plain form."""
        return {FORMATS[name].base or name if name in FORMATS else name for name in (p.format for p, _ in self.pieces)}

    @property
    def dtype(self) -> str:
        """File type of the weights in it, where they agree, else F32."""
        found = {part.info.dtype for part, _ in self.pieces}
        return found.pop() if len(found) == 1 else "F32"


class Weights:
    """The canonical weights of a checkpoint as floats or codes, one tensor at a time.

    Args:
        columns: canonical name -> order of input columns of matrices that keep another than the model's (act-order).
        folded: canonical name -> what is multiplied out into its matrix: a side branch, factors, cores.
    """

    def __init__(
        self,
        source: TensorSource,
        columns: Mapping[str, npt.NDArray[np.int64]],
        folded: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._source, self._columns, self._folded = source, columns, folded

    def floats(self, target: Target) -> F32:
        """The target's values, f32 in its own shape."""
        whole = np.empty(self._matrix_shape(target), np.float32)
        for part, derive in target.pieces:
            values = self._values(part)
            index = _rows_of(derive)
            whole[... if index is None else index] = values.reshape(-1, *whole.shape[1:])
        return np.ascontiguousarray(whole.T if target.transpose else whole).reshape(target.shape)

    def _values(self, part: Part) -> F32:
        name = part.spec.name
        if isinstance(self._source, StoredSource) and (name in self._folded or name in self._columns):
            return self._source.form(name).value()
        weight = make_weight(part, self._source)
        values = weight.dequantize() if isinstance(weight, Packed) else weight
        order = self._columns.get(name)
        if order is None:
            return values
        plain = np.empty_like(values)
        plain[:, order] = values
        return plain

    def changed(self, target: Target) -> str:
        """Which stage of a target no form of a single matrix can express, and what became of it; "" if none."""
        folded = sorted({self._folded[part.spec.name] for part, _ in target.pieces if part.spec.name in self._folded})
        reasons = [f"{' and '.join(folded)} was multiplied out into the values"] if folded else []
        if any(part.spec.name in self._columns for part, _ in target.pieces):
            reasons.append("columns in act-order were put back in order")
        own = sorted(target.formats & AS_PACKED)
        if own:
            reasons.append(f"{'/'.join(own)} was unpacked to values")
        return "; ".join(reasons)

    def matrix(self, target: Target) -> F32:
        """The values as [out, in]."""
        values = self.floats(target)
        return np.ascontiguousarray(values.T) if target.transpose else values.reshape(target.matrix)

    def codes(self, target: Target) -> CodeRows:
        """The codes of a target whose `shared_codes` is a format, rows in the target's order."""
        runs: list[CodeRows] = []
        places: list[npt.NDArray[np.int64]] = []
        row = 0
        for part, derive in target.pieces:
            weight = make_weight(part, self._source)
            assert isinstance(weight, Packed)
            runs += code_rows(weight)
            index = _rows_of(derive)
            places.append(np.arange(row, row + len_of(weight)) if index is None else index)
            row += len_of(weight)
        whole = joined(runs)
        back = np.argsort(np.concatenate(places))
        return CodeRows(*(None if field is None else np.ascontiguousarray(field[back]) for field in whole))  # type: ignore[arg-type]

    def is_coded(self, target: Target) -> bool:
        """Whether any of a target is kept in codes."""
        return any(name == LOW_RANK or not is_float(name) for name in target.formats if name != "vector")

    def shared_codes(self, target: Target) -> str:
        """The code format that all of a target is kept in; "" where it is not codes of one kind."""
        formats = target.formats
        if len(formats) != 1 or target.kind == "vector" or target.transpose:
            return ""
        name = next(iter(formats))
        changed = bool(self.changed(target))
        return "" if name not in FORMATS or is_float(name) or changed else name

    def _matrix_shape(self, target: Target) -> tuple[int, ...]:
        return target.matrix if len(target.shape) > 1 else target.shape


def len_of(packed: Packed) -> int:
    return packed.shape[0]


def _rows_of(derive: Derive) -> npt.NDArray[np.int64] | None:
    """Rows of the target, as [out, in], that a canonical weight's rows are."""
    if not derive.transpose:
        return derive.index()
    steps = [step.index() for step in (derive.rows, derive.order) if step is not None]
    if not steps:
        return None
    index = steps[0]
    for step in steps[1:]:
        index = index[step]
    return index


def make_targets(parts: Sequence[Part], derived: Mapping[str, Derive]) -> list[Target]:
    """The tensors to write, in the order of the forward pass; raises UnsupportedError for a stack of transposed
    experts, which no export writes."""
    grouped: dict[str, list[tuple[Part, Derive]]] = {}
    for part in parts:
        derive = derived[part.spec.name]
        if derive.transpose and derive.part is not None:
            raise UnsupportedError(f"{derive.source!r} is a stack of transposed experts, which is not exported")
        grouped.setdefault(derive.source, []).append((part, derive))
    return [
        Target(name, pieces[0][1].source_shape, tuple(pieces), pieces[0][1].transpose)
        for name, pieces in grouped.items()
    ]


def row_runs(count: int, workers: int, unit: int = 16) -> Iterator[slice]:
    """Cuts `count` rows into at most `workers` runs of whole units."""
    step = max(unit, -(-count // max(1, workers) // unit) * unit)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def as_bytes(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def narrowed(values: F32, kind: str, name: str) -> npt.NDArray[Any]:
    """f32 as F32, F16 or BF16 (as bit patterns). Raises UnsupportedError for what F16 cannot hold."""
    if kind == "F32":
        return values
    if kind == "BF16":
        return narrow_bf16(values)
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if np.any(np.isinf(halves) & np.isfinite(values)):
        most = float(np.abs(values).max())
        raise UnsupportedError(f"{name}: a weight of {most:g} is beyond F16", remedy="Ask for --type bf16", param=name)
    return halves
