"""The lossy way of a delta: a float matrix as base + scale * sign, one bit an element and one scale a row.

Source: BitDelta (arXiv 2402.10193), which has one scale a matrix and trains it; a row's mean magnitude is the scale of
least squared error for that row. The arithmetic is float32 with one rounding to the tensor's type at the end, in an
order that is the same on every machine, so that the result has a digest.
"""

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError
from inhouse.runtime.packed_layout import widen_bf16
from inhouse.runtime.packed_pack import narrow_bf16
from inhouse.store import delta_codec as codec
from inhouse.store.delta_codec import U8

F32 = npt.NDArray[np.float32]
_DTYPES = frozenset({"F32", "F16", "BF16"})


def fits(dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor can be said so: float matrices with rows of at least 32 elements."""
    return dtype in _DTYPES and len(shape) >= 2 and shape[-1] >= 32


def encode(new: U8, base: U8, dtype: str, row: int) -> tuple[bytes, U8]:
    """The payload, and what it will give. Pieces that end within a row take that rest as a row of its own."""
    change = _wide(new, dtype) - _wide(base, dtype)
    rows = [change[at : at + row] for at in range(0, change.size, row)]
    scales = np.array([np.abs(part).astype(np.float64).mean() for part in rows], np.float32)
    signs = np.packbits(change > 0)
    payload = codec.compress(scales.tobytes() + signs.tobytes())
    return payload, decode(payload, base, dtype, row)


def decode(payload: bytes, base: U8, dtype: str, row: int) -> U8:
    """The bytes of base + scale * sign. Raises FormatError for a payload that is none."""
    if not fits(dtype, (1, row)):
        raise FormatError("the delta has a lossy step for a tensor that takes none")
    values = _wide(base, dtype)
    rows, signs = -(-values.size // row), -(-values.size // 8)
    raw = codec.decode(codec.PLAIN, payload, 4 * rows + signs, None, 1, "U8")
    scales = raw[: 4 * rows].view(np.float32)
    if not np.isfinite(scales).all():
        raise FormatError("the delta has a scale that is not finite")
    up = np.unpackbits(raw[4 * rows :], count=values.size).astype(bool)
    step = np.repeat(scales, row)[: values.size]
    return _narrow(values + np.where(up, step, -step), dtype)


def _wide(raw: U8, dtype: str) -> F32:
    if dtype == "BF16":
        return widen_bf16(raw.view(np.uint16))
    return raw.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def _narrow(values: F32, dtype: str) -> U8:
    if dtype == "BF16":
        return narrow_bf16(values).view(np.uint8)
    with np.errstate(over="ignore"):
        return values.astype(np.float16 if dtype == "F16" else np.float32).view(np.uint8)
