"""Which texts a model was calibrated or healed on, and whether a text to be scored is among them.

A document is known by its sha256 and by hashes of runs of four consecutive sentences, so that an excerpt, or a file
that contains it, is found as well. Pure but for reading manifests of stored versions and their parents.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from inhouse.core.errors import NotFoundError, UsageError
from inhouse.load.locate import locate
from inhouse.store.home import Home
from inhouse.store.store import Store
from inhouse.store.stored_model import TABLE

SENTENCES = 4  # of a window: fewer recur in texts of one kind
LEAST, MOST, SHARE = 32, 1024, 8  # hashes kept of a document: an eighth of its windows, within these
_ENDS = re.compile(r"(?<=[.!?。！？])\s*|\n+")


def document_hash(text: str) -> str:
    """sha256 of a document without the white space around it."""
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).hexdigest()


def windows(text: str) -> set[str]:
    """16 hex digits of every run of SENTENCES sentences, white space evened out."""
    parts = [" ".join(part.split()) for part in _ENDS.split(text)]
    parts = [part for part in parts if part]
    runs = (" ".join(parts[i : i + SENTENCES]) for i in range(len(parts) - SENTENCES + 1))
    return {hashlib.sha256(run.encode("utf-8", "surrogatepass")).hexdigest()[:16] for run in runs}


def text_record(source: str, text: str) -> dict[str, Any]:
    """What a manifest keeps of a document that a model has seen."""
    every = sorted(windows(text))
    kept = every[: min(MOST, max(LEAST, len(every) // SHARE))]
    return {"source": source, "sha256": document_hash(text), "characters": len(text), "windows": kept}


def find_seen(documents: Iterable[str], records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The record of a document that one of these is, contains, or is a part of; None if there is none."""
    whole = {str(record["sha256"]): record for record in records}
    parts = {str(window): record for record in records for window in record.get("windows", ())}
    for document in documents:
        found = whole.get(document_hash(document))
        if found is None and parts:
            hit = next((window for window in windows(document) if window in parts), None)
            found = parts[hit] if hit is not None else None
        if found is not None:
            return found
    return None


def manifests(reference: str, home: Home | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, manifest) of a model and of the versions that it was made of, as far as they are there."""
    home = home or Home.find()
    visited: set[str] = set()
    while reference not in visited:
        visited.add(reference)
        try:
            located = locate(reference, home)
        except (NotFoundError, UsageError):
            return
        document = _manifest(located.path)
        if document is not None:
            yield (f"{located.name}:{located.version}" if located.version else located.name), document
        if not located.version:
            return
        with Store(home) as store:
            parent = store.catalog.resolve(f"{located.name}:{located.version}").parent
        if parent is None:
            return
        reference = parent


def refuse_seen(reference: str, documents: Sequence[str], force: bool = False, home: Home | None = None) -> str | None:
    """Raises UsageError if the model, or one that it was made of, has seen one of the documents; with `force` gives
    the sentence instead."""
    for name, document in manifests(reference, home):
        found = find_seen(documents, document.get("texts", ()))
        if found is not None:
            said = f"{name} was calibrated or healed on this text ({found['source']})"
            if force:
                return said
            raise UsageError(said, remedy="Score it on text that it has not seen, or add --force", param="text")
    return None


def _manifest(path: Path) -> Mapping[str, Any] | None:
    try:
        document = json.loads((path / TABLE).read_text("utf-8")) if path.is_dir() else None
    except (OSError, ValueError):
        return None
    found = document.get("manifest") if isinstance(document, dict) else None
    return found if isinstance(found, dict) else None
