"""File contents by their sha256: put once, never changed, deleted only when nothing names them.

Knows bytes, digests and durability; does not know models, names or formats.

    put:    source -> tmp/RANDOM (hashed on the way) -> fsync -> rename to blobs/sha256-DIGEST
    flush:  fsync of the folder: names put before it survive a power cut; then the catalog may name them
    sweep:  whatever no version names, and whatever a killed process left in tmp

A blob has its name only once all its bytes are on disk, so a kill at any moment leaves whole blobs and,
in tmp, leftovers. Sweeping excludes putting by `store.lock`.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from inhouse.core.errors import CapacityError, FormatError, NotFoundError
from inhouse.core.progress import Progress, silent
from inhouse.store.writing import sync_folder

PREFIX = "sha256-"
CHUNK = 1 << 20
READ_ONLY = 0o400
SPARE_BYTES = 16 << 20  # left free beyond what is to be written, so that the catalog can still be written
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FICLONE = 0x40049409  # ioctl: share the blocks of another file until either is written to (linux/fs.h)

# copy: an independent file. link: a second name for the user's own file (saves space; an edit there damages
# the blob, which `verify` finds). move: the source is ours and is consumed.
How = Literal["copy", "link", "move"]


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored content: its sha256 in hexadecimal and its size in bytes; `new` if this put brought it."""

    digest: str
    size: int
    new: bool = False


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep took away."""

    blobs: int
    leftovers: int
    nbytes: int


class Blobs:
    """The blobs of one store. All methods may be called by many threads and processes at once, except that
    `put_file` and `put_bytes` must run under the shared lock and `sweep` under the exclusive one."""

    def __init__(self, folder: Path, tmp: Path) -> None:
        self._folder = folder
        self._tmp = tmp

    def path(self, digest: str) -> Path:
        """Where the content lies, whether it is there or not. Raises FormatError for what is no digest."""
        if not _DIGEST.fullmatch(digest):
            raise FormatError(f"{digest[:80]!r} is not a sha256 in hexadecimal")
        return self._folder / f"{PREFIX}{digest}"

    def __iter__(self) -> Iterator[str]:
        """Digests of all blobs, in no particular order."""
        for entry in list(os.scandir(self._folder)):
            if entry.name.startswith(PREFIX) and _DIGEST.fullmatch(entry.name[len(PREFIX) :]):
                yield entry.name[len(PREFIX) :]

    def __contains__(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        """Bytes of a blob as it lies on disk. Raises NotFoundError."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            raise NotFoundError(
                f"the store has no content {PREFIX}{digest[:12]}...", remedy="Import the model again."
            ) from None

    def put_file(
        self, source: Path, *, how: How = "copy", expect: str | None = None, progress: Progress = silent
    ) -> Blob:
        """Takes the content of a regular file in; a content that is there already costs no space.

        Raises:
            NotFoundError: no such file.
            FormatError: `expect` is another sha256 than the content's, or the file changed while it was read.
            CapacityError: the disk is full.
        """
        before = _identity(source)
        size = before[2]
        if self._has_size(size):
            digest = hash_file(source, progress)
            _check_digest(source, digest, expect)
            if self._is_whole(digest):
                if how == "move":
                    source.unlink()
                return Blob(digest, size)
        ours = how == "move" and _same_device(source, self._tmp)
        temporary = source if ours else self._tmp / secrets.token_hex(16)
        try:
            digest = self._bring(source, temporary, how, progress)
            _check_digest(source, digest, expect)
            if _identity(source) != before or temporary.stat().st_size != size:
                raise FormatError(f"{source} changed while it was read", remedy="Import it again.")
            new = self._settle(temporary, digest)
        except OSError as error:
            raise _disk_error(error, source.name, size, self._folder) from None
        finally:
            if not ours:
                temporary.unlink(missing_ok=True)
        if how == "move" and not ours:
            source.unlink()
        return Blob(digest, size, new)

    def put_bytes(self, data: bytes) -> Blob:
        """Takes a content from memory in. Raises CapacityError if the disk is full."""
        digest = hashlib.sha256(data).hexdigest()
        if self._is_whole(digest):
            return Blob(digest, len(data))
        temporary = self._tmp / secrets.token_hex(16)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                _make_durable(file)
            return Blob(digest, len(data), self._settle(temporary, digest))
        except OSError as error:
            raise _disk_error(error, "a file", len(data), self._folder) from None
        finally:
            temporary.unlink(missing_ok=True)

    def flush(self) -> None:
        """Makes the names of all contents put so far survive a power cut; to be called before they are recorded."""
        sync_folder(self._folder)

    def verify(self, digest: str, *, size: int | None = None, progress: Progress = silent) -> None:
        """Reads a blob whole. Raises NotFoundError, or FormatError if it is not what its name says."""
        found = self.size(digest)
        if size is not None and found != size:
            raise FormatError(
                f"content {digest[:12]}... has {found} bytes on disk, {size} were stored",
                remedy="The file was cut or overwritten; import the model again.",
            )
        actual = hash_file(self.path(digest), progress, f"verify {digest[:12]}")
        if actual != digest:
            raise FormatError(
                f"content {digest[:12]}... hashes to {actual[:12]}... now",
                remedy="The file was changed or the disk is failing; import the model again.",
            )

    def sweep(self, live: Collection[str], *, grace_s: float = 0.0) -> Swept:
        """Deletes blobs that `live` does not name and that are older than `grace_s`, and all leftovers.

        The caller holds the exclusive lock and read `live` under it: nothing is being put meanwhile.
        """
        oldest = time.time() - grace_s
        blobs = leftovers = nbytes = 0
        for digest in list(self):
            if digest in live:
                continue
            path = self.path(digest)
            found = path.stat()
            if found.st_mtime <= oldest:
                path.unlink()
                blobs, nbytes = blobs + 1, nbytes + found.st_size
        for leftover in list(os.scandir(self._tmp)):
            nbytes += leftover.stat(follow_symlinks=False).st_size
            remove_tree(Path(leftover.path))
            leftovers += 1
        self.flush()
        return Swept(blobs, leftovers, nbytes)

    def check_space(self, needed: int) -> None:
        """Raises CapacityError, with both numbers, if the disk has no room for `needed` bytes."""
        free = shutil.disk_usage(self._folder).free
        if needed + SPARE_BYTES > free:
            raise CapacityError(
                f"{needed} bytes are to be stored, {free} are free at {self._folder} ({SPARE_BYTES} are kept spare)",
                remedy="Remove models that are no longer used, or set INHOUSE_HOME to a larger disk.",
                needed=needed,
                free=free,
            )

    def _has_size(self, size: int) -> bool:
        return any(entry.stat().st_size == size for entry in list(os.scandir(self._folder)))

    def _is_whole(self, digest: str) -> bool:
        """Whether the content is there and undamaged; a damaged one is to be put again and so mended."""
        try:
            self.verify(digest)
        except (NotFoundError, FormatError):
            return False
        return True

    def _bring(self, source: Path, target: Path, how: How, progress: Progress) -> str:
        """Makes `target` (the source itself, if it is to be moved) hold the bytes, durably; returns their sha256."""
        if target != source and not (how == "link" and _try_link(source, target)):
            return _copy(source, target, progress)
        digest = hash_file(target, progress)
        with open(target, "rb") as file:
            if target == source:
                os.fchmod(file.fileno(), READ_ONLY)
            os.fsync(file.fileno())
        return digest

    def _settle(self, temporary: Path, digest: str) -> bool:
        """Gives a durable file its name; True if the name was free."""
        final = self.path(digest)
        new = not final.exists()
        os.replace(temporary, final)
        return new


