"""The stored form of a pruned matrix: rounded to codes whose zeros stay zeros, then whichever of dense, bitmask, 2:4 and
columns takes the fewest bytes.

Bytes for each weight at density d, codes of b bits: dense b / 8, bitmask b d / 8 + 1 / 8, 2:4 half of dense + 1 / 8,
columns (2 + b / 8) d. So a bitmask of int8 pays below a density of 7 / 8, of int4 below 3 / 4, columns below about 1 in
16 (SparseGPT, arXiv 2301.00774, appendix, counts bitmasks alike). What is stored is measured, not computed.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inhouse.compress.grids import Grid
from inhouse.compress.pack_as import pack_as
from inhouse.compress.stats import LinearStats
from inhouse.core.errors import UnsupportedError
from inhouse.runtime.form import Form
from inhouse.runtime.packed import FORMATS, Packed, is_float
from inhouse.runtime.packed_sparse import is_pairs, pack_columns, sparse_formats, to_sparse

SPARSE = ("mask", "pairs", "columns")


@dataclass(frozen=True, slots=True)
class SparseOptions:
    """keep_dense: a plain format may win where a sparse one would take more bytes; else the smallest sparse one."""

    keep_dense: bool = True


def sparse(weight: Tensor, stats: LinearStats | None, options: SparseOptions, fmt: str) -> Form:
    """weight f32 [out, in] -> its Form.

    Args:
        stats: of the inputs; what rounding errors weigh by. None: all alike.
        fmt: a plain format whose groups hold 0 (`i8_g32`, `i4_g32`, `bf16`): the smallest of it and its sparse forms;
            or a sparse one (`s8_g32`, `p4_g32`, `csr_bf16`): that one.

    Raises UnsupportedError for a format without sparse forms, UsageError where a matrix is not 2:4 and was to be.
    """
    wanted = FORMATS.get(fmt)
    if wanted is not None and wanted.coding in SPARSE:
        return Form(_turned(weight, _plain(weight, wanted.base, stats), fmt))
    plain = _plain(weight, fmt, stats)
    names = [name for name in sparse_formats(fmt) if FORMATS[name].coding != "pairs" or _is_pairs(plain)]
    found = [Form(_turned(weight, plain, name)) for name in names]
    if options.keep_dense or not found:
        found.insert(0, Form(plain))
    if not names and options.keep_dense is False:
        raise UnsupportedError(f"{fmt} has no sparse form", remedy="Use i8_g32, i4_g32 or bf16", param="format")
    return min(found, key=lambda form: form.nbytes)


def _plain(weight: Tensor, fmt: str, stats: LinearStats | None) -> Packed:
    """Floats narrowed, or codes by weighted least squares; exact zeros stay."""
    if is_float(fmt):
        return pack_as(weight, fmt)
    grid = Grid(fmt, weight.shape[1])
    if not grid.keeps_zero:
        raise UnsupportedError(f"zeros do not stay zeros in {fmt}", remedy="Use a format without minimums")
    importance = None if stats is None or not bool(stats.mean_square.any()) else stats.mean_square
    made = grid.quantize(weight, importance)
    if bool((torch.from_numpy(made.dequantize())[weight == 0] != 0).any()):
        raise UnsupportedError(f"a zero did not stay zero in {fmt}", param="format")
    return made


def _turned(weight: Tensor, plain: Packed, name: str) -> Packed:
    if name == "csr_bf16":
        return pack_columns(np.ascontiguousarray(weight.numpy(), np.float32))
    return to_sparse(plain, name)


def _is_pairs(plain: Packed) -> bool:
    return is_pairs(plain.dequantize() != 0)
