"""Files written whole or not at all, and tensors handed to a writer one at a time.

Knows temporary names, fsync and rename; does not know any format.
"""

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import CapacityError, FormatError, UsageError
from inhouse.core.tensors import TensorInfo, TensorSource

_NUMPY_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}


@dataclass(frozen=True, slots=True)
class TensorData:
    """A tensor to be written: `read()` gives its bytes, uint8[info.nbytes], when the writer gets there."""

    info: TensorInfo
    read: Callable[[], npt.NDArray[np.uint8]]


def from_array(name: str, array: npt.NDArray[np.generic]) -> TensorData:
    """A numpy array as a tensor of the same dtype. Raises FormatError for dtypes that no format has."""
    dtype = _NUMPY_NAMES.get(array.dtype.name)
    if dtype is None:
        raise FormatError(f"tensor {name!r}: numpy dtype {array.dtype} cannot be written", param=name)
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(array.shape)
    return from_bytes(name, dtype, array.shape, plain.reshape(-1).view(np.uint8))


def from_bytes(name: str, dtype: str, shape: tuple[int, ...], raw: npt.NDArray[np.uint8]) -> TensorData:
    """Bytes that are already in the layout of `dtype` (BF16, or a GGUF block type), uint8[nbytes]."""
    return TensorData(TensorInfo(name, dtype, tuple(int(dim) for dim in shape), raw.nbytes), lambda: raw)


def from_source(source: TensorSource) -> list[TensorData]:
    """All tensors of a source, in its order, unread until written."""
    return [TensorData(source.info(name), _reader(source, name)) for name in source]


def _reader(source: TensorSource, name: str) -> Callable[[], npt.NDArray[np.uint8]]:
    return lambda: source.raw(name)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its name only once the block ended well and all bytes are on disk.

    After an exception nothing is left behind and an old file at `path` is untouched. After a kill a file
    named `.NAME.*.tmp` may stay.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def named_target(path: Path) -> Iterator[None]:
    """For a file that a person named: what the system refuses of it, opening, writing or renaming, becomes an error
    with its cause. Raises CapacityError (disk full), UsageError (anything else)."""
    try:
        yield
    except OSError as error:
        cause = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapacityError(
                f"{path} cannot be written: {cause}",
                remedy="Make room, or name a file on another disk",
                param="file",
            ) from None
        raise UsageError(
            f"{path} cannot be written: {cause}", remedy="Name a file in a folder that you may write to", param="file"
        ) from None


def sync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensor(file: BinaryIO, tensor: TensorData) -> None:
    """Appends the tensor's bytes. Raises FormatError if `read()` gives another size than announced."""
    raw = tensor.read()
    if raw.nbytes != tensor.info.nbytes:
        raise FormatError(
            f"tensor {tensor.info.name!r} announced {tensor.info.nbytes} bytes and gave {raw.nbytes}",
            param=tensor.info.name,
        )
    file.write(np.ascontiguousarray(raw).data)