def hash_file(path: Path, progress: Progress = silent, stage: str = "") -> str:
    """sha256 of a file, hexadecimal; reports bytes. Raises NotFoundError or FormatError."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            total, done = os.fstat(file.fileno()).st_size, 0
            buffer = memoryview(bytearray(CHUNK))
            while count := file.readinto(buffer[: max(0, total - done)]):
                digest.update(buffer[:count])
                done += count
                progress(stage or f"hash {path.name}", done, total)
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}", remedy="Check the path.") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _copy(source: Path, target: Path, progress: Progress) -> str:
    """Copies (sharing blocks where the file system can) and hashes what was written."""
    with open(source, "rb") as reader, open(target, "xb") as writer:
        if _clone(reader.fileno(), writer.fileno()):
            digest = hash_file(target, progress, f"hash {source.name}")
        else:
            digest = _pump(reader, writer, progress, f"store {source.name}")
        _make_durable(writer)
    return digest


def _pump(reader: BinaryIO, writer: BinaryIO, progress: Progress, stage: str) -> str:
    digest = hashlib.sha256()
    total, done = os.fstat(reader.fileno()).st_size, 0
    while chunk := reader.read(
        min(CHUNK, total - done)
    ):  # no more than it had: a file that grows must not fill the disk
        digest.update(chunk)
        writer.write(chunk)
        done += len(chunk)
        progress(stage, done, total)
    return digest.hexdigest()


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def _make_durable(file: BinaryIO) -> None:
    file.flush()
    os.fchmod(file.fileno(), READ_ONLY)
    os.fsync(file.fileno())


def _try_link(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)
    except OSError:
        return False  # another file system, or one without hard links: a copy serves as well
    return True


def _same_device(source: Path, folder: Path) -> bool:
    return source.stat().st_dev == folder.stat().st_dev and not source.is_symlink()


def _identity(path: Path) -> tuple[int, int, int, int]:
    """(device, inode, bytes, mtime in ns) of a regular file."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"there is no file {path}", remedy="Check the path.") from None
    if not path.is_file():
        raise FormatError(f"{path} is not a regular file")
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _check_digest(source: Path, digest: str, expect: str | None) -> None:
    if expect is not None and digest != expect:
        raise FormatError(
            f"{source.name} hashes to {digest[:16]}..., {expect[:16]}... was expected",
            remedy="Fetch the file again.",
            param=source.name,
        )


def _disk_error(error: OSError, name: str, size: int, folder: Path) -> CapacityError | FormatError:
    free = shutil.disk_usage(folder).free
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CapacityError(f"the disk is full: {name} has {size} bytes, {free} are free", remedy="Make room.")
    return FormatError(f"{name} cannot be stored: {error.strerror}")


def remove_tree(path: Path) -> None:
    """Deletes a file, a link or a folder with all in it, as far as that is possible; none there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
