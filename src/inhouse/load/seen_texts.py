"""Which texts a checkpoint says it was calibrated or healed on, and how an export goes on saying so.

A checkpoint of our own has them in its manifest; an export carries them as one JSON string: `inhouse_seen` in the
`__metadata__` of safetensors, `inhouse.seen` in GGUF. What a record is, `compress.seen` says.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from inhouse.core.errors import InhouseError, NotFoundError, UsageError
from inhouse.load.locate import locate
from inhouse.store.home import Home
from inhouse.store.source import open_source
from inhouse.store.store import Store
from inhouse.store.stored_model import TABLE

SAFETENSORS_KEY, GGUF_KEY = "inhouse_seen", "inhouse.seen"
MOST_BYTES = 16 << 20  # of the string: above it, each document keeps fewer hashes of its parts
_PLAIN = {"source": str, "sha256": str, "characters": int}

Record = Mapping[str, Any]


def seen_by(reference: str, home: Home | None = None) -> Iterator[tuple[str, Sequence[Record]]]:
    """(name, records) of a model and of the versions that it was made of, as far as they are there."""
    home = home or Home.find()
    visited: set[str] = set()
    while reference not in visited:
        visited.add(reference)
        try:
            located = locate(reference, home)
        except (NotFoundError, UsageError):
            return
        records = records_of(located.path)
        if records:
            yield (f"{located.name}:{located.version}" if located.version else located.name), records
        if not located.version:
            return
        with Store(home) as store:
            parent = store.catalog.resolve(f"{located.name}:{located.version}").parent
        if parent is None:
            return
        reference = parent


def records_of(path: Path) -> list[Record]:
    """What one checkpoint says; [] where it says nothing, or is damaged (opening it tells)."""
    try:
        if path.is_dir() and (path / TABLE).is_file():
            manifest = json.loads((path / TABLE).read_text("utf-8"))["manifest"]
            return [record for record in manifest.get("texts", ()) if _is_record(record)]
        source = open_source(path)
        try:
            said = source.metadata.get(GGUF_KEY if source.format == "gguf" else SAFETENSORS_KEY)
        finally:
            source.close()
        return [_read(record) for record in json.loads(said)] if isinstance(said, str) else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InhouseError):
        return []


def seen_text(references: Sequence[str], home: Home | None = None) -> str:
    """The string that a file made of those models carries: "" where they have seen nothing. Of a source's path the
    file name alone, as the file leaves this machine."""
    found: dict[str, Record] = {}
    for reference in references:
        for _, records in seen_by(reference, home):
            found |= {str(record["sha256"]): record for record in records}
    most = max((len(record.get("windows", ())) for record in found.values()), default=0)
    while True:
        text = json.dumps([_written(record, most) for record in found.values()], separators=(",", ":"))
        if len(text) <= MOST_BYTES or not most:
            return text if found else ""
        most //= 2


def safetensors_metadata(seen: str) -> dict[str, str]:
    """`__metadata__` of a Hugging Face file with that string."""
    return {"format": "pt", **({SAFETENSORS_KEY: seen} if seen else {})}


def _written(record: Record, most: int) -> dict[str, Any]:
    plain = {key: record[key] for key in _PLAIN} | {"source": Path(str(record["source"])).name}
    return plain | {"windows": "".join(list(record.get("windows", ()))[:most])}


def _read(record: Record) -> Record:
    windows = record["windows"]
    if not _is_record(record):
        raise ValueError
    return {**record, "windows": [windows[at : at + 16] for at in range(0, len(windows), 16)]}


def _is_record(record: Any) -> bool:
    return isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in _PLAIN.items())
