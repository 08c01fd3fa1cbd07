"""The GGUF format, versions 2 and 3, little endian: header, tensor table, split files, as a TensorSource.

Knows where tensors lie and how many bytes their types take; does not know what keys mean (beyond alignment
and splits) nor how blocks decode. Shapes are turned to row-major order: ggml lists the contiguous dimension first.
Source: the GGUF specification (ggml, docs/gguf.md); split keys: llama.cpp's gguf-split.
"""

import math
import re
from collections.abc import Mapping as MappingType
from pathlib import Path
from typing import Any

from inhouse.core.errors import FormatError, NotFoundError, UnsupportedError
from inhouse.core.tensors import TensorInfo
from inhouse.store.dtypes import GGML_NAMES, GGML_TYPES, GGML_UNREAD
from inhouse.store.gguf_values import MAX_KEY_BYTES, Cursor
from inhouse.store.mapping import Entry, MappedSource, Mapping, first_overlap

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_RECORDS = 1_000_000
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"
MAX_SPLITS = 4096
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# Smallest possible records: key length, one byte of key, type, one byte of value; and name length, one
# byte of name, dimension count, type, offset.
_MIN_KV_BYTES, _MIN_TENSOR_BYTES = 14, 25


def open_gguf(path: Path) -> MappedSource:
    """A GGUF file, or the whole set if it is one file of a split model.

    Raises:
        NotFoundError: no such file, or a file of the set is missing.
        FormatError: any rule of the format is broken.
        UnsupportedError: big-endian file, version 1, or a tensor type that we do not read.
    """
    mapping = Mapping(path)
    entries, metadata = _read_file(mapping)
    count = metadata.get(SPLIT_COUNT, 1)
    if type(count) is not int or not 0 <= count <= MAX_SPLITS:
        raise FormatError(f"{path.name}: {SPLIT_COUNT} is not a count up to {MAX_SPLITS}", param=SPLIT_COUNT)
    if count > 1:
        return _open_split(path, count)
    return MappedSource("gguf", entries, [mapping], metadata)


def gguf_metadata(path: Path) -> MappingType[str, Any]:
    """The key-value table of a GGUF file (the first file's, of a split model). Raises as `open_gguf`."""
    return open_gguf(path).metadata


def split_paths(path: Path, count: int | None = None) -> list[Path]:
    """The files of the split model that `path` belongs to, by name; `[path]` for any other name.

    Raises FormatError if the name disagrees with `count` (the file's own split.count).
    """
    match = _SPLIT_NAME.fullmatch(path.name)
    named = int(match["count"]) if match else 1
    if count is not None and named != count:
        raise FormatError(f"{path.name} says in its header that it is one of {count} files, its name says {named}")
    if match is None or named > MAX_SPLITS:
        return [path]
    return [path.with_name(f"{match['stem']}-{no:05d}-of-{named:05d}.gguf") for no in range(1, named + 1)]


def _open_split(path: Path, count: int) -> MappedSource:
    entries: dict[str, Entry] = {}
    metadata: dict[str, Any] = {}
    mappings = []
    for number, part in enumerate(split_paths(path, count)):
        if not part.exists():
            raise NotFoundError(f"{part.name}, one of {count} files of this model, is missing", remedy="Fetch it.")
        mapping = Mapping(part)
        found, own_metadata = _read_file(mapping)
        if own_metadata.get(SPLIT_NO) != number or own_metadata.get(SPLIT_COUNT) != count:
            raise FormatError(f"{part.name} is not number {number} of {count} by its own header", param=SPLIT_NO)
        twice = next((name for name in found if name in entries), None)
        if twice is not None:
            raise FormatError(f"{part.name} holds tensor {twice!r} a second time", param=twice)
        entries |= found
        # The first file carries the model's table, the others repeat what the split needs.
        metadata = own_metadata | metadata
        mappings.append(mapping)
    total = metadata.get(SPLIT_TENSORS)
    if total != len(entries):
        raise FormatError(
            f"{path.name}: the files hold {len(entries)} tensors, {SPLIT_TENSORS} is {total}", param=SPLIT_TENSORS
        )
    return MappedSource("gguf", entries, mappings, metadata)


