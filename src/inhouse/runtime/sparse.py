"""Sparse matrices as arrays: CSR, CSC, BSR (blocks), bitmask and 2:4, there and back exactly, and their products.

The exchange forms beside the packed ones that run (packed_sparse). Zero means equal to 0; -0.0 is stored nowhere and
comes back as 0. The field names are those of scipy.sparse. Knows no models.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, UsageError

Array = npt.NDArray[Any]
Index = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Csr:
    """Rows of (column, value): those of row r are entries indptr[r] .. indptr[r + 1], columns ascending."""

    shape: tuple[int, int]
    indptr: Index  # [rows + 1]
    indices: Index  # [entries]
    data: Array  # [entries]

    def __post_init__(self) -> None:
        _check_compressed(self.indptr, self.indices, len(self.data), self.shape[0], self.shape[1])

    @classmethod
    def of(cls, dense: Array) -> "Csr":
        """Of a matrix [rows, columns]."""
        rows, columns = np.nonzero(_matrix(dense))
        return cls(dense.shape, _starts(rows, dense.shape[0]), columns.astype(np.int64), dense[rows, columns])

    def dense(self) -> Array:
        """The matrix."""
        out = np.zeros(self.shape, self.data.dtype)
        out[np.repeat(np.arange(self.shape[0]), np.diff(self.indptr)), self.indices] = self.data
        return out

    def transposed(self) -> "Csc":
        """The transpose, as columns: the same arrays."""
        return Csc(self.shape[::-1], self.indptr, self.indices, self.data)

    def to_csc(self) -> "Csc":
        """The same matrix by columns."""
        rows = np.repeat(np.arange(self.shape[0], dtype=np.int64), np.diff(self.indptr))
        order = np.argsort(self.indices, kind="stable")
        return Csc(self.shape, _starts(self.indices[order], self.shape[1]), rows[order], self.data[order])

    def times(self, x: Array) -> Array:
        """The matrix times x [columns] or [columns, n], entries of a row in ascending order of columns."""
        products = self.data.reshape(-1, *(1,) * (x.ndim - 1)) * x[self.indices]
        out = np.zeros((self.shape[0], *x.shape[1:]), products.dtype)
        np.add.at(out, np.repeat(np.arange(self.shape[0]), np.diff(self.indptr)), products)
        return out


@dataclass(frozen=True, slots=True)
class Csc:
    """Columns of (row, value): those of column c are entries indptr[c] .. indptr[c + 1], rows ascending."""

    shape: tuple[int, int]
    indptr: Index  # [columns + 1]
    indices: Index
    data: Array

    def __post_init__(self) -> None:
        _check_compressed(self.indptr, self.indices, len(self.data), self.shape[1], self.shape[0])

    @classmethod
    def of(cls, dense: Array) -> "Csc":
        """Of a matrix [rows, columns]."""
        return Csr.of(_matrix(dense).T).transposed()

    def dense(self) -> Array:
        """The matrix."""
        return np.ascontiguousarray(self.transposed().dense().T)

    def transposed(self) -> Csr:
        """The transpose, as rows: the same arrays."""
        return Csr(self.shape[::-1], self.indptr, self.indices, self.data)

    def to_csr(self) -> Csr:
        """The same matrix by rows."""
        return self.transposed().to_csc().transposed()


@dataclass(frozen=True, slots=True)
class Bsr:
    """Blocks [height, width] of which one value at least is not zero, by rows of blocks."""

    shape: tuple[int, int]
    indptr: Index  # [rows / height + 1]
    indices: Index  # columns of blocks
    data: Array  # [blocks, height, width]

    def __post_init__(self) -> None:
        if self.data.ndim != 3 or any(n % b for n, b in zip(self.shape, self.data.shape[1:], strict=True)):
            raise FormatError(f"blocks {self.data.shape[1:]} do not fill a matrix {self.shape}")
        rows, columns = (n // b for n, b in zip(self.shape, self.data.shape[1:], strict=True))
        _check_compressed(self.indptr, self.indices, len(self.data), rows, columns)

    @classmethod
    def of(cls, dense: Array, block: tuple[int, int]) -> "Bsr":
        """Of a matrix whose axes are multiples of the block's; raises UsageError where they are not."""
        if min(block) < 1 or any(n % b for n, b in zip(_matrix(dense).shape, block, strict=True)):
            raise UsageError(f"a matrix {dense.shape} is not made of blocks {block}")
        blocks = dense.reshape(dense.shape[0] // block[0], block[0], -1, block[1]).transpose(0, 2, 1, 3)
        rows, columns = np.nonzero(blocks.any(axis=(2, 3)))
        return cls(dense.shape, _starts(rows, len(blocks)), columns.astype(np.int64), blocks[rows, columns])

    def dense(self) -> Array:
        """The matrix."""
        height, width = self.data.shape[1:]
        out = np.zeros((self.shape[0] // height, self.shape[1] // width, height, width), self.data.dtype)
        out[np.repeat(np.arange(len(out)), np.diff(self.indptr)), self.indices] = self.data
        return np.ascontiguousarray(out.transpose(0, 2, 1, 3)).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Bitmask:
    """One bit a weight, row by row, least significant first, and the values that are not zero, row by row."""

    shape: tuple[int, int]
    mask: U8  # [rows, ceil(columns / 8)]
    data: Array

    def __post_init__(self) -> None:
        if self.mask.shape != (self.shape[0], -(-self.shape[1] // 8)) or int(self._kept().sum()) != len(self.data):
            raise FormatError(f"a bitmask of {self.shape} does not fit its {len(self.data)} values")

    def _kept(self) -> npt.NDArray[np.bool_]:
        return np.unpackbits(self.mask, axis=1, count=self.shape[1], bitorder="little").astype(bool)

    @classmethod
    def of(cls, dense: Array) -> "Bitmask":
        """Of a matrix [rows, columns]."""
        kept = _matrix(dense) != 0
        return cls(dense.shape, np.packbits(kept, axis=1, bitorder="little"), dense[kept])

    def dense(self) -> Array:
        """The matrix."""
        out = np.zeros(self.shape, self.data.dtype)
        out[self._kept()] = self.data
        return out


@dataclass(frozen=True, slots=True)
class TwoOfFour:
    """Two values of every four columns: their places 0..3 in two bits each, four places a byte, and the values."""

    shape: tuple[int, int]
    places: U8  # [rows, columns / 8]: bits 0..1 the first place of the first four, 2..3 its second, 4..7 the next four
    data: Array  # [rows, columns / 2]

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if columns % 8 or self.places.shape != (rows, columns // 8) or self.data.shape != (rows, columns // 2):
            raise FormatError(f"places {self.places.shape} and values {self.data.shape} are not 2:4 of {self.shape}")
        two = self._places().reshape(-1, 2)
        if np.any(two[:, 0] >= two[:, 1]):
            raise FormatError("two places of four do not ascend")

    def _places(self) -> U8:
        return (self.places[..., None] >> np.arange(0, 8, 2, dtype=np.uint8)) & np.uint8(3)

    @classmethod
    def of(cls, dense: Array) -> "TwoOfFour":
        """Of a matrix with columns in multiples of 8; raises UsageError where more than two of four are not zero."""
        rows, columns = _matrix(dense).shape
        if columns % 8:
            raise UsageError(f"2:4 needs columns in multiples of 8, got {columns}")
        fours = dense.reshape(rows, -1, 4)
        kept = fours != 0
        if kept.size and int(kept.sum(axis=2).max()) > 2:
            raise UsageError("more than two of four values are not zero", remedy="Prune to 2:4 first")
        two = np.sort(np.argsort(~kept, axis=2, kind="stable")[..., :2], axis=2)
        bits = two.reshape(rows, -1, 4).astype(np.uint8) << np.arange(0, 8, 2, dtype=np.uint8)
        places = np.bitwise_or.reduce(bits, axis=2)
        return cls((rows, columns), places, np.take_along_axis(fours, two, axis=2).reshape(rows, -1))

    def dense(self) -> Array:
        """The matrix."""
        rows = self.shape[0]
        out = np.zeros((rows, self.shape[1] // 4, 4), self.data.dtype)
        two = self._places().reshape(rows, -1, 2).astype(np.int64)
        np.put_along_axis(out, two, self.data.reshape(rows, -1, 2), axis=2)
        return out.reshape(self.shape)


def _matrix(dense: Array) -> Array:
    if dense.ndim != 2:
        raise UsageError(f"a matrix has two axes, not {dense.ndim}")
    return dense


def _starts(rows: Array, count: int) -> Index:
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=count), out=starts[1:])
    return starts


def _check_compressed(indptr: Index, indices: Index, entries: int, major: int, minor: int) -> None:
    """Raises FormatError unless entries follow one another, in ascending order within a row and inside the matrix."""
    if indptr.shape != (major + 1,) or indices.shape != (entries,) or indptr[0] != 0 or indptr[-1] != entries:
        raise FormatError(f"{entries} entries do not fit the starts of {major} rows")
    if np.any(np.diff(indptr) < 0) or (entries and (indices.min() < 0 or indices.max() >= minor)):
        raise FormatError(f"an entry lies outside {major} x {minor}")
    rows = np.repeat(np.arange(major), np.diff(indptr))
    if np.any(np.diff(rows * minor + indices) <= 0):
        raise FormatError("entries of a row do not ascend")
