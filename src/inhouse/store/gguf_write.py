"""GGUF files written: version 3, little endian, one file, streamed and atomic.

Knows how Python and numpy values become typed values; does not quantise.
Source: the GGUF specification (ggml, docs/gguf.md).
"""

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from inhouse.core.errors import UsageError
from inhouse.core.tensors import TensorInfo
from inhouse.store.dtypes import GGML_TYPES
from inhouse.store.gguf import DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS
from inhouse.store.gguf_values import ARRAY, MAX_ARRAY_DEPTH, STRING, Strings
from inhouse.store.writing import TensorData, atomic_file, write_tensor

_NUMPY_KINDS = {
    "uint8": 0,
    "int8": 1,
    "uint16": 2,
    "int16": 3,
    "uint32": 4,
    "int32": 5,
    "float32": 6,
    "bool": 7,
    "uint64": 10,
    "int64": 11,
    "float64": 12,
}


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorData]) -> None:
    """Writes one GGUF file, streamed tensor by tensor, atomically.

    Values: bool, str, float (as f32), int (u32, i32, u64 or i64: the first that holds it), numpy scalars and
    one-dimensional arrays (their own type), sequences of one kind. `general.alignment` is honoured.
    Raises UsageError: a value without a GGUF type, a tensor type that GGUF does not have, a name given twice.
    """
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    if alignment < 1 or alignment & (alignment - 1):
        raise UsageError(f"general.alignment is {alignment}, not a power of two", param="general.alignment")
    header = bytearray(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        kind, payload = _encode(key, value)
        header += _string(key) + struct.pack("<I", kind) + payload
    offset = 0
    names: set[str] = set()
    for info in (tensor.info for tensor in tensors):
        if info.name in names:
            raise UsageError(f"tensor name {info.name!r} is given twice", param=info.name)
        names.add(info.name)
        header += _tensor_record(info, offset)
        offset += info.nbytes + -info.nbytes % alignment
    with atomic_file(path) as file:
        file.write(header + bytes(-len(header) % alignment))
        for tensor in tensors:
            write_tensor(file, tensor)
            file.write(bytes(-tensor.info.nbytes % alignment))


def _tensor_record(info: TensorInfo, offset: int) -> bytes:
    kind = GGML_TYPES.get(info.dtype)
    if kind is None or len(info.shape) > MAX_DIMS:
        raise UsageError(f"tensor {info.name!r}: GGUF has no {info.dtype} of shape {info.shape}", param=info.name)
    row = info.shape[-1] if info.shape else 1
    if row % kind.block or math.prod(info.shape) // kind.block * kind.nbytes != info.nbytes:
        raise UsageError(
            f"tensor {info.name!r}: {info.nbytes} bytes do not match {info.dtype} {info.shape}", param=info.name
        )
    dims = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
    return _string(info.name) + dims + struct.pack("<IQ", kind.number, offset)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _encode(key: str, value: Any, depth: int = 1) -> tuple[int, bytes]:
    """(value type number, payload)."""
    if isinstance(value, str):
        return STRING, _string(value)
    if isinstance(value, bool | int | float | np.generic):
        scalar = _typed(key, value)
        return _NUMPY_KINDS[scalar.dtype.name], scalar.tobytes()
    if isinstance(value, np.ndarray):
        return ARRAY, _array_payload(key, value)
    if isinstance(value, Strings):
        parts = [value.bytes_at(index) for index in range(len(value))]
        body = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
        return ARRAY, struct.pack("<IQ", STRING, len(parts)) + body
    if isinstance(value, Sequence) and depth < MAX_ARRAY_DEPTH:
        return ARRAY, _sequence_payload(key, value, depth)
    raise UsageError(f"{key}: a {type(value).__name__} has no GGUF value type", param=key)


def _array_payload(key: str, array: np.ndarray[Any, np.dtype[Any]]) -> bytes:
    kind = _NUMPY_KINDS.get(array.dtype.name)
    if kind is None or array.ndim != 1:
        raise UsageError(f"{key}: a {array.ndim}-d array of {array.dtype} has no GGUF value type", param=key)
    return struct.pack("<IQ", kind, array.size) + array.astype(array.dtype.newbyteorder("<")).tobytes()


def _sequence_payload(key: str, items: Sequence[Any], depth: int) -> bytes:
    if all(isinstance(item, int | float) for item in items):
        array = np.array(items)
        if array.dtype.kind == "f":
            return _array_payload(key, array.astype(np.float32))
        if array.dtype == np.int64 and (not items or -(1 << 31) <= array.min() and array.max() < 1 << 31):
            return _array_payload(key, array.astype(np.int32))
        return _array_payload(key, array)
    encoded = [_encode(key, item, depth + 1) for item in items]
    kinds = {kind for kind, _ in encoded}
    if len(kinds) != 1:
        raise UsageError(f"{key}: an array of mixed kinds has no GGUF value type", param=key)
    return struct.pack("<IQ", kinds.pop(), len(encoded)) + b"".join(payload for _, payload in encoded)


def _typed(key: str, value: bool | int | float | np.generic) -> np.generic:
    if isinstance(value, np.generic):
        if value.dtype.name not in _NUMPY_KINDS:
            raise UsageError(f"{key}: {value.dtype} has no GGUF value type", param=key)
        return value
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, float):
        return np.float32(value)
    for kind in (np.uint32, np.int32, np.uint64, np.int64):
        if np.iinfo(kind).min <= value <= np.iinfo(kind).max:
            return kind(value)
    raise UsageError(f"{key}: {value} does not fit in 64 bits", param=key)
