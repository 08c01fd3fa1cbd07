"""From what the user named to the files of a model: a reference in the store, a folder, a .gguf, or the demo.

Knows the order of looking; does not read weights.
"""

import difflib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from inhouse.core.errors import FormatError, NotFoundError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.store.blobs import hash_file
from inhouse.store.gguf import MAGIC
from inhouse.store.home import Home
from inhouse.store.refs import name_from
from inhouse.store.source import model_files, side_files
from inhouse.store.store import Store
from inhouse.store.version import StoredFile, Version, files_digest

_WEIGHT_ENDING = re.compile(r"(-\d{5}-of-\d{5})?\.(gguf|safetensors|bin|pt|pth)$")
DEMO = "demo"
DEMO_FOLDER = Path(__file__).resolve().parents[1] / "demo"


@dataclass(frozen=True, slots=True)
class Located:
    """A model's files, not yet read.

    `path` is a folder, or a single weight file; `identity` changes when any file of the model does.
    """

    name: str
    version: int
    path: Path
    files: tuple[Path, ...]
    identity: str
    digest: str | None  # known for stored versions, else found by `content_digest`


def locate(reference: str, home: Home | None = None) -> Located:
    """Finds a model: an existing path if it looks like one, else the store, else the embedded `demo`.

    A name that is both a path and a model means the model; write `./name` for the path.
    Raises NotFoundError with what may have been meant, UsageError, FormatError.
    """
    path = Path(reference).expanduser()
    if _looks_like_path(reference):
        if not path.exists():
            raise NotFoundError(f"there is no file or folder {reference}", remedy="Check the path.")
        return locate_path(path)
    found = _in_store(reference, home or Home.find())
    if isinstance(found, Located):
        return found
    if reference == DEMO and (DEMO_FOLDER / "config.json").is_file():
        return locate_path(DEMO_FOLDER, DEMO)
    if path.exists():
        return locate_path(path)
    if difflib.get_close_matches(reference, [DEMO], 1) and "Did you mean" not in found.remedy:
        found.remedy = f"Did you mean {DEMO}?"
    raise found


def locate_path(path: Path, name: str | None = None) -> Located:
    """A model outside the store. Raises NotFoundError or FormatError."""
    files = model_files(path)
    if path.is_file() and not _is_gguf(path):
        files += side_files(path.parent)  # only a GGUF says by itself what it is and how it spells
    title = name or name_from(_WEIGHT_ENDING.sub("", path.resolve().name))
    seen = [(relative(file, path), *_stamp(file)) for file in files]
    identity = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
    return Located(title, 0, path, tuple(files), f"path-{identity}", None)


def locate_version(store: Store, version: Version) -> Located:
    """A version of the store, shown under its own file names. Raises NotFoundError or FormatError if damaged."""
    folder = store.folder(version)
    weights = [file.path for file in version.files if file.path.endswith(".gguf")]
    path = folder / min(weights) if version.format == "gguf" and weights else folder
    files = tuple(folder / file.path for file in version.files)
    return Located(version.name, version.number, path, files, version.digest, version.digest)


def content_digest(located: Located, progress: Progress = silent) -> str:
    """The digest that the model has, or would have, in the store; reads the files if it is not known yet."""
    if located.digest is not None:
        return located.digest
    files = [
        StoredFile(relative(file, located.path), hash_file(file, progress), file.stat().st_size)
        for file in located.files
    ]
    return files_digest(files)


def relative(file: Path, path: Path) -> str:
    """The path of a file inside its model, as the store records it."""
    return file.relative_to(path if path.is_dir() else path.parent).as_posix()


def _in_store(reference: str, home: Home) -> Located | NotFoundError | UsageError:
    """The model, or why it is not in the store."""
    if not home.catalog.is_file() and reference == DEMO:
        return NotFoundError("there is no store yet")  # the demo must start at once, and writes nothing
    try:
        with Store(home) as store:
            return locate_version(store, store.catalog.resolve(reference))
    except (NotFoundError, UsageError) as error:
        return error


def _looks_like_path(reference: str) -> bool:
    if not reference or "\0" in reference:
        raise UsageError(f"{reference!r} is no model", remedy="Name a model of the store, a folder or a .gguf file.")
    return reference.startswith((".", "/", "~")) or reference.endswith((".gguf", ".safetensors", ".bin", ".pt"))


def _is_gguf(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC


def _stamp(file: Path) -> tuple[int, int, int, int]:
    try:
        found = os.stat(file)
    except OSError as error:
        raise FormatError(f"{file} cannot be read: {error.strerror}") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
