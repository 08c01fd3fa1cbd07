"""The models that this server holds: name, `name:version` or alias to a running session.

Knows sessions and settings; knows no protocol.
"""

import difflib
import time
from collections.abc import Mapping
from pathlib import Path

from inhouse.core.errors import ConflictError, NotFoundError, UnavailableError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.core.settings import Settings
from inhouse.engine.adapters import AdapterInfo
from inhouse.engine.session import Session


class Pool:
    """Sessions by the names that clients may use.

    Args:
        settings: how sessions are opened.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sessions: dict[str, Session] = {}
        self._loaded_at: dict[str, int] = {}
        self.draining = False

    def load(self, reference: str, progress: Progress = silent) -> Session:
        """Opens a model and adds it: under the name as given, or, opened from a path, under the model's own.

        Raises what opening raises, ConflictError if the name is taken.
        """
        session = Session.open(reference, self._settings, progress)
        name = reference if session.model.version else session.name
        if name in self._sessions:
            session.close()
            raise ConflictError(f"two models would answer to {name!r}", remedy="Import one under another name")
        self.add(name, session)
        return session

    def add(self, name: str, session: Session) -> None:
        """Adds an open session under a name."""
        self._sessions[name] = session
        self._loaded_at[name] = int(time.time())

    def names(self) -> Mapping[str, int]:
        """Name to Unix time of loading, in order of loading."""
        return dict(self._loaded_at)

    def sessions(self) -> Mapping[str, Session]:
        """Name to session, in order of loading."""
        return dict(self._sessions)

    def adapters(self) -> Mapping[str, tuple[str, AdapterInfo]]:
        """Adapter's name -> (name of the model it changes, what it is), over all sessions."""
        return {
            name: (base, info)
            for base, session in self._sessions.items()
            for name, info in session.engine.adapters.table().items()
        }

    def load_adapter(self, name: str, path: str | Path, model: str | None = None) -> AdapterInfo:
        """Loads an adapter for a model (None: the only one). Raises what `Session.load_adapter` raises, ConflictError
        if a model or another model's adapter has that name."""
        session = self.get(model)
        taken = self.adapters().get(name)
        if name in self._sessions or (taken and self._sessions[taken[0]] is not session):
            raise ConflictError(f"{name!r} is in use here", remedy="Choose another name", param="lora_name")
        return session.load_adapter(name, path)

    def unload_adapter(self, name: str) -> AdapterInfo:
        """Forgets an adapter. Raises NotFoundError."""
        found = self.adapters().get(name)
        if found is None:
            held = ", ".join(self.adapters()) or "none"
            raise NotFoundError(f"no adapter {name!r} is loaded", remedy=f"Loaded: {held}", param="lora_name")
        return self._sessions[found[0]].unload_adapter(name)

    def get(self, name: str | None) -> Session:
        """The session that answers to `name`: as given at start, the model's own name or name:version, or an adapter's;
        None means the only one.

        Raises NotFoundError with the nearest name, UnavailableError while draining.
        """
        if self.draining:
            raise UnavailableError("the server is shutting down", remedy="Try again on another server, or later")
        if name is None:
            return self._only()
        session = self._sessions.get(name)
        if session is not None:
            return session
        for other in self._sessions.values():
            if name in other.names or other.engine.adapters.slot(name):
                return other
        near = difflib.get_close_matches(name, [*self._sessions, *self.adapters()], 1)
        remedy = f"Did you mean {near[0]}?" if near else f"This server holds: {', '.join(self._sessions) or 'none'}"
        raise NotFoundError(f"the model {name!r} does not exist here", remedy=remedy, param="model")

    def _only(self) -> Session:
        if len(self._sessions) != 1:
            names = ", ".join(self._sessions)
            raise UsageError("the field 'model' is missing", remedy=f"This server holds: {names}", param="model")
        return next(iter(self._sessions.values()))

    def close(self) -> None:
        """Closes every session; running requests end with an error event."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        self._loaded_at.clear()
