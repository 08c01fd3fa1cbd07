"""What a run has finished: one line of JSON a unit, written after the unit's files are safely on disk.

Knows lines, fsync and blobs (immutable numbered files beside the journal); does not know what a unit is. A line that a
kill cut short does not count, and blobs that no line names are removed when the run is opened again.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import CapacityError, FormatError
from inhouse.store.writing import sync_folder

JOURNAL, DATA = "journal.jsonl", "data"
HASH_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Blob:
    """An immutable file of the run."""

    file: str
    nbytes: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        return {"file": self.file, "nbytes": self.nbytes, "sha256": self.sha256}


class Journal:
    """The journal of one run folder. Opening replays it; one process at a time may hold it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / DATA
        self.data.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = folder / JOURNAL
        self.lines: list[dict[str, Any]] = self._replay()
        self._next = 1 + max((int(path.stem) for path in self.data.glob("*.bin")), default=0)
        self._unsynced: list[Path] = []

    def write(self, pieces: Iterable[npt.NDArray[Any]]) -> Blob:
        """A new blob of these arrays' bytes, one after the other. It counts once a line that names it is appended.

        Raises CapacityError where the disk is full; what the run had is untouched."""
        path = self.data / f"{self._next:08d}.bin"
        self._next += 1
        digest, size = hashlib.sha256(), 0
        with disk_room(path):
            with open(path, "xb") as file:
                for piece in pieces:
                    raw = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
                    file.write(raw)
                    digest.update(raw)
                    size += raw.nbytes
        self._unsynced.append(path)
        return Blob(path.name, size, digest.hexdigest())

    def append(self, line: Mapping[str, Any]) -> None:
        """Syncs the blobs written since the last line, then adds this one. Raises CapacityError where the disk is
        full."""
        for path in self._unsynced:
            if path.exists():
                with disk_room(path), open(path, "rb") as file:
                    os.fsync(file.fileno())
        if self._unsynced:
            sync_folder(self.data)
        self._unsynced = []
        text = json.dumps(line, separators=(",", ":"), ensure_ascii=False) + "\n"
        fresh = not self._path.exists()
        size = 0 if fresh else self._path.stat().st_size
        try:
            with disk_room(self._path), open(self._path, "ab") as file:
                write_all(file, text.encode())
        except BaseException:
            if not fresh and self._path.stat().st_size > size:
                os.truncate(self._path, size)
            raise
        if fresh:
            sync_folder(self.folder)
        self.lines.append(dict(line))

    def check(self, blob: Mapping[str, Any]) -> None:
        """Raises FormatError if the file is not what the journal says."""
        path = self.data / str(blob["file"])
        if not path.is_file() or path.stat().st_size != blob["nbytes"] or _hash(path) != blob["sha256"]:
            raise FormatError(
                f"{path.name} of the run is not what its journal says",
                remedy="Begin anew with --restart",
                param=path.name,
            )

    def sweep(self, keep: Iterable[str]) -> None:
        """Removes every blob but these."""
        kept = set(keep)
        for path in self.data.iterdir():
            if path.name not in kept:
                path.unlink()

    def remove(self, files: Iterable[str]) -> None:
        """Removes these blobs."""
        for name in files:
            (self.data / name).unlink(missing_ok=True)

    def _replay(self) -> list[dict[str, Any]]:
        """The lines that count; what follows the last whole one is cut off."""
        if not self._path.exists():
            return []
        raw = self._path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        lines: list[dict[str, Any]] = []
        for number, text in enumerate(whole.splitlines(), 1):
            try:
                lines.append(json.loads(text))
            except ValueError:
                raise FormatError(
                    f"line {number} of the run's journal is damaged", remedy="Begin anew with --restart"
                ) from None
        if len(whole) < len(raw):
            os.truncate(self._path, len(whole))
        return lines


def write_all(file: IO[bytes], raw: bytes) -> None:
    """Writes and syncs."""
    file.write(raw)
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def disk_room(path: Path) -> Any:  # Iterator[None]; Any keeps the decorated type plain
    """A full disk as a CapacityError; the file that was being written goes, unless it is the journal."""
    try:
        yield
    except OSError as error:
        if path.name != JOURNAL:
            path.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapacityError(
                f"the disk is full: {path.name} could not be written under {path.parent}",
                remedy="Make room, then go on with --resume; finished units are kept",
            ) from error
        raise


def blobs_of(lines: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of all blobs that these lines mention, wherever they stand in them."""
    found: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, Mapping):
            if "sha256" in value and "file" in value:
                found.add(str(value["file"]))
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(list(lines))
    return found


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(HASH_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
