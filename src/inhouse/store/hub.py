"""Model hubs: what files a repository has at a revision, and where each is fetched.

Knows the interfaces of the Hugging Face hub (and its mirrors, by HF_ENDPOINT) and of ModelScope; does not know which
files make a model. Sources: the Hugging Face Hub API documentation; ModelScope's published API of repository files.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

from inhouse.core.errors import NetworkError, UsageError
from inhouse.store.http import Session, require

MAX_FILES = 50_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_ON = frozenset({"1", "ON", "YES", "TRUE"})


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository; "" and None where the hub does not say."""

    path: str
    size: int | None = None
    sha256: str = ""
    git_sha1: str = ""  # of a git blob: sha1 over "blob SIZE\\0" and the content

    @property
    def identity(self) -> str:
        """What tells this content from another; "" if the hub gives nothing."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one revision."""

    repo: str
    commit: str  # what the revision stands for now
    files: tuple[RemoteFile, ...]


class Hub(Protocol):
    """A place that models are pulled from."""

    kind: str
    session: Session

    def list(self, repo: str, revision: str | None) -> Listing:
        """The files. Raises NotFoundError, NetworkError."""

    def url(self, listing: Listing, path: str) -> str:
        """Where a file of the listing is fetched."""


class HuggingFace:
    """The Hugging Face hub or a mirror of it."""

    kind = "hf"

    def __init__(self, environ: Mapping[str, str]) -> None:
        token = environ.get("HF_TOKEN", "").strip()
        endpoint = (environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        hint = "Set HF_TOKEN to a token with access (and accept the model's terms on its page)."
        self.session = Session(endpoint, {"Authorization": f"Bearer {token}"} if token else {}, hint)

    def list(self, repo: str, revision: str | None) -> Listing:
        """GET /api/models/REPO/revision/REV?blobs=true"""
        where = f"{self.session.endpoint}/api/models/{quote(repo)}/revision/{quote(revision or 'main', safe='')}"
        answer = self.session.json(f"{where}?blobs=true")
        require(isinstance(answer, dict) and isinstance(answer.get("siblings"), list), f"no siblings for {repo}")
        commit = answer.get("sha")
        require(isinstance(commit, str) and _SHA1.fullmatch(commit) is not None, f"no commit for {repo}")
        return Listing(repo, commit, _files(answer["siblings"], _hf_file))

    def url(self, listing: Listing, path: str) -> str:
        """/REPO/resolve/COMMIT/PATH"""
        return f"{self.session.endpoint}/{quote(listing.repo)}/resolve/{listing.commit}/{quote(path)}"


class ModelScope:
    """ModelScope."""

    kind = "modelscope"

    def __init__(self, environ: Mapping[str, str]) -> None:
        token = environ.get("MODELSCOPE_API_TOKEN", "").strip()
        endpoint = environ.get("MODELSCOPE_ENDPOINT") or environ.get("MODELSCOPE_DOMAIN") or "https://www.modelscope.cn"
        if "://" not in endpoint:
            endpoint = f"https://{endpoint}"
        headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
        self.session = Session(endpoint.rstrip("/"), headers, "Set MODELSCOPE_API_TOKEN to a token with access.")

    def list(self, repo: str, revision: str | None) -> Listing:
        """GET /api/v1/models/REPO/repo/files?Revision=REV&Recursive=true"""
        wanted = revision or "master"
        where = f"{self._base(repo)}/files?Revision={quote(wanted, safe='')}&Recursive=true"
        answer = self.session.json(where)
        data = answer.get("Data") if isinstance(answer, dict) else None
        require(isinstance(data, dict) and isinstance(data.get("Files"), list), f"no files for {repo}")
        assert isinstance(data, dict)
        return Listing(repo, wanted, _files(data["Files"], _modelscope_file))

    def url(self, listing: Listing, path: str) -> str:
        """GET /api/v1/models/REPO/repo?Revision=REV&FilePath=PATH"""
        return f"{self._base(listing.repo)}?Revision={quote(listing.commit, safe='')}&FilePath={quote(path, safe='')}"

    def _base(self, repo: str) -> str:
        return f"{self.session.endpoint}/api/v1/models/{quote(repo)}/repo"


def open_hub(kind: str, environ: Mapping[str, str] | None = None) -> Hub:
    """A hub by name (`hf` or `modelscope`), as the environment sets it up.

    Raises NetworkError where the machine is set offline, UsageError for another name or an endpoint that is no address.
    """
    env = os.environ if environ is None else environ
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if env.get(variable, "").upper() in _ON:
            raise NetworkError(
                f"nothing is fetched: {variable} is set", remedy=f"Unset {variable}, or import the model from a folder."
            )
    if kind == "hf":
        return HuggingFace(env)
    if kind == "modelscope":
        return ModelScope(env)
    raise UsageError(f"unknown hub {kind!r}", remedy="Use hf or modelscope.", param="hub")


def _files(entries: list[Any], read: Any) -> tuple[RemoteFile, ...]:
    require(len(entries) <= MAX_FILES, f"{len(entries)} files, the limit is {MAX_FILES}")
    found = [read(entry) for entry in entries if isinstance(entry, dict)]
    return tuple(file for file in found if file is not None)


def _hf_file(entry: Mapping[str, Any]) -> RemoteFile | None:
    path, lfs = entry.get("rfilename"), entry.get("lfs")
    require(isinstance(path, str), "a file without a name")
    if isinstance(lfs, dict):
        return RemoteFile(str(path), _size(lfs.get("size")), _digest(lfs.get("sha256"), _SHA256))
    return RemoteFile(str(path), _size(entry.get("size")), git_sha1=_digest(entry.get("blobId"), _SHA1))


def _modelscope_file(entry: Mapping[str, Any]) -> RemoteFile | None:
    if entry.get("Type") == "tree":
        return None
    path = entry.get("Path")
    require(isinstance(path, str), "a file without a path")
    return RemoteFile(str(path), _size(entry.get("Size")), _digest(entry.get("Sha256"), _SHA256))


def _size(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _digest(value: Any, pattern: re.Pattern[str]) -> str:
    return value.lower() if isinstance(value, str) and pattern.fullmatch(value.lower()) else ""
