"""The models that this server holds: name, `name:version` or alias to a running session.

Knows sessions and settings; knows no protocol.
"""

import difflib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from inhouse.core.errors import ConflictError, NotFoundError, UnavailableError, UsageError
from inhouse.core.progress import Progress, silent
from inhouse.core.settings import Settings
from inhouse.engine.adapters import AdapterInfo
from inhouse.engine.session import Session
from inhouse.load.locate import locate

IDLE_S = 5.0  # how long a replaced session must have had nothing to do: a request may have found it a moment before


@dataclass(frozen=True, slots=True)
class Replaced:
    """A model of which this server now holds another version."""

    name: str
    before: str  # name:version
    now: str


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
        self._refreshing = threading.Lock()
        self._retiring: list[Session] = []

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

    def refresh(self, watch: Callable[[Session], None]) -> list[Replaced]:
        """Looks again what each name of the store means, and where that is another version by now, opens it beside the
        old one, with the old one's adapters, and lets requests go there; the old one ends once it has nothing to do.

        `watch` is called with each new session before requests reach it. Raises what opening raises; models that
        were not replaced until then stay as they are.
        """
        with self._refreshing:
            return [done for name in list(self._sessions) if (done := self._replace(name, watch)) is not None]

    def _replace(self, name: str, watch: Callable[[Session], None]) -> Replaced | None:
        old = self._sessions[name]
        if not old.model.version or locate(name).digest == old.model.digest:
            return None
        new = Session.open(name, self._settings)
        try:
            for adapter, info in old.engine.adapters.table().items():
                new.load_adapter(adapter, info.origin)
        except BaseException:
            new.close()
            raise
        watch(new)
        self._retiring.append(old)
        self.add(name, new)
        threading.Thread(target=self._retire, args=(old,), name="inhouse-retire", daemon=True).start()
        return Replaced(name, old.names[-1], new.names[-1])

    def _retire(self, session: Session) -> None:
        """Closes a session that the pool no longer gives out, when it has been idle for a while."""
        idle = 0.0
        while idle < IDLE_S:
            time.sleep(0.1)
            idle = 0.0 if session.engine.busy else idle + 0.1
        session.close()
        self._retiring.remove(session)

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
        for session in [*self._sessions.values(), *self._retiring]:
            session.close()
        self._sessions.clear()
        self._loaded_at.clear()
