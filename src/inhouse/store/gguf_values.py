"""The key-value table of a GGUF file: a bounded cursor over the header, every value type, lazy string arrays.

Knows how values are coded; does not know which keys mean what, nor tensors. Everything a file says about
sizes is checked against the bytes that are left before anything is allocated.
Source: the GGUF specification (ggml, docs/gguf.md).
"""

import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError

STRING, ARRAY, BOOL = 8, 9, 7
# Value type number -> (struct code, numpy dtype), little endian.
SCALARS = {
    0: ("<B", "<u1"),
    1: ("<b", "<i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<B", "<u1"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
MAX_ARRAY_DEPTH = 4
MAX_KEY_BYTES = 65535
# A vocabulary of a million tokens with its merges takes some 50 MB; a value of this size is hostile.
MAX_VALUE_BYTES = 1 << 30
# Arrays of arrays become Python lists, some 200 bytes each.
MAX_NESTED_ARRAYS = 1_000_000
MAX_STRINGS = 16_000_000
_LENGTH = struct.Struct("<Q")


class Strings(Sequence[str]):
    """An array of strings that stays in the file until it is read: only the offsets are held.

    Item access decodes one string, iteration decodes as it goes. Raises FormatError at the first string
    that is not UTF-8; `bytes_at` gives its bytes all the same.
    """

    __slots__ = ("_buffer", "_file", "_starts")

    def __init__(self, buffer: memoryview, starts: "array[int]", file: str) -> None:
        self._buffer = buffer
        self._starts = starts
        self._file = file

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        try:
            return str(self.bytes_at(index), "utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{self._file}: string {index} of an array is not UTF-8") from None

    def __iter__(self) -> Iterator[str]:
        buffer, length_at = self._buffer, _LENGTH.unpack_from
        try:
            for start in self._starts:
                yield str(buffer[start : start + length_at(buffer, start - 8)[0]], "utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{self._file}: a string of an array is not UTF-8") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(other) == len(self) and all(map(str.__eq__, self, other))

    def __hash__(self) -> int:
        raise TypeError("an array of strings is not hashable")

    def __repr__(self) -> str:
        return f"Strings({len(self)})"

    def bytes_at(self, index: int) -> bytes:
        """The bytes of one string, whatever they are."""
        start = self._starts[index]
        return bytes(self._buffer[start : start + _LENGTH.unpack_from(self._buffer, start - 8)[0]])


class Cursor:
    """Reads little-endian values from the start of a mapped file; never beyond its end.

    Every method raises FormatError, naming the file and the offset, where the file is too short.
    """

    def __init__(self, data: npt.NDArray[np.uint8], file: str) -> None:
        self.buffer: memoryview = data.data
        self.size = data.nbytes
        self.at = 0
        self.file = file
        self._nested = 0
        self._n_strings = 0

    @property
    def remaining(self) -> int:
        return self.size - self.at

    def error(self, cause: str) -> FormatError:
        return FormatError(f"{self.file}: {cause} at byte {self.at}", remedy="Fetch the file again.")

    def _advance(self, nbytes: int, what: str) -> int:
        if nbytes > self.remaining:
            raise self.error(f"{what} takes {nbytes} bytes and {self.remaining} are left,")
        begin = self.at
        self.at += nbytes
        return begin

    def u32(self, what: str) -> int:
        return int.from_bytes(self.buffer[self._advance(4, what) : self.at], "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.buffer[self._advance(8, what) : self.at], "little")

    def count(self, what: str, each: int, limit: int = 1 << 63) -> int:
        """A u64 that counts things of at least `each` bytes, so that no count can exceed the file."""
        count = self.u64(what)
        if count > limit:
            raise self.error(f"{count} {what}, the limit is {limit},")
        if count * each > self.remaining:
            raise self.error(f"{count} {what} of at least {each} bytes do not fit in {self.remaining},")
        return count

    def string(self, what: str, limit: int = MAX_VALUE_BYTES) -> str:
        length = self.u64(what)
        if length > limit:
            raise self.error(f"{what} of {length} bytes, the limit is {limit},")
        begin = self._advance(length, what)
        try:
            return str(self.buffer[begin : self.at], "utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8") from None

    def value(self, kind: int, what: str) -> Any:
        """One value: int, float, bool, str, a read-only numpy array, `Strings`, or a list of arrays."""
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self._array(what, depth=1)
        if kind not in SCALARS:
            raise self.error(f"{what} has the unknown value type {kind}")
        code, _ = SCALARS[kind]
        (value,) = struct.unpack_from(code, self.buffer, self._advance(struct.calcsize(code), what))
        return self._bool(value, what) if kind == BOOL else value

    def _bool(self, value: int, what: str) -> bool:
        if value > 1:
            raise self.error(f"{what} is a bool of value {value}")
        return bool(value)

    def _array(self, what: str, depth: int) -> Any:
        kind = self.u32(what)
        if kind == STRING:
            return self._strings(self.count(f"strings in {what}", 8), what)
        if kind == ARRAY:
            return self._nest(what, depth)
        if kind not in SCALARS:
            raise self.error(f"{what} is an array of the unknown value type {kind}")
        dtype = np.dtype(SCALARS[kind][1])
        count = self.count(f"values in {what}", dtype.itemsize)
        if count * dtype.itemsize > MAX_VALUE_BYTES:
            raise self.error(f"{what} of {count * dtype.itemsize} bytes, the limit is {MAX_VALUE_BYTES},")
        begin = self._advance(count * dtype.itemsize, what)
        # Copied, because values in the header are not aligned.
        values = np.frombuffer(self.buffer, dtype, count, begin).copy() if count else np.zeros(0, dtype)
        if kind == BOOL:
            self._bool(int(values.max(initial=0)), what)
            values = values.astype(np.bool_)
        values.flags.writeable = False
        return values

    def _nest(self, what: str, depth: int) -> list[Any]:
        if depth >= MAX_ARRAY_DEPTH:
            raise self.error(f"{what} nests arrays deeper than {MAX_ARRAY_DEPTH}")
        count = self.count(f"arrays in {what}", 12)
        self._nested += count
        if self._nested > MAX_NESTED_ARRAYS:
            raise self.error(f"{what}: {self._nested} arrays in arrays, the limit is {MAX_NESTED_ARRAYS},")
        return [self._array(what, depth + 1) for _ in range(count)]

    def _strings(self, count: int, what: str) -> Strings:
        self._n_strings += count
        if self._n_strings > MAX_STRINGS:
            raise self.error(f"{what}: {self._n_strings} strings in arrays, the limit is {MAX_STRINGS},")
        buffer, size, at, length_at = self.buffer, self.size, self.at, _LENGTH.unpack_from
        starts = array("Q", bytes(8 * count))
        for index in range(count):
            # The loop that a vocabulary spends its time in: one read, one sum and one test a string.
            start = at + 8
            if start > size:
                break
            starts[index] = start
            at = start + length_at(buffer, at)[0]
        if at > size or (count and start > size):
            raise self.error(f"the {count} strings of {what} go beyond the file of {size} bytes,")
        self.at = at
        return Strings(buffer, starts, self.file)
