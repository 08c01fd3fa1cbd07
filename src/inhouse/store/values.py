"""Values of tensors on disk, for checks: small ones as float32, any as finite or not.

Knows plain float types and the scale fields of GGUF blocks; does not decode blocks (that is `runtime.packed`).
Memory is bounded by `CHUNK_BYTES` whatever the tensor's size.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.core.tensors import TensorSource
from inhouse.store.dtypes import GGML_TYPES, PLAIN_BYTES, BlockType

CHUNK_BYTES = 4 << 20
# dtype -> (unsigned type of the same size, its exponent bits): all exponent bits set means NaN or infinity.
_EXPONENTS = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
    "C64": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
    "F8_E5M2": (np.uint8, 0x7C),
    # No infinity in these two: all bits below the sign, or all bits, mean NaN.
    "F8_E4M3": (np.uint8, 0x7F),
    "F8_E8M0": (np.uint8, 0xFF),
}


def materialise(source: TensorSource, name: str) -> npt.NDArray[np.float32]:
    """A plain float tensor (F32, F16, BF16: exact; F64: rounded) as float32[shape], copied.

    Raises NotFoundError, and UnsupportedError for all other types.
    """
    info, raw = source.info(name), source.raw(name)
    if info.dtype == "BF16":
        values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    elif info.dtype in ("F16", "F32", "F64"):
        values = raw.view(f"<f{PLAIN_BYTES[info.dtype]}").astype(np.float32)
    else:
        raise UnsupportedError(f"tensor {name!r} is {info.dtype}, not a plain float type", param=name)
    return values.reshape(info.shape)


def check_finite(source: TensorSource, name: str) -> None:
    """Refuses a tensor with NaN or infinity in its values, or in the scales of its blocks.

    Integer types pass. Reads the tensor once. Raises FormatError naming the tensor and the first place.
    """
    info, raw = source.info(name), source.raw(name)
    if info.dtype in _EXPONENTS:
        _check_plain(name, info.dtype, raw)
    elif info.dtype in GGML_TYPES:
        _check_blocks(name, info.dtype, raw, GGML_TYPES[info.dtype])


def _check_plain(name: str, dtype: str, raw: npt.NDArray[np.uint8]) -> None:
    kind, exponent = _EXPONENTS[dtype]
    size = np.dtype(kind).itemsize
    for begin, chunk in _chunks(raw, size):
        bad = (chunk.view(kind) & kind(exponent)) == exponent
        if bad.any():
            raise _not_finite(name, dtype, "element", begin // size + int(bad.argmax()))


def _check_blocks(name: str, dtype: str, raw: npt.NDArray[np.uint8], kind: BlockType) -> None:
    for begin, chunk in _chunks(raw, kind.nbytes):
        blocks = chunk.reshape(-1, kind.nbytes)
        for field in kind.half_fields:
            # Little endian: the five exponent bits of a float16 are in its second byte.
            bad = (blocks[:, field + 1] & 0x7C) == 0x7C
            if bad.any():
                raise _not_finite(name, dtype, "a scale of block", begin // kind.nbytes + int(bad.argmax()))
        for field in kind.e8m0_fields:
            bad = blocks[:, field] == 0xFF
            if bad.any():
                raise _not_finite(name, dtype, "the scale of block", begin // kind.nbytes + int(bad.argmax()))


def _chunks(raw: npt.NDArray[np.uint8], unit: int) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """(offset, bytes) pieces of whole units."""
    step = max(1, CHUNK_BYTES // unit) * unit
    for begin in range(0, raw.nbytes, step):
        yield begin, raw[begin : begin + step]


def _not_finite(name: str, dtype: str, what: str, index: int) -> FormatError:
    return FormatError(
        f"tensor {name!r} ({dtype}) is NaN or infinite at {what} {index}",
        remedy="The checkpoint is damaged; fetch or convert it again.",
        param=name,
    )
