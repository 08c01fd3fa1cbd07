"""What a compressed matrix is: as it is stored and run. Knows packed formats; not files, methods nor Programs.

y = main(x[columns]) + b(a(x)); or y = left(main(right(x))), a matrix of a Tucker stack; or a table as a tensor train.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UsageError
from inhouse.runtime.cores import train_ranks, train_rows
from inhouse.runtime.packed_layout import F32, Packed
from inhouse.runtime.packed_stored import stored_nbytes_of


@dataclass(frozen=True, slots=True)
class Form:
    """A linear or embedding [out, in].

    Args:
        main: the matrix in any format of FORMATS; None: the low-rank part alone.
        low_rank: a [k, in] and b [out, k], run as two linears beside main.
        columns: int64 [in], a permutation: main's packed column j is input columns[j] (act-order). The side branch
            keeps the order of the inputs.
        outer: left [out, a] and right [b, in] around main [a, b]: one matrix of a stack whose matrices share both.
        train: a table [rows, width] as a tensor train, nothing beside it: row i of table k holds the slice
            [r_(k-1), widths[k], r_k] of index i; the first index is the slowest.
        widths, rows: of a train.

    Raises UsageError where the parts do not fit one another.
    """

    main: Packed | None
    low_rank: tuple[Packed, Packed] | None = None
    columns: npt.NDArray[np.int64] | None = None
    outer: tuple[Packed, Packed] | None = None
    train: tuple[Packed, ...] = ()
    widths: tuple[int, ...] = ()
    rows: int = 0

    def __post_init__(self) -> None:
        if self.train or self.outer is not None:
            self._check_cores()
            return
        if self.low_rank is not None:
            a, b = self.low_rank
            outer = (b.shape[0], a.shape[1])
            if a.shape[0] != b.shape[1] or (self.main is not None and self.main.shape != outer):
                main = None if self.main is None else self.main.shape
                raise UsageError(f"factors {b.shape} and {a.shape} do not fit each other and a matrix {main}")
        elif self.main is None:
            raise UsageError("a form needs a matrix or a low-rank part")
        if self.columns is not None:
            if self.main is None:
                raise UsageError("a form without a matrix has no order of columns")
            order = self.columns
            if order.dtype != np.int64 or not np.array_equal(np.sort(order), np.arange(self.main.shape[1])):
                raise UsageError(f"columns must be int64, each of 0..{self.main.shape[1] - 1} once")

    def _check_cores(self) -> None:
        if self.low_rank is not None or self.columns is not None or bool(self.train) == (self.main is not None):
            raise UsageError("a form of cores has no side branch and no order of columns")
        if self.train:
            if self.outer is not None or self.rows < 1:
                raise UsageError("a tensor train stands alone, and has rows")
            train_ranks([packed.shape for packed in self.train], self.widths, self.rows)
        elif self.outer is not None and self.main is not None:
            left, right = self.outer
            if (left.shape[1], right.shape[0]) != self.main.shape:
                raise UsageError(f"a core {self.main.shape} does not fit between {left.shape} and {right.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        if self.train:
            return self.rows, math.prod(self.widths)
        if self.outer is not None:
            return self.outer[0].shape[0], self.outer[1].shape[1]
        if self.main is not None:
            return self.main.shape
        assert self.low_rank is not None
        return self.low_rank[1].shape[0], self.low_rank[0].shape[1]

    def value(self) -> F32:
        """The matrix that it stands for, f32 [out, in]: main exactly; the product of factors in f64, rounded once."""
        if self.train:
            return train_rows([packed.dequantize() for packed in self.train], self.widths, np.arange(self.rows))
        if self.outer is not None and self.main is not None:
            left, core, right = (p.dequantize().astype(np.float64) for p in (self.outer[0], self.main, self.outer[1]))
            return (left @ core @ right).astype(np.float32)
        whole = np.zeros(self.shape, np.float32)
        if self.main is not None:
            whole = self.main.dequantize()
            if self.columns is not None:
                ordered = np.empty_like(whole)
                ordered[:, self.columns] = whole
                whole = ordered
        if self.low_rank is not None:
            a, b = (part.dequantize().astype(np.float64) for part in self.low_rank)
            whole = (whole + b @ a).astype(np.float32)
        return whole

    @property
    def nbytes(self) -> int:
        """Bytes as stored: parts of all matrices and the order of columns; the file's own header is not counted."""
        order = 0 if self.columns is None else self.columns.size * columns_dtype(self.columns.size).itemsize
        return order + sum(stored_nbytes_of(packed) for _, packed in self.matrices())

    def matrices(self) -> Iterator[tuple[str, Packed]]:
        """("", main), ("a", a), ("b", b), ("left", left), ("right", right), ("core0", ..): those that there are."""
        if self.main is not None:
            yield "", self.main
        if self.low_rank is not None:
            yield "a", self.low_rank[0]
            yield "b", self.low_rank[1]
        if self.outer is not None:
            yield "left", self.outer[0]
            yield "right", self.outer[1]
        for at, packed in enumerate(self.train):
            yield f"core{at}", packed


def columns_dtype(inputs: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """The type in which an order of that many columns is stored."""
    return np.dtype("<u2") if inputs <= 1 << 16 else np.dtype("<u4")