def _read_file(mapping: Mapping) -> tuple[dict[str, Entry], dict[str, Any]]:
    cursor = Cursor(mapping.data, mapping.path.name)
    _check_magic(cursor)
    n_tensors = cursor.count("tensors", _MIN_TENSOR_BYTES, MAX_RECORDS)
    n_kv = cursor.count("key-value pairs", _MIN_KV_BYTES, MAX_RECORDS)
    metadata = _read_table(cursor, n_kv)
    alignment = _alignment(cursor, metadata)
    infos = _read_infos(cursor, n_tensors)
    start = -(-cursor.at // alignment) * alignment
    entries: dict[str, Entry] = {}
    for info, offset in infos:
        if offset % alignment:
            raise cursor.error(f"tensor {info.name!r} at offset {offset}, no multiple of {alignment},")
        if start + offset + info.nbytes > cursor.size:
            raise cursor.error(
                f"tensor {info.name!r} ends at {start + offset + info.nbytes}, the file has {cursor.size} bytes,"
            )
        entries[info.name] = Entry(info, mapping, start + offset)
    overlap = first_overlap([(e.offset, e.offset + e.info.nbytes, name) for name, e in entries.items()])
    if overlap:
        raise cursor.error(f"tensors {overlap[0]!r} and {overlap[1]!r} overlap")
    return entries, metadata


def _check_magic(cursor: Cursor) -> None:
    magic = bytes(cursor.buffer[:4])
    if magic != MAGIC:
        raise FormatError(f"{cursor.file} begins with {magic!r}, not {MAGIC!r}", remedy="This is not a GGUF file.")
    cursor.at = 4
    version = cursor.u32("the version")
    if version and version & 0xFFFF == 0:
        raise UnsupportedError(f"{cursor.file} is a big-endian GGUF file", remedy="Convert it to little endian.")
    if version not in VERSIONS:
        raise UnsupportedError(
            f"{cursor.file} is GGUF version {version}, versions 2 and 3 are read", remedy="Convert the file again."
        )


def _read_table(cursor: Cursor, n_kv: int) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for _ in range(n_kv):
        key = cursor.string("a key", MAX_KEY_BYTES)
        if not key or key in table:
            raise cursor.error(f"the key {key!r} is empty or given twice")
        kind = cursor.u32(f"the type of {key!r}")
        table[key] = cursor.value(kind, repr(key))
    return table


def _alignment(cursor: Cursor, metadata: MappingType[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {str(alignment)[:40]}, not a power of two,")
    return alignment


def _read_infos(cursor: Cursor, n_tensors: int) -> list[tuple[TensorInfo, int]]:
    """(info, offset in the data) of each tensor, in file order."""
    infos = []
    names: set[str] = set()
    for _ in range(n_tensors):
        name = cursor.string("a tensor name", MAX_KEY_BYTES)
        if not name or name in names:
            raise cursor.error(f"the tensor name {name!r} is empty or given twice")
        names.add(name)
        n_dims = cursor.u32(f"the rank of {name!r}")
        if n_dims > MAX_DIMS:
            raise cursor.error(f"tensor {name!r} has {n_dims} dimensions, the format has {MAX_DIMS},")
        shape = tuple(cursor.u64(f"the shape of {name!r}") for _ in range(n_dims))[::-1]
        dtype, nbytes = _type_and_size(cursor, name, cursor.u32(f"the type of {name!r}"), shape)
        infos.append((TensorInfo(name, dtype, shape, nbytes), cursor.u64(f"the offset of {name!r}")))
    return infos


def _type_and_size(cursor: Cursor, name: str, number: int, shape: tuple[int, ...]) -> tuple[str, int]:
    if number in GGML_UNREAD:
        raise UnsupportedError(
            f"{cursor.file}: tensor {name!r} has type {GGML_UNREAD[number]}, which is not read",
            remedy="Take a file in a Q or K format.",
            param=name,
        )
    if number not in GGML_NAMES:
        raise UnsupportedError(f"{cursor.file}: tensor {name!r} has the unknown type number {number}", param=name)
    dtype = GGML_NAMES[number]
    kind = GGML_TYPES[dtype]
    if any(dim >= 1 << 63 for dim in shape):
        raise cursor.error(f"tensor {name!r} has a dimension beyond 2^63")
    row = shape[-1] if shape else 1
    if row % kind.block:
        raise cursor.error(f"tensor {name!r} has rows of {row}, no multiple of the {kind.block} of {dtype},")
    return dtype, math.prod(shape) // kind.block * kind.nbytes
