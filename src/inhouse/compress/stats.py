"""Statistics of the inputs of a linear, added up chunk by chunk. Pure: knows no models and no files."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from inhouse.core.errors import UsageError

WIDE_GRAM = 2048  # inputs up to which the Gram matrix is added up in float64


@dataclass(frozen=True, slots=True)
class LinearStats:
    """What calibration saw in front of a linear of `in` inputs; means are over the rows counted.

    count: rows. mean_square, mean_abs, max_abs: float32 [in]. gram: float32 or float64 [in, in], the mean of x x^T
    (its diagonal is mean_square), or None where no method asked for it. An expert without tokens has count 0 and zeros.
    """

    count: int
    mean_square: Tensor
    mean_abs: Tensor
    max_abs: Tensor
    gram: Tensor | None = None

    @property
    def dead(self) -> Tensor:
        """int64: inputs that were 0 in every row."""
        return torch.nonzero(self.max_abs == 0).flatten()

    def columns(self, index: Tensor) -> "LinearStats":
        """Of some of the inputs (int64 [n]), in that order."""
        gram = None if self.gram is None else self.gram[index][:, index]
        return LinearStats(self.count, self.mean_square[index], self.mean_abs[index], self.max_abs[index], gram)


class Accumulator:
    """Adds rows up in float64 (the Gram matrix of a wide input in float32), always in the order they come."""

    def __init__(self, width: int, gram: bool) -> None:
        self.count = 0
        self._squares = torch.zeros(width, dtype=torch.float64)
        self._sums = torch.zeros(width, dtype=torch.float64)
        self._max = torch.zeros(width)
        kind = torch.float64 if width <= WIDE_GRAM else torch.float32
        self._gram = torch.zeros((width, width), dtype=kind) if gram else None

    def add(self, rows: Tensor) -> None:
        """rows: float32 [n, in]. Raises UsageError where a value is not finite."""
        if not len(rows):
            return
        rows = rows.float()
        magnitudes = rows.abs()
        most = magnitudes.amax(0)
        if not bool(torch.isfinite(most).all()):
            raise UsageError(
                "an input of a linear is not finite", remedy="The model overflows on this calibration text"
            )
        self.count += len(rows)
        self._max = torch.maximum(self._max, most)
        self._sums += magnitudes.sum(0, dtype=torch.float64)
        self._squares += rows.square().sum(0, dtype=torch.float64)
        if self._gram is not None:
            if self._gram.dtype is torch.float32:
                self._gram.addmm_(rows.T, rows)
            else:
                self._gram += rows.T @ rows

    def finish(self) -> LinearStats:
        """The statistics; the accumulator is used up."""
        n = max(self.count, 1)
        gram = None if self._gram is None else self._gram.div_(n)
        return LinearStats(self.count, (self._squares / n).float(), (self._sums / n).float(), self._max, gram)


def collect(rows: Iterable[Tensor], width: int, gram: bool = True) -> LinearStats:
    """Statistics of chunks of rows [n, width] at once."""
    accumulator = Accumulator(width, gram)
    for chunk in rows:
        accumulator.add(chunk)
    return accumulator.finish()
