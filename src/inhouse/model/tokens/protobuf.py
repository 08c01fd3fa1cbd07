"""The wire format of protocol buffers, as far as a SentencePiece model needs it.

Knows varints, fixed words and length-delimited fields (https://protobuf.dev/programming-guides/encoding/). Does not
know any message's fields.
"""

import struct
from collections.abc import Iterator
from typing import Final

from inhouse.core.errors import FormatError

Value = int | bytes
"""A varint or fixed word as an unsigned integer; a length-delimited field as bytes."""

_MAX_VARINT: Final = 10


def fields(data: bytes, what: str) -> Iterator[tuple[int, int, Value]]:
    """(field number, wire type, value) of each field in file order.

    Wire types: 0 varint, 1 eight bytes, 2 length-delimited, 5 four bytes.

    Raises:
        FormatError: truncated data, a length beyond the end, or a wire type that is not in use.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at, what)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise FormatError(f"{what} holds field number 0 at byte {at}")
        match wire:
            case 0:
                value, at = _varint(data, at, what)
                yield number, wire, value
            case 1 | 5:
                size = 8 if wire == 1 else 4
                yield number, wire, int.from_bytes(_slice(data, at, size, what), "little")
                at += size
            case 2:
                size, at = _varint(data, at, what)
                yield number, wire, _slice(data, at, size, what)
                at += size
            case _:
                raise FormatError(f"{what} holds wire type {wire} at byte {at}")


def float32(bits: int) -> float:
    """The IEEE single of a four-byte word."""
    value: float = struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]
    return value


def int32(value: int) -> int:
    """The signed 32-bit number of a varint (negative ones are written as 64 bits)."""
    low = value & 0xFFFFFFFF
    return low - 2**32 if low >= 2**31 else low


def _slice(data: bytes, at: int, size: int, what: str) -> bytes:
    if at + size > len(data):
        raise FormatError(f"{what} is truncated: {size} bytes wanted at byte {at}, {len(data) - at} left")
    return data[at : at + size]


def _varint(data: bytes, at: int, what: str) -> tuple[int, int]:
    value = 0
    for n in range(_MAX_VARINT):
        if at + n >= len(data):
            raise FormatError(f"{what} is truncated inside a number at byte {at}")
        byte = data[at + n]
        value |= (byte & 0x7F) << (7 * n)
        if byte < 0x80:
            return value, at + n + 1
    raise FormatError(f"{what} holds a number of more than {_MAX_VARINT} bytes at byte {at}")
