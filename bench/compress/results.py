"""docs/compression-results.json: every figure of compression with the command that gives it, sorted by id."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path("docs/compression-results.json")
KEYS = ("id", "what", "value", "goal", "bytes", "seconds", "command", "date", "note")


def record(entry: Mapping[str, Any], file: Path = FILE) -> None:
    """Puts a measurement in the place of the one with its id; `date` is today's where it is not given."""
    unknown = sorted(set(entry) - set(KEYS))
    if unknown or not entry.get("id"):
        raise ValueError(f"an entry has an id and keys of {KEYS}, not {unknown}")
    kept = json.loads(file.read_text()) if file.exists() else []
    full = {"date": time.strftime("%Y-%m-%d"), **entry}
    entries = [one for one in kept if one["id"] != entry["id"]] + [{key: full.get(key) for key in KEYS}]
    entries.sort(key=lambda one: str(one["id"]))
    file.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
