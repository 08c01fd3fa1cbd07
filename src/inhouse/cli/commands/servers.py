"""The servers that run on this machine, as they announced themselves in the model home."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inhouse.store.home import Home


def run_folder() -> Path:
    """Where running servers keep the files that announce them."""
    return Home.find().data / "run"


def running() -> Iterator[dict[str, Any]]:
    """{pid, host, port, models, started} of each server that lives; files of dead ones are removed."""
    folder = run_folder()
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            entry = json.loads(file.read_text())
            alive = _is_server(int(entry["pid"]))
        except (OSError, ValueError, KeyError, TypeError):
            alive = False
        if alive:
            yield entry
        else:
            file.unlink(missing_ok=True)


def _is_server(pid: int) -> bool:
    """Whether that process lives and is one of ours (a pid may be used again after a crash)."""
    try:
        os.kill(pid, 0)
        return b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except PermissionError:
        return True
    except OSError:
        return False
