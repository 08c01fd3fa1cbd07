"""The pack cache: a model's packed weights in one file, mapped at the next start instead of packed again.

Derived, never the truth: any file of it may be deleted at any time, and one that is stale or damaged is made anew.
Knows the file and its limits; does not know how weights are made.

    page 0      magic, where the footer is, how long, its sha256
    then        tensors: matrices from page boundaries on, vectors from 64-byte boundaries on
    footer      JSON: key, digest of the model, table of tensors with the CRC-32 of each

Beside a large pack lies NAME.pack.verified once all its checksums were compared: which file that was.
"""

import contextlib
import hashlib
import json
import os
import shutil
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import CapacityError, FormatError, NotFoundError
from inhouse.load.packing import QUANTIZE, Part, nbytes
from inhouse.runtime.executor import Weight
from inhouse.runtime.packed import FORMATS, LAYOUT_VERSION, Packed, packed_nbytes
from inhouse.store.home import private_folder
from inhouse.store.mapping import Mapping as FileMapping
from inhouse.store.mapping import forget_pages
from inhouse.store.strict_json import parse_object
from inhouse.store.writing import atomic_file

PACK_VERSION = 2  # raise it when this file's own form changes
MAGIC = b"INHOUSE PACK\0\0\0\0"
PAGE = 4096
ALIGN = 64
MAX_FOOTER_BYTES = 64 << 20
# Checksums of files up to this size are compared at every start (0.3 to 0.4 ms a MiB); those of larger ones once for
# each file, because reading all of it would cost the start that the mapping saves.
VERIFY_BYTES = 256 << 20
SPARE_BYTES = 1 << 30  # disk space that the cache leaves free
LIMIT_BYTES = 64 << 30  # of all packs together, and at most
LIMIT_SHARE = 0.25  # of the disk they lie on; the longest unused go first
_HEAD = struct.Struct("<16sQQ32s")


@dataclass(frozen=True, slots=True)
class PackKey:
    """What a pack was made from and for: equal keys mean interchangeable packs."""

    identity: str  # digest of a stored version, or of the names, sizes and times of files outside the store
    quantize: str  # "" | "q8" | "q6" | "q4"
    layout: int = LAYOUT_VERSION
    pack: int = PACK_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The key as the footer keeps it."""
        return {"identity": self.identity, "quantize": self.quantize, "layout": self.layout, "pack": self.pack}

    @property
    def file_name(self) -> str:
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:40] + ".pack"


@dataclass(frozen=True, slots=True)
class Pack:
    """An open pack: its weights are views of `mapping`."""

    digest: str
    weights: dict[str, Weight]
    mapping: FileMapping


def pack_size(parts: Iterable[Part]) -> int:
    """Bytes of a pack's file, footer not counted."""
    reach = PAGE
    for part in parts:
        size = _size(part.format, part.spec.shape)
        reach = _aligned(reach, size) + size
    return reach


def open_pack(folder: Path, key: PackKey, parts: Iterable[Part]) -> Pack:
    """Maps the pack of that key.

    Raises NotFoundError if there is none, FormatError if it is damaged, stale or not of these weights.
    """
    path = folder / key.file_name
    mapping = FileMapping(path)
    footer = _read_footer(mapping)
    if footer.get("key") != key.to_dict() or not isinstance(footer.get("digest"), str):
        raise FormatError(f"{path.name} was made for something else")
    table = footer.get("tensors")
    if not isinstance(table, dict):
        raise FormatError(f"{path.name} has no table of tensors")
    stamp = _stamp(mapping)
    compare = mapping.size <= VERIFY_BYTES or not _was_verified(path, stamp)
    weights = {part.spec.name: _weight(mapping, part, table.get(part.spec.name), compare) for part in parts}
    if len(weights) != len(table):
        raise FormatError(f"{path.name} holds {len(table)} weights, {len(weights)} were expected")
    if compare and mapping.size > VERIFY_BYTES:
        _mark_verified(path, stamp)
    _mark_used(path)
    return Pack(str(footer["digest"]), weights, mapping)


def write_pack(folder: Path, key: PackKey, digest: str, weights: Iterable[tuple[Part, Weight]], size: int) -> None:
    """Writes a pack, weight by weight as they come, and makes room by dropping the longest unused ones.

    Raises CapacityError if the disk lacks the room even without them; the caller then goes on without a pack.
    """
    private_folder(folder)
    disk = shutil.disk_usage(folder)
    held = sum(found.st_size for _, found in _packs(folder))
    limit = min(LIMIT_BYTES, int(disk.total * LIMIT_SHARE), held + disk.free - SPARE_BYTES) - size
    if limit < 0:
        raise CapacityError(
            f"a pack of {size} bytes does not fit: {disk.free} bytes are free beside {held} of other packs, "
            f"{SPARE_BYTES} stay spare, and packs take at most {LIMIT_SHARE:.0%} of the disk"
        )
    make_room(folder, limit)
    table: dict[str, dict[str, Any]] = {}
    try:
        with atomic_file(folder / key.file_name) as file:
            reach = PAGE
            for part, weight in weights:
                raw = _bytes(weight)
                offset = _aligned(reach, raw.nbytes)
                file.seek(offset)
                file.write(raw.data)
                reach = offset + raw.nbytes
                table[part.spec.name] = {"offset": offset, "crc32": _checksum(raw)}
                if _variable(part.format):
                    table[part.spec.name]["bytes"] = raw.nbytes
            footer = json.dumps({"key": key.to_dict(), "digest": digest, "tensors": table}).encode()
            start = _aligned(reach, PAGE)
            file.seek(start)
            file.write(footer)
            file.seek(0)
            file.write(_HEAD.pack(MAGIC, start, len(footer), hashlib.sha256(footer).digest()))
    except OSError as error:
        raise CapacityError(f"the pack could not be written: {error.strerror}") from None
    with contextlib.suppress(OSError):  # small pages are slower, no more
        forget_pages(folder / key.file_name)


