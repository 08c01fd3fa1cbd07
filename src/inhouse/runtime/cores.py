"""Matrices that are kept as cores: what tables of a tensor train mean, and the names under which cores are known.

Knows shapes and names; does not know Programs or files.
"""

import math
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UsageError

F32 = npt.NDArray[np.float32]

MAX_TABLES = 4  # of a tensor train
_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.\d+\.(?P<part>\w+)\.weight")


def stack_of(name: str) -> str:
    """`layers.0.moe.experts.gate` of `layers.0.moe.experts.3.gate.weight`; "" for a weight of no stack."""
    match = _EXPERT.fullmatch(name)
    return f"{match['stack']}.{match['part']}" if match else ""


def core_name(name: str, at: int) -> str:
    """The name of a table of the tensor train of `X.weight`: `X.core0.weight`."""
    return f"{name.removesuffix('.weight')}.core{at}.weight"


def outer_names(stack: str) -> tuple[str, str]:
    """Names of what the matrices of a stack share: left [out, a], right [b, in]."""
    return f"{stack}.left.weight", f"{stack}.right.weight"


def train_ranks(shapes: Sequence[tuple[int, ...]], widths: Sequence[int], rows: int) -> list[int]:
    """r_0 .. r_d of the tables [m_k, r_(k-1) widths[k] r_k] of a train. Raises UsageError where they fit none."""
    ranks = [1]
    for shape, width in zip(shapes, widths, strict=False):
        if width < 1 or shape[1] % (ranks[-1] * width):
            raise UsageError(f"a table of {shape[1]} numbers a row is not {ranks[-1]} x {width} x r")
        ranks.append(shape[1] // (ranks[-1] * width))
    enough = math.prod(shape[0] for shape in shapes) >= rows
    if len(shapes) != len(widths) or not 2 <= len(shapes) <= MAX_TABLES or ranks[-1] != 1 or not enough:
        raise UsageError(f"{len(shapes)} tables and widths {list(widths)} make no train of {rows} rows")
    return ranks


def train_rows(tables: Sequence[F32], widths: Sequence[int], ids: npt.NDArray[np.int64]) -> F32:
    """Rows `ids` of a train, f32 [n, prod widths], summed in float64."""
    found, digits = np.ones((ids.size, 1, 1)), []
    for table in reversed(tables):
        digits.append(ids % len(table))
        ids = ids // len(table)
    for table, width, index in zip(tables, widths, reversed(digits), strict=True):
        slices = table[index].astype(np.float64).reshape(len(index), found.shape[2], -1)
        found = (found @ slices).reshape(len(index), found.shape[1] * width, -1)
    return found[:, :, 0].astype(np.float32)
