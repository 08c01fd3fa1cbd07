"""Packed weight layouts: the only Python that knows bit positions.

A matrix [out, in] is kept in tiles of 16 output rows, so that one layout serves every instruction set. Formats are
rows of one table, `FORMATS`; the native library has the same table (native/src/formats.h).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix in packed form. `data` is uint8, one-dimensional, 64-byte aligned, possibly a file mapping."""

    format: str  # a key of FORMATS
    shape: tuple[int, int]  # [out, in]
    data: npt.NDArray[np.uint8]