def forget_packs(folder: Path, identity: str) -> int:
    """Deletes the packs of a model that is gone; returns the bytes freed."""
    freed = 0
    for quantize, layout, pack in product(("", *QUANTIZE), range(1, LAYOUT_VERSION + 1), range(1, PACK_VERSION + 1)):
        path = folder / PackKey(identity, quantize, layout, pack).file_name
        if path.is_file():
            freed += path.stat().st_size
            _delete(path)
    return freed


def make_room(folder: Path, limit: int) -> list[str]:
    """Deletes the longest unused packs until the rest takes at most `limit` bytes, and leftovers of killed writers.

    Returns the names of what was deleted.
    """
    kept, gone = [(found.st_atime_ns, found.st_size, path) for path, found in _packs(folder)], []
    total = sum(size for _, size, _ in kept)
    for _, size, path in sorted(kept):
        if total <= limit:
            break
        _delete(path)
        gone.append(path.name)
        total -= size
    day_ago = time.time() - 86400
    for leftover in folder.glob(".*.tmp"):
        if leftover.stat().st_mtime < day_ago:
            leftover.unlink(missing_ok=True)
            gone.append(leftover.name)
    return gone


def _packs(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The packs that are there; another process may take some away meanwhile."""
    for path in folder.glob("*.pack"):
        with contextlib.suppress(FileNotFoundError):
            yield path, path.stat()


def _read_footer(mapping: FileMapping) -> Mapping[str, Any]:
    name = mapping.path.name
    if mapping.size < PAGE:
        raise FormatError(f"{name} has {mapping.size} bytes, a pack has {PAGE} at least")
    magic, start, length, digest = _HEAD.unpack(mapping.data[: _HEAD.size].tobytes())
    if magic != MAGIC or length > MAX_FOOTER_BYTES or start + length != mapping.size:
        raise FormatError(f"{name} is not a whole pack")
    footer = mapping.data[start:].tobytes()
    if hashlib.sha256(footer).digest() != digest:
        raise FormatError(f"{name} has a damaged footer")
    return parse_object(footer, what=name, max_depth=4)


def _weight(mapping: FileMapping, part: Part, entry: Any, compare: bool) -> Weight:
    name = part.spec.name
    if not isinstance(entry, dict):
        raise FormatError(f"{mapping.path.name} lacks {name}", param=name)
    offset, size = entry.get("offset"), _size(part.format, part.spec.shape)
    if _variable(part.format):
        held = entry.get("bytes")
        if type(held) is not int or not 0 < held <= size:
            raise FormatError(f"{mapping.path.name}: {name} has {held} bytes, at most {size} were expected", param=name)
        size = held
    if type(offset) is not int or offset % ALIGN or not PAGE <= offset <= mapping.size - size:
        raise FormatError(f"{mapping.path.name}: {name} lies at {offset}", param=name)
    raw = mapping.data[offset : offset + size]
    if compare and _checksum(raw) != entry.get("crc32"):
        raise FormatError(f"{mapping.path.name}: {name} is damaged", param=name)
    if part.format == "vector":
        return raw.view(np.float32).reshape(part.spec.shape)
    return Packed(part.format, (part.spec.shape[0], part.spec.shape[1]), raw)


def _size(kind: str, shape: tuple[int, ...]) -> int:
    return 4 * int(np.prod(shape)) if kind == "vector" else packed_nbytes(kind, (shape[0], shape[1]))


def _variable(kind: str) -> bool:
    """Whether bytes depend on what a matrix holds; `_size` is then the most."""
    return kind != "vector" and FORMATS[kind].variable


def _aligned(offset: int, size: int) -> int:
    align = PAGE if size >= PAGE else ALIGN
    return -(-offset // align) * align


def _bytes(weight: Weight) -> npt.NDArray[np.uint8]:
    raw = weight.data if isinstance(weight, Packed) else np.ascontiguousarray(weight).reshape(-1).view(np.uint8)
    assert raw.nbytes == nbytes(weight)
    return raw


def _checksum(raw: npt.NDArray[np.uint8]) -> int:
    """CRC-32: order counts, every burst of up to 32 bits is seen; made for damage, not against forgery."""
    return zlib.crc32(raw.data)


def _stamp(mapping: FileMapping) -> bytes:
    """Which file this is: inode, modification time, size, and its first bytes, the footer's sha256 among them."""
    _, inode, modified = mapping.identity
    return f"{inode} {modified} {mapping.size} {mapping.data[: _HEAD.size].tobytes().hex()}\n".encode()


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.verified")


def _was_verified(path: Path, stamp: bytes) -> bool:
    try:
        with open(_marker(path), "rb") as file:
            return file.read(len(stamp) + 1) == stamp
    except OSError:
        return False


def _mark_verified(path: Path, stamp: bytes) -> None:
    try:
        with atomic_file(_marker(path)) as file:
            file.write(stamp)
    except OSError:
        return  # a cache that is read-only or full: the next start compares again, no more


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    _marker(path).unlink(missing_ok=True)


def _mark_used(path: Path) -> None:
    """Sets the access time, which mounts often leave alone; the modification time stays, it is the file's identity."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except (OSError, NotFoundError):
        return  # somebody else's cache, read-only: it then ages, no more
