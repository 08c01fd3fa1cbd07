"""Where the entries of a zip archive lie in its file: stored (uncompressed) entries only, as torch.save writes.

Nothing is ever inflated, so an archive cannot hold more than its own size. Knows the central directory, Zip64
and local headers; does not know what the entries are. Source: PKWARE APPNOTE 6.3.10, sections 4.3 and 4.5.3.
"""

import struct
from dataclasses import dataclass
from typing import Any

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.store.mapping import Mapping, first_overlap

MAGIC = b"PK\x03\x04"
MAX_ENTRIES = 1_000_000
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """Bytes of one entry in the file: `size` bytes at `offset`."""

    offset: int
    size: int


def read_entries(mapping: Mapping) -> dict[str, ZipEntry]:
    """name -> place of every entry.

    Raises:
        FormatError: broken directory, entry outside the file or over another, name given twice.
        UnsupportedError: compressed or encrypted entries, archives of several volumes.
    """
    file, data = mapping.path.name, mapping.data.data
    count, size, offset = _find_directory(file, data)
    if offset + size > data.nbytes or count > MAX_ENTRIES or count * _CENTRAL.size > size:
        raise FormatError(f"{file}: a zip directory of {count} entries in {size} bytes at {offset} is not there")
    entries: dict[str, ZipEntry] = {}
    ranges = [(offset, offset + size, "the directory")]
    at, end = offset, offset + size
    for _ in range(count):
        name, entry, begin, at = _read_entry(file, data, at, end)
        if name in entries:
            raise FormatError(f"{file}: zip entry {name!r} is given twice")
        entries[name] = entry
        ranges.append((begin, entry.offset + entry.size, name))
    if at != end:
        raise FormatError(f"{file}: {end - at} bytes are left over in the zip directory")
    overlap = first_overlap(ranges)
    if overlap:
        raise FormatError(f"{file}: zip entries {overlap[0]!r} and {overlap[1]!r} overlap")
    return entries


def _unpack(file: str, layout: struct.Struct, data: memoryview, at: int, magic: bytes) -> tuple[Any, ...]:
    if at < 0 or at + layout.size > data.nbytes or bytes(data[at : at + 4]) != magic:
        raise FormatError(f"{file}: no zip record {magic!r} at byte {at}", remedy="Fetch the file again.")
    return layout.unpack_from(data, at)


def _find_directory(file: str, data: memoryview) -> tuple[int, int, int]:
    """(number of entries, bytes, offset) of the central directory."""
    at = data.nbytes - _END.size
    # torch.save writes no comment, so the end record is the end of the file: there is nothing to search for.
    _, disk, first_disk, here, count, size, offset, _comment = _unpack(file, _END, data, at, b"PK\x05\x06")
    if count == _FULL16 or size == _FULL32 or offset == _FULL32:
        _, _, at64, _ = _unpack(file, _LOCATOR64, data, at - _LOCATOR64.size, b"PK\x06\x07")
        record = _unpack(file, _END64, data, at64, b"PK\x06\x06")
        disk, first_disk, here, count, size, offset = record[4:]
    if disk or first_disk or here != count:
        raise UnsupportedError(f"{file}: a zip archive of several volumes", remedy="Save the model in one file.")
    return count, size, offset


def _read_entry(file: str, data: memoryview, at: int, end: int) -> tuple[str, ZipEntry, int, int]:
    """(name, entry, where its local header begins, where the next directory record begins)."""
    record = _unpack(file, _CENTRAL, data, at, b"PK\x01\x02")
    flags, method = record[3], record[4]
    packed, size, name_bytes, extra_bytes, comment_bytes = record[8:13]
    begin = record[16]
    next_at = at + _CENTRAL.size + name_bytes + extra_bytes + comment_bytes
    if next_at > end:
        raise FormatError(f"{file}: a zip record at byte {at} goes beyond the directory")
    raw_name = bytes(data[at + _CENTRAL.size : at + _CENTRAL.size + name_bytes])
    try:
        name = raw_name.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{file}: a zip entry has a name that is not UTF-8") from None
    extra_at = at + _CENTRAL.size + name_bytes
    size, packed, begin = _wide_fields(file, bytes(data[extra_at : extra_at + extra_bytes]), size, packed, begin)
    if method != 0 or packed != size:
        raise UnsupportedError(
            f"{file}: zip entry {name!r} is compressed (method {method})", remedy="Save the model with torch.save."
        )
    if flags & 1:
        raise UnsupportedError(f"{file}: zip entry {name!r} is encrypted", remedy="Save the model in plain.")
    local = _unpack(file, _LOCAL, data, begin, b"PK\x03\x04")
    offset = begin + _LOCAL.size + local[9] + local[10]
    # Two readers that trust different copies of a name would see different files.
    if bytes(data[begin + _LOCAL.size : begin + _LOCAL.size + local[9]]) != raw_name:
        raise FormatError(f"{file}: zip entry {name!r} has another name in its own header")
    if offset + size > data.nbytes:
        raise FormatError(f"{file}: zip entry {name!r} ends at {offset + size}, the file has {data.nbytes} bytes")
    return name, ZipEntry(offset, size), begin, next_at


def _wide_fields(file: str, extra: bytes, size: int, packed: int, begin: int) -> tuple[int, int, int]:
    """(size, packed, begin) with those that are all ones taken from the Zip64 extra field, in that order."""
    fields = [size, packed, begin]
    wanted = [index for index, value in enumerate(fields) if value == _FULL32]
    at = 0
    while wanted and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        body = extra[at + 4 : at + 4 + length]
        if kind == 1:
            if len(body) < 8 * len(wanted):
                break
            for index, value in zip(wanted, struct.unpack_from(f"<{len(wanted)}Q", body), strict=True):
                fields[index] = value
            return fields[0], fields[1], fields[2]
        at += 4 + length
    if wanted:
        raise FormatError(f"{file}: a zip record lacks its 64-bit sizes")
    return size, packed, begin
