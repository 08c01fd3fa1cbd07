"""Pulling: a model of a hub is fetched, resumably, and imported like any other.

Knows the order (list, choose, check space, fetch, import); each step is its own page.
"""

import hashlib
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from inhouse.core.errors import FormatError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.load.choose import Choice, choose_files
from inhouse.load.generation import CONFIG_BYTES
from inhouse.load.importer import Imported, import_model
from inhouse.model.families.table import resolve
from inhouse.store import lock
from inhouse.store.download import fetch
from inhouse.store.hub import Hub, Listing, RemoteFile, open_hub
from inhouse.store.refs import check_name, name_from
from inhouse.store.source import read_json
from inhouse.store.store import Store, check_inner_path

_HUBS: Mapping[str, str] = {"hf": "hf", "huggingface": "hf", "modelscope": "modelscope", "ms": "modelscope"}
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REFERENCE = re.compile(
    rf"(?:(?P<hub>hf|huggingface|modelscope|ms):)?(?P<repo>{_PART}(?:/{_PART})?)"
    r"(?::(?P<tag>[^@:/][^@:]{0,199}))?(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]{0,200}))?"
)


@dataclass(frozen=True, slots=True)
class HubReference:
    """What to pull: `[hf:|modelscope:]OWNER/NAME[:GGUF TAG][@REVISION]`."""

    hub: str
    repo: str
    tag: str | None = None
    revision: str | None = None


def parse_hub_reference(text: str) -> HubReference:
    """Reads a reference. Raises UsageError if it is not one."""
    match = _REFERENCE.fullmatch(text)
    if match is None or ".." in (match["repo"] + (match["revision"] or "")):
        raise UsageError(
            f"{text[:120]!r} is no model of a hub",
            remedy="Write OWNER/NAME, OWNER/NAME:Q4_K_M for a GGUF, or modelscope:OWNER/NAME.",
        )
    return HubReference(_HUBS[match["hub"] or "hf"], match["repo"], match["tag"], match["revision"])


def pull(
    reference: str,
    name: str | None = None,
    *,
    store: Store,
    environ: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> Imported:
    """Fetches a model of a hub into the store; called again after a failure, it goes on where it stopped.

    Args:
        reference: see HubReference.
        name: of the model in the store; the repository's (or the GGUF file's) own, if None.
        environ: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE, MODELSCOPE_ENDPOINT,
            MODELSCOPE_API_TOKEN; the process's, if None.
        progress: told ("pull FILE", bytes, bytes in all), then as `import_model`.

    Raises:
        UsageError, NotFoundError: the reference. NetworkError: the hub, or the machine is set offline.
        FormatError, UnsupportedError: the model. CapacityError: disk space, or another process pulls the same.
    """
    wanted = parse_hub_reference(reference)
    if name is not None:
        check_name(name)
    hub = open_hub(wanted.hub, environ)
    with hub.session:
        listing = hub.list(wanted.repo, wanted.revision)
        choice = choose_files(listing.files, wanted.tag)
        origin = f"{hub.kind}:{listing.repo}@{_revision(listing, choice)}"
        if choice.entry != ".":
            origin += f":{choice.entry}"
        title = name or _title(listing, choice)
        for version in store.catalog.versions():
            if version.origin == origin and version.name == title:
                return Imported(version, False, choice.left_out, ("this revision was pulled before",))
        folder = store.download_folder(hashlib.sha256(f"{hub.session.endpoint} {origin}".encode()).hexdigest()[:32])
        with lock.exclusive(folder / ".lock", 0.0):
            _fetch_all(hub, listing, choice, folder, store, progress)
            imported = import_model(
                folder / choice.entry, title, store=store, how="move", origin=origin, progress=progress
            )
        shutil.rmtree(folder, ignore_errors=True)
    return Imported(imported.version, imported.new, choice.left_out, imported.notes)


def _fetch_all(hub: Hub, listing: Listing, choice: Choice, folder: Path, store: Store, progress: Progress) -> None:
    for file in choice.files:
        check_inner_path(file.path)
    store.blobs.check_space(sum(_lacking(folder, file) for file in choice.files))
    for file in choice.files:
        fetch(hub.session, hub.url(listing, file.path), folder / file.path, file, progress)
        if file.path == "config.json":  # small files come first: an unknown family is said before the weights
            with suppress(FormatError):  # which tensors there are is not known yet
                resolve(read_json(folder / file.path, CONFIG_BYTES))


def _lacking(folder: Path, file: RemoteFile) -> int:
    for name in (file.path, file.path + ".partial"):
        if (folder / name).is_file():
            return max(0, (file.size or 0) - (folder / name).stat().st_size)
    return file.size or 0


def _revision(listing: Listing, choice: Choice) -> str:
    """The commit; where the hub gives none (ModelScope), the contents' own digest, so that a moved branch is seen."""
    if re.fullmatch(r"[0-9a-f]{40}", listing.commit):
        return listing.commit
    known = "".join(f"{file.path} {file.identity} {file.size}\n" for file in sorted(choice.files, key=lambda f: f.path))
    return f"{listing.commit}~{hashlib.sha256(known.encode()).hexdigest()[:16]}"


def _title(listing: Listing, choice: Choice) -> str:
    if choice.entry == ".":
        return name_from(listing.repo.rsplit("/", 1)[-1])
    stem = choice.entry.rsplit("/", 1)[-1].removesuffix(".gguf")
    return name_from(re.sub(r"-\d{5}-of-\d{5}$", "", stem))
