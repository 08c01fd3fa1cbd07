"""Where models, caches and downloads lie on this machine.

Knows paths and environment variables; does not know what is in the files.
Source: XDG Base Directory Specification 0.8 (a relative path in its variables is invalid and ignored).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from inhouse.core.errors import UnavailableError, UsageError

HOME_VARIABLE = "INHOUSE_HOME"
PRIVATE = 0o700  # models may be confidential: nobody but their owner lists or reads them


@dataclass(frozen=True, slots=True)
class Home:
    """The folders of one model home.

    data/catalog.db     names, versions, aliases
    data/blobs/         file contents by sha256
    data/views/DIGEST/  a version's files under their own names (links into blobs; derived)
    data/tmp/           files that are being written
    data/downloads/     partly fetched files, kept for resuming
    data/lock           held shared while blobs are added, exclusively while they are swept
    cache/packs/        packed weights (derived; may be deleted at any time)
    """

    data: Path
    cache: Path

    @classmethod
    def find(cls, environ: Mapping[str, str] | None = None) -> "Home":
        """`$INHOUSE_HOME`, else the XDG data and cache folders. Creates nothing.

        Raises UsageError if INHOUSE_HOME is not an absolute path.
        """
        env = os.environ if environ is None else environ
        own = env.get(HOME_VARIABLE, "")
        if own:
            if not os.path.isabs(own) or "\0" in own:
                raise UsageError(f"{HOME_VARIABLE} is {own!r}, not an absolute path", param=HOME_VARIABLE)
            return cls(Path(own), Path(own) / "cache")
        user = Path(env.get("HOME") or os.path.expanduser("~"))
        return cls(
            _xdg(env, "XDG_DATA_HOME", user / ".local" / "share"),
            _xdg(env, "XDG_CACHE_HOME", user / ".cache"),
        )

    @property
    def catalog(self) -> Path:
        return self.data / "catalog.db"

    @property
    def blobs(self) -> Path:
        return self.data / "blobs"

    @property
    def views(self) -> Path:
        return self.data / "views"

    @property
    def tmp(self) -> Path:
        return self.data / "tmp"

    @property
    def downloads(self) -> Path:
        return self.data / "downloads"

    @property
    def lock(self) -> Path:
        return self.data / "lock"

    @property
    def packs(self) -> Path:
        return self.cache / "packs"

    @property
    def tokenizers(self) -> Path:
        return self.cache / "tokenizers"

    def create(self) -> None:
        """Makes the folders, readable by their owner alone. Raises UnavailableError if that fails."""
        for folder in (self.data, self.blobs, self.views, self.tmp, self.downloads):
            private_folder(folder)


def private_folder(folder: Path) -> None:
    """Makes a folder of mode 0700 and those above it that lack. Raises UnavailableError."""
    try:
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(
            f"the folder {folder} cannot be made: {error.strerror}",
            remedy=f"Make it, or set {HOME_VARIABLE} to a folder that you may write to.",
        ) from None


def _xdg(env: Mapping[str, str], variable: str, default: Path) -> Path:
    value = env.get(variable, "")
    return (Path(value) if os.path.isabs(value) else default) / "inhouse"
