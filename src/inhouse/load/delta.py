"""Deltas between models as users name them: made from two versions, applied to one, the result a version of the store.

Knows references, the store and the importer; the file itself is `store.delta`'s. What comes out is verified as any
import is, on top of its digests, so that a delta can bring nothing that an import could not.
"""

import tempfile
from pathlib import Path

from inhouse.core.errors import NotFoundError
from inhouse.core.progress import Progress, silent
from inhouse.load.importer import Imported, import_model
from inhouse.load.locate import Located, locate, relative
from inhouse.store.blobs import hash_file
from inhouse.store.delta import Delta, FileSet, Made, make_delta
from inhouse.store.refs import check_name
from inhouse.store.store import Store
from inhouse.store.version import StoredFile, files_digest


def make(old: str, new: str, path: Path, *, store: Store, lossy: bool = False, progress: Progress = silent) -> Made:
    """Writes the delta from model `old` to model `new` (names of the store, folders or files).

    Raises NotFoundError, FormatError (a version is damaged), CapacityError.
    """
    base, target = _file_set(locate(old, store.home), progress), locate(new, store.home)
    about = {"name": target.name, "from": old, "to": new}
    return make_delta(base, _file_set(target, progress), path, about, lossy=lossy, progress=progress)


def apply(old: str, path: Path, name: str, *, store: Store, progress: Progress = silent) -> Imported:
    """Makes the version that a delta file promises from `old`, and imports it as `name`; all or nothing.

    Raises:
        FormatError: the delta is damaged, was made from another version, or the result is no sound model; the store is
            as it was. NotFoundError: no such file or model. CapacityError: disk space, before anything is written.
    """
    check_name(name)
    if not path.is_file():
        raise NotFoundError(f"there is no delta file {path}", remedy="Check the path.", param="file")
    delta = Delta(path)
    try:
        located = locate(old, store.home)
        base = _file_set(located, progress)
        store.blobs.check_space(delta.new_nbytes)
        parent = f"{located.name}:{located.version}" if located.version else None
        with tempfile.TemporaryDirectory(prefix="delta-", dir=store.home.tmp) as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            delta.apply(base, folder, progress)
            ggufs = sorted(folder.glob("*.gguf"))
            how = f"delta {path.name}{' (lossy)' if delta.lossy else ''}"
            return import_model(
                ggufs[0] if ggufs else folder, name, store=store, how="move", origin=f"{old} + {path.name}",
                parent=parent, derived=how if parent else None, progress=progress,
            )  # fmt: skip
    finally:
        delta.close()


def _file_set(located: Located, progress: Progress) -> FileSet:
    """The files of a model with their digests: those of the store by name, hashed anew because a blob that was damaged
    on disk must not pass for what it was."""
    files = {relative(file, located.path): file for file in located.files}
    hashed = {name: (file.resolve(), hash_file(file, progress)) for name, file in files.items()}
    stored = [StoredFile(name, digest, file.stat().st_size) for name, (file, digest) in hashed.items()]
    return FileSet(files_digest(stored), hashed)
