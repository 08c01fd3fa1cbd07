"""Run folders: where an unfinished compression waits, under the model home, one for each name that is being made.

    HOME/runs/NAME/run.json       what the run is: recipe, model, fingerprint, when it began
    HOME/runs/NAME/journal.jsonl  finished units; data/ their blobs; spill/ activations (derived)
    HOME/runs/NAME/result.json    of a finished run, whose blobs are gone: version, timing, peak memory, gate
    HOME/searches/NAME/           what a search for a recipe measured (`search`)

The rule: a finished run leaves its few kilobytes of result; an unfinished one stays until it is resumed or restarted,
or until `inhouse compress --clean`. Knows no recipes.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inhouse.compress.fingerprint import difference
from inhouse.compress.journal import DATA, JOURNAL
from inhouse.core.errors import ConflictError, NotFoundError, UsageError
from inhouse.store.home import Home, private_folder
from inhouse.store.refs import check_name
from inhouse.store.writing import atomic_file

RUN, RESULT, LOCK = "run.json", "result.json", "lock"
SEARCHES, MEASURED = "searches", "measured.json"


@dataclass(frozen=True, slots=True)
class RunState:
    """One line of the list of runs."""

    name: str
    state: str  # unfinished | finished | searching: recipes were measured, no run has begun
    model: str
    recipe: str
    units: int
    nbytes: int
    began: str

    def to_dict(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in self.__slots__}


@contextmanager
def held_folder(path: Path, name: str, *worth: str) -> Iterator[None]:
    """The folder of what is made as `name`, for this process alone; gone afterwards if it has no file of `worth`.

    Raises ConflictError if another process has it."""
    with _locked(path, name):
        try:
            yield
        finally:
            if not any((path / file).exists() for file in worth):
                shutil.rmtree(path, ignore_errors=True)  # nothing had begun: a refusal leaves no folder


@contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    while True:
        private_folder(path)
        with open(path / LOCK, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConflictError(
                    f"another process is making {name}", remedy="Wait for it, or choose another name"
                ) from None
            if _is_here(path, file.fileno()):
                yield
                return


def _is_here(path: Path, descriptor: int) -> bool:
    """Whether the lock that was taken is the one that lies in the folder: a refused run may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path / LOCK))
    except FileNotFoundError:
        return False


class RunFolder:
    """The folder of one run."""

    def __init__(self, home: Home, name: str) -> None:
        self.name, self.path = check_name(name), home.data / "runs" / check_name(name)

    def held(self) -> AbstractContextManager[None]:
        """The folder, for this process alone. Raises ConflictError if another has it."""
        return held_folder(self.path, self.name, RUN, RESULT)

    def described(self) -> dict[str, Any] | None:
        """run.json; None where no run has begun."""
        return _read(self.path / RUN)

    def result(self) -> dict[str, Any] | None:
        """result.json; None for a run that is not finished."""
        return _read(self.path / RESULT)

    def begin(self, document: Mapping[str, Any]) -> None:
        """Writes run.json."""
        _write(self.path / RUN, document)

    def finish(self, document: Mapping[str, Any]) -> None:
        """Writes result.json, then drops everything that only a resume would need."""
        _write(self.path / RESULT, document)
        self.drop_data()

    def drop_data(self) -> None:
        """Removes the journal first, so that no journal ever names blobs that are gone."""
        (self.path / JOURNAL).unlink(missing_ok=True)
        for entry in self.path.iterdir():
            if entry.name not in (RUN, RESULT, LOCK):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def restart_results(self) -> None:
        """Forgets what an earlier, finished run of this name left."""
        (self.path / RESULT).unlink(missing_ok=True)

    def restart(self) -> None:
        """Forgets the run."""
        (self.path / RESULT).unlink(missing_ok=True)
        (self.path / RUN).unlink(missing_ok=True)
        self.drop_data()

    def check_resume(self, print_now: Mapping[str, Any], details_now: Mapping[str, Any]) -> bool:
        """Whether there is an unfinished run of this very fingerprint to go on with. `details_now`: what stands behind
        it (`fingerprint.details`).

        Raises ConflictError with the differences where there is one of another.
        """
        there = self.described()
        if there is None or self.result() is not None or not (self.path / JOURNAL).exists():
            return False  # nothing of it was done: whatever is asked now begins anew
        differs = list(difference(there.get("fingerprint", {}), print_now, there.get("details", {}), details_now))
        if differs:
            raise ConflictError(
                f"an unfinished run of {self.name} cannot be resumed: {'; '.join(differs)}",
                remedy="Give what it was begun with, or --restart to begin anew", differences=differs,
            )  # fmt: skip
        return True


def list_runs(home: Home) -> list[RunState]:
    """Every run folder, and every search that no run has followed, by name."""
    found = {name: _state(RunFolder(home, name)) for name in _names(home.data / "runs")}
    for name in _names(home.data / SEARCHES):
        measured = home.data / SEARCHES / name / MEASURED
        if name not in found and measured.is_file():
            done = len((_read(measured) or {}).get("measured", ()))
            found[name] = RunState(name, "searching", "", "", done, _size(measured.parent), "")
    return [found[name] for name in sorted(found)]


def clean_run(home: Home, name: str) -> int:
    """Removes what a run and its search left; the bytes it had. Raises NotFoundError; ConflictError while a process
    works on it."""
    folders = [path for path in (RunFolder(home, name).path, home.data / SEARCHES / name) if path.is_dir()]
    if not folders:
        raise NotFoundError(f"there is no run of {name}", remedy="`inhouse compress --runs` lists them")
    size = sum(map(_size, folders))
    for path in folders:
        with held_folder(path, name):
            shutil.rmtree(path)
    return size


def _names(root: Path) -> list[str]:
    return [path.name for path in root.iterdir()] if root.is_dir() else []


def _state(folder: RunFolder) -> RunState:
    run = folder.described() or {}
    journal = folder.path / JOURNAL
    result = folder.result()
    if result is not None:  # its journal is gone
        state, units = "finished", len(result.get("units", ()))
    else:
        state, units = "unfinished", journal.read_bytes().count(b'"unit"') if journal.is_file() else 0
    return RunState(
        folder.name, state, str(run.get("model", "")), str(run.get("summary", "")), units, _size(folder.path),
        str(run.get("began", "")),
    )  # fmt: skip


def _size(path: Path) -> int:
    total = 0
    for folder, _, files in os.walk(path):
        total += sum((Path(folder) / file).lstat().st_size for file in files)
    return total


def _read(path: Path) -> dict[str, Any] | None:
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise UsageError(f"{path} is damaged", remedy="Begin anew with --restart")
    return document


def _write(path: Path, document: Mapping[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(document, ensure_ascii=False, indent=1).encode())


__all__ = ["DATA", "RunFolder", "RunState", "clean_run", "list_runs"]
