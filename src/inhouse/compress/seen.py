"""Which texts a model was calibrated or healed on, and whether a text to be scored is among them.

A document is known by its sha256 and by hashes of runs of four consecutive sentences, so that an excerpt, or a file
that contains it, is found as well. Pure but for asking models and their parents (`load.seen_texts`).
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from inhouse.core.errors import UsageError
from inhouse.load.seen_texts import seen_by
from inhouse.store.home import Home

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


def refuse_seen(reference: str, documents: Sequence[str], force: bool = False, home: Home | None = None) -> str | None:
    """Raises UsageError if the model, or one that it was made of, has seen one of the documents; with `force` gives
    the sentence instead."""
    for name, records in seen_by(reference, home):
        found = find_seen(documents, records)
        if found is not None:
            said = f"{name} was calibrated or healed on this text ({found['source']})"
            if force:
                return said
            raise UsageError(said, remedy="Score it on text that it has not seen, or add --force", param="text")
    return None
