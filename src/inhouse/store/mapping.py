"""A file as read-only memory, and tensors as named ranges of such memory.

Knows bytes and offsets; does not know any format. A range is checked when its source is opened, so that
reading a tensor afterwards is a slice. A file that is cut short while mapped makes the CPU fault on access
(SIGBUS): the native library guards the ranges given by `Mapping.address_ranges()`.
"""

import contextlib
import mmap
import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as MappingType
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, NotFoundError, UsageError
from inhouse.core.tensors import TensorInfo

Bytes = npt.NDArray[np.uint8]
HUGE_BYTES = 4 << 20  # from here on huge pages are asked for: a pass over all weights then misses fewer translations


class Mapping:
    """One regular file mapped read-only; mapped when `data` is first asked for, thread-safe.

    Attributes: `path`, `size` (bytes), `identity` (device, inode, mtime in ns), all taken at construction.
    """

    def __init__(self, path: Path) -> None:
        """Raises NotFoundError (no such file) or FormatError (not a regular file, or not readable)."""
        self.path = path
        found = _stat(path)
        self.size = found.st_size
        self.identity = (found.st_dev, found.st_ino, found.st_mtime_ns)
        self._data: Bytes | None = None
        self._closed = False
        self._lock = threading.Lock()

    @property
    def data(self) -> Bytes:
        """The whole file, uint8[size], read-only. Raises FormatError if the file changed since construction,
        UsageError after `close`."""
        with self._lock:
            if self._closed:
                raise UsageError(f"{self.path.name} was closed", remedy="Open the source again.")
            if self._data is None:
                self._data = self._map()
            return self._data

    def _map(self) -> Bytes:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise FormatError(f"{self.path} cannot be opened: {error.strerror}") from None
        try:
            self._require_same(os.fstat(descriptor))
            if self.size == 0:
                return _frozen(np.zeros(0, np.uint8))
            mapped = mmap.mmap(descriptor, self.size, access=mmap.ACCESS_READ)
            if self.size >= HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a kernel without huge pages: the pages are small then
                    mapped.madvise(mmap.MADV_HUGEPAGE)
            return np.frombuffer(mapped, np.uint8)
        except OSError as error:
            raise FormatError(f"{self.path} cannot be mapped: {error.strerror}") from None
        finally:
            os.close(descriptor)

    def address_ranges(self) -> list[tuple[int, int]]:
        """(address, bytes) of the mapped memory, for a fault guard; empty for an empty file."""
        return [(self.data.ctypes.data, self.size)] if self.size else []

    def check_unchanged(self) -> None:
        """Raises FormatError if the file at `path` is no longer the one that was mapped."""
        self._require_same(_stat(self.path))

    def _require_same(self, found: os.stat_result) -> None:
        if found.st_size != self.size or (found.st_dev, found.st_ino, found.st_mtime_ns) != self.identity:
            raise FormatError(
                f"{self.path.name} changed while in use: {self.size} bytes before, {found.st_size} now",
                remedy="Leave model files alone while they are served; import the model again.",
            )

    def close(self) -> None:
        """Drops our hold; the memory is unmapped when the last array over it is collected."""
        with self._lock:
            self._closed = True
            self._data = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor and where its bytes are: `info.nbytes` bytes at `offset` of `mapping`."""

    info: TensorInfo
    mapping: Mapping
    offset: int


class MappedSource:
    """A TensorSource over checked entries; the readers of safetensors and GGUF end in one of these."""

    def __init__(
        self, kind: str, entries: MappingType[str, Entry], mappings: Sequence[Mapping], metadata: MappingType[str, Any]
    ) -> None:
        self._format = kind
        self._entries = entries
        self.mappings = tuple(mappings)
        self._metadata = MappingProxyType(dict(metadata))

    @property
    def format(self) -> str:
        """`safetensors`, `gguf` or `torch`."""
        return self._format

    @property
    def metadata(self) -> MappingType[str, Any]:
        """Key-value metadata of the checkpoint, read-only."""
        return self._metadata

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that hold the tensors, in shard order."""
        return tuple(mapping.path for mapping in self.mappings)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def info(self, name: str) -> TensorInfo:
        """Raises NotFoundError if there is no such tensor."""
        return self._entry(name).info

    def raw(self, name: str) -> Bytes:
        """The tensor's bytes, uint8[nbytes], read-only, a view of the mapping. Raises NotFoundError."""
        entry = self._entry(name)
        return entry.mapping.data[entry.offset : entry.offset + entry.info.nbytes]

    def place(self, name: str) -> tuple[Path, int]:
        """The file that holds a tensor and the offset of its first byte there. Raises NotFoundError."""
        entry = self._entry(name)
        return entry.mapping.path, entry.offset

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise NotFoundError(f"the checkpoint has no tensor {name!r}", param=name)
        return entry

    def close(self) -> None:
        """Drops the mappings; arrays handed out before stay valid until they are collected."""
        for mapping in self.mappings:
            mapping.close()


def first_overlap(ranges: Sequence[tuple[int, int, str]]) -> tuple[str, str] | None:
    """The names of two (begin, end, name) ranges that share a byte, or None; empty ranges overlap nothing."""
    reach, owner = 0, ""
    for begin, end, name in sorted(item for item in ranges if item[0] < item[1]):
        if begin < reach:
            return owner, name
        reach, owner = end, name
    return None


def forget_pages(path: Path) -> None:
    """Has the kernel drop its cached pages of a file just written: what `write` left are small pages, and only pages
    that a huge mapping reads in are huge. Does nothing where files have no huge pages."""
    if path.stat().st_size < HUGE_BYTES or not _files_have_huge_pages():
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _files_have_huge_pages() -> bool:
    """Whether mapped files may have them: Linux 6.16 and later (ext4), unless switched off."""
    try:
        switch = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return "[never]" not in switch and release is not None and (int(release[1]), int(release[2])) >= (6, 16)


def _stat(path: Path) -> os.stat_result:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"there is no file {path}", remedy="Check the path.") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {error}", remedy="Check the path.") from None
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{path} is not a regular file", remedy="Name a model file or folder.")
    return found


def _frozen(array: Bytes) -> Bytes:
    array.flags.writeable = False
    return array
