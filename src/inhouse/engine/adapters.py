"""LoRA adapters of one engine: names, slots, who uses them. Changes are made by the engine's thread between steps.

A name that is dropped is gone for new requests at once; its slot is emptied when the last request that uses it ends.
Knows nothing of files.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from inhouse.core.errors import CapacityError, ConflictError, InhouseError, NotFoundError
from inhouse.runtime.adapters import MAX_SLOTS, Adapter
from inhouse.runtime.executor import Executor


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A loaded adapter: its slot, what its weights are, and what is told of it."""

    name: str
    slot: int
    digest: str
    origin: str
    rank: int
    nbytes: int


@dataclass(slots=True)
class _Change:
    """What a slot is to hold from the next step on."""

    slot: int
    adapter: Adapter | None
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class Adapters:
    """See above. Thread-safe but for `apply`, which is the engine's thread's.

    Args:
        executor: holds what is in the slots.
        wake: tells the engine's thread that there is something to apply.
    """

    def __init__(self, executor: Executor, wake: Callable[[], None]) -> None:
        self._executor, self._wake = executor, wake
        self._lock = threading.Lock()
        self._named: dict[str, AdapterInfo] = {}
        self._slots: dict[int, str] = {}  # slot in use -> digest
        self._users: Counter[int] = Counter()
        self._dying: set[int] = set()
        self._mail: deque[_Change] = deque()

    @property
    def waiting(self) -> bool:
        """Whether `apply` has something to do."""
        return bool(self._mail)

    @property
    def held(self) -> int:
        """Slots in use, those of unloaded adapters that running requests still need included."""
        with self._lock:
            return len(self._slots)

    def table(self) -> dict[str, AdapterInfo]:
        """Name -> adapter, in order of loading."""
        with self._lock:
            return dict(self._named)

    def load(self, name: str, adapter: Adapter, digest: str, *, origin: str = "", rank: int = 0) -> AdapterInfo:
        """Puts an adapter into a free slot and returns when steps may use it. The same adapter under the same name
        again is no error.

        Raises ConflictError (the name has another adapter), CapacityError (no slot), and what the executor raises.
        """
        with self._lock:
            known = self._named.get(name)
            if known is not None:
                if known.digest == digest:
                    return known
                raise ConflictError(
                    f"the adapter {name!r} is loaded already", remedy="Unload it first", param="lora_name"
                )
            slot = next((s for s in range(1, MAX_SLOTS + 1) if s not in self._slots), None)
            if slot is None:
                raise CapacityError(f"all {MAX_SLOTS} adapter slots are taken", remedy="Unload an adapter")
            self._slots[slot] = digest
            change = _Change(slot, adapter)
            self._mail.append(change)
        self._wake()
        change.done.wait()
        nbytes = sum(low.nbytes for low in adapter.values())
        info = AdapterInfo(name, slot, digest, origin, rank, nbytes)
        with self._lock:
            if change.error is None and name in self._named:  # somebody else was faster with this name
                change.error = ConflictError(f"the adapter {name!r} is loaded already", param="lora_name")
                self._retire(slot)
            elif change.error is None:
                self._named[name] = info
            else:
                del self._slots[slot]
        if change.error is not None:
            raise change.error
        return info

    def unload(self, name: str) -> AdapterInfo:
        """Forgets a name; requests that run with it end as they began. Raises NotFoundError."""
        with self._lock:
            info = self._named.pop(name, None)
            if info is None:
                held = ", ".join(self._named) or "none"
                raise NotFoundError(f"no adapter {name!r} is loaded", remedy=f"Loaded: {held}", param="lora_name")
            self._retire(info.slot)
        self._wake()
        return info

    def slot(self, name: str | None) -> int:
        """The slot of a name; 0 where no adapter has it."""
        with self._lock:
            info = self._named.get(name or "")
            return info.slot if info else 0

    def hold(self, slot: int) -> str:
        """Counts a request that uses a slot; returns the digest of what is in it ("" for slot 0). Raises NotFoundError
        if it was unloaded meanwhile."""
        if not slot:
            return ""
        with self._lock:
            if slot not in self._slots or slot in self._dying:
                raise NotFoundError("the adapter was unloaded", remedy="Load it again", param="model")
            self._users[slot] += 1
            return self._slots[slot]

    def release(self, slot: int) -> None:
        """A request that used a slot has ended."""
        if not slot:
            return
        with self._lock:
            self._users[slot] -= 1
            if slot in self._dying:
                self._retire(slot)

    def apply(self) -> None:
        """Makes the changes that were asked for; by the engine's thread, between steps."""
        while self._mail:
            change = self._mail.popleft()
            try:
                self._executor.set_adapter(change.slot, change.adapter)
            except InhouseError as error:
                change.error = error
            change.done.set()
            if change.adapter is None:
                with self._lock:
                    self._slots.pop(change.slot, None)
                    self._dying.discard(change.slot)

    def end(self, error: InhouseError) -> None:
        """Nobody waits for ever: what was not applied fails."""
        while self._mail:
            change = self._mail.popleft()
            change.error = error
            change.done.set()

    def _retire(self, slot: int) -> None:
        """Empties a slot, now or after its last user; the lock is held."""
        self._dying.add(slot)
        if self._users[slot] <= 0:
            del self._users[slot]
            self._mail.append(_Change(slot, None))
