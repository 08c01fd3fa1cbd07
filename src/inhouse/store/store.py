"""The store: contents by digest and the catalog of versions made of them, kept in step.

Knows the order that makes a kill harmless (contents first, then one catalog transaction; forgetting first, then
deleting contents); does not know what the files of a model mean.
"""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from inhouse.core.errors import CapacityError, FormatError, InhouseError, UnavailableError
from inhouse.core.progress import Progress, silent
from inhouse.store import lock
from inhouse.store.blobs import PREFIX, Blobs, How, Swept, remove_tree
from inhouse.store.catalog import Catalog
from inhouse.store.home import PRIVATE, Home
from inhouse.store.version import NewVersion, StoredFile, Version

DEFAULT_GRACE_S = 3600.0
MAX_PATH_BYTES = 512


@dataclass(frozen=True, slots=True)
class Added:
    """A version, and whether this call brought it or it was there already."""

    version: Version
    new: bool


class Store:
    """One model home. May be used by several threads and processes at once; `close` when done."""

    def __init__(self, home: Home | None = None) -> None:
        """Opens the home, creating what lacks. Raises UnavailableError, FormatError, UnsupportedError."""
        self.home = home or Home.find()
        self.home.create()
        self.blobs = Blobs(self.home.blobs, self.home.tmp)
        self.catalog = Catalog(self.home.catalog)

    def close(self) -> None:
        """Closes the catalog."""
        self.catalog.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def add(
        self,
        new: NewVersion,
        sources: Sequence[tuple[str, Path]],
        *,
        how: How = "copy",
        confirm: Callable[[], None] | None = None,
        progress: Progress = silent,
    ) -> Added:
        """Takes files in and records them as a version: (path inside the model, file on disk) each.

        `new.files` may already name contents that the store has (a child that shares files with its parent).
        `confirm` is called between the two: it may raise to stop the version from being recorded.
        Raises CapacityError (disk space, with both numbers, before anything is written), FormatError (a file
        changed meanwhile, a path leaves the model), and what `Catalog.add_version` raises. After an error the
        store is as it was.
        """
        for path, _ in sources:
            check_inner_path(path)
        if how == "copy":
            self.blobs.check_space(sum(source.stat().st_size for _, source in sources))
        try:
            with lock.shared(self.home.lock):
                stored = list(new.files)
                for path, source in sources:
                    blob = self.blobs.put_file(source, how=how, progress=progress)
                    stored.append(StoredFile(path, blob.digest, blob.size))
                self.blobs.flush()
                if confirm is not None:
                    confirm()
                version, fresh = self.catalog.add_version(replace(new, files=tuple(stored)))
        except BaseException:
            self._try_sweep()
            raise
        return Added(version, fresh)

    def folder(self, version: Version) -> Path:
        """A folder that shows the version's files under their own names; made when first asked for, and made
        anew if it is not what it should be.

        Raises NotFoundError or FormatError if a content is missing or has another size than was stored,
        UnavailableError if the folder cannot be made.
        """
        view = self.home.views / version.digest
        for file in version.files:
            found = self.blobs.size(file.blob)
            if found != file.size:
                raise FormatError(
                    f"{version.ref}: {file.path} has {found} bytes, {file.size} were stored",
                    remedy="The content was damaged; import the model again.",
                    param=file.path,
                )
        if not self._is_whole(version, view):
            with lock.shared(self.home.lock):
                self._make_view(version, view)
        return view

    def _is_whole(self, version: Version, view: Path) -> bool:
        return view.is_dir() and not self._view_faults(version, view)

    def _view_faults(self, version: Version, view: Path) -> list[str]:
        """Paths in the view that lack, that are no link to the right content, or that are none of the version's."""
        wanted = {file.path: self._link_target(file) for file in version.files}
        found = _links(view)
        return sorted(path for path in wanted.keys() | found.keys() if wanted.get(path, "") != found.get(path, ""))

    def _link_target(self, file: StoredFile) -> str:
        up = "../" * (2 + len(PurePosixPath(file.path).parts) - 1)
        return f"{up}{self.home.blobs.name}/{PREFIX}{file.blob}"

    def _make_view(self, version: Version, view: Path) -> None:
        temporary, old = (self.home.tmp / secrets.token_hex(16) for _ in range(2))
        try:
            temporary.mkdir(mode=PRIVATE)
            for file in version.files:
                link = temporary / check_inner_path(file.path)
                link.parent.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
                link.symlink_to(self._link_target(file))
            if os.path.lexists(view) and not self._is_whole(version, view):
                os.rename(view, old)
            os.rename(temporary, view)
        except OSError as error:
            if not self._is_whole(version, view):  # else another process made it meanwhile
                raise UnavailableError(
                    f"{version.ref}: its folder {view} cannot be made: {error.strerror}",
                    remedy="Check the disk and its permissions.",
                ) from None
        finally:
            remove_tree(temporary)
            remove_tree(old)

    def verify(self, version: Version, progress: Progress = silent) -> None:
        """Reads every file of a version whole. Raises NotFoundError or FormatError naming what is damaged."""
        for file in version.files:
            self.blobs.verify(file.blob, size=file.size, progress=progress)

    def remove(self, ref: str, *, force: bool = False) -> tuple[list[Version], Swept | None]:
        """Forgets versions as `Catalog.remove` does and frees what only they used.

        The second value is None where another process is adding just now; a later sweep frees the space.
        """
        removed = self.catalog.remove(ref, force=force)
        return removed, self._try_sweep()

    def sweep(self, *, grace_s: float = DEFAULT_GRACE_S, timeout_s: float = 60.0) -> Swept:
        """Deletes contents that no version names (those younger than `grace_s` are spared), what killed
        processes left, and views of versions that are gone. Raises CapacityError while another process is adding.
        """
        with lock.exclusive(self.home.lock, timeout_s):
            live = self.catalog.live_digests()
            for view in list(self.home.views.iterdir()):
                if view.name not in live:
                    shutil.rmtree(view, ignore_errors=True)
            return self.blobs.sweep(self.catalog.live_blobs(), grace_s=grace_s)

    def _try_sweep(self) -> Swept | None:
        try:
            return self.sweep(grace_s=0.0, timeout_s=0.0)
        except CapacityError:
            return None

    def check(self, *, deep: bool = False, progress: Progress = silent) -> list[str]:
        """What is wrong with the store, one sentence each; empty if it is whole. `deep` reads every content."""
        problems = self.catalog.check()
        for version in self.catalog.versions():
            for file in version.files:
                try:
                    if deep:
                        self.blobs.verify(file.blob, size=file.size, progress=progress)
                    elif self.blobs.size(file.blob) != file.size:
                        problems.append(f"{version.ref}: {file.path} does not have its {file.size} bytes")
                except InhouseError as error:
                    problems.append(f"{version.ref}: {file.path}: {error.message}")
            problems += self._check_view(version)
        return problems

    def _check_view(self, version: Version) -> list[str]:
        view = self.home.views / version.digest
        if not os.path.lexists(view) or self._is_whole(version, view):  # it is derived, and need not be there
            return []
        faults = ", ".join(self._view_faults(version, view)) or "it is no folder"
        return [f"{version.ref}: its folder in views is damaged ({faults}); opening the model makes it anew"]

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Held while contents are put that a version will name only later; keeps a sweep out."""
        with lock.shared(self.home.lock):
            yield

    def download_folder(self, key: str) -> Path:
        """Where the partly fetched files of one download are kept; old ones of other downloads are removed."""
        month_ago = time.time() - 30 * 86400
        for entry in self.home.downloads.iterdir():
            if entry.name != key and entry.stat().st_mtime < month_ago:
                shutil.rmtree(entry, ignore_errors=True)
        folder = self.home.downloads / key
        folder.mkdir(mode=PRIVATE, exist_ok=True)
        return folder


def _links(view: Path) -> dict[str, str | None]:
    """What lies in a view: path -> where the link points, None for what is no link. Empty if it is no folder."""
    found: dict[str, str | None] = {}
    if view.is_symlink():
        return found
    for folder, folders, files in os.walk(view):
        for name in (*folders, *files):
            path = Path(folder, name)
            inner = path.relative_to(view).as_posix()
            if path.is_symlink():
                found[inner] = os.readlink(path)
            elif name in files:
                found[inner] = None
    return found


def check_inner_path(path: str) -> str:
    """The path itself, if it stays inside its model. Raises FormatError if it does not."""
    parts = path.split("/")
    bad = (
        not path
        or len(path.encode("utf-8", "surrogateescape")) > MAX_PATH_BYTES
        or any(part in ("", ".", "..") or part.startswith(".") for part in parts)
        or any(ord(character) < 32 or character in '\\:*?"<>|' for character in path)
    )
    if bad:
        raise FormatError(f"{path[:120]!a} cannot be the path of a model's file", remedy="Rename the file.", param=path)
    return path
