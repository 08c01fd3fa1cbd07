"""What the catalog records of a version of a model.

Knows fields; does not know SQL, files or formats.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Summary:
    """What `list` and `show` say of a version without opening its files."""

    family: str = ""
    architecture: str = ""
    parameters: int = 0
    dtype: str = ""  # what most of its weights are stored as
    context: int = 0
    vocab: int = 0
    licence: str = ""
    gate: str = ""  # of a compressed model: "passed", "failed" or "measured"; a failed one is not promoted

    @classmethod
    def from_json(cls, text: str) -> "Summary":
        """Reads what the catalog keeps; fields of a newer Inhouse are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in json.loads(text).items() if key in known})


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a version: its path inside the model, its content and its size in bytes."""

    path: str
    blob: str
    size: int


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version of a model."""

    name: str
    number: int
    digest: str
    format: str
    summary: Summary
    origin: str
    created: str
    files: tuple[StoredFile, ...]
    aliases: tuple[str, ...] = ()
    parent: str | None = None  # its name when this version was made of it
    parent_digest: str | None = None
    how: str | None = None

    @property
    def ref(self) -> str:
        return f"{self.name}:{self.number}"

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """The machine-readable form that `--json` prints."""
        return {"ref": self.ref, "bytes": self.nbytes} | asdict(self)


@dataclass(frozen=True, slots=True)
class NewVersion:
    """What is to be recorded; its blobs are durable already."""

    name: str
    format: str
    files: Sequence[StoredFile]
    summary: Summary
    origin: str = ""
    parent: str | None = None  # a reference
    how: str | None = None


def files_digest(files: Sequence[StoredFile]) -> str:
    """sha256 over the sorted (path, content) pairs: equal for equal models, wherever they came from."""
    listing = sorted([file.path, file.blob] for file in files)
    return hashlib.sha256(json.dumps(listing, separators=(",", ":")).encode()).hexdigest()
