"""What one rendering of a chat template may use, and what values cost. Knows Jinja2's value types, not its syntax."""

import threading
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any, Final

from jinja2.utils import Namespace

MAX_STEPS: Final = 1_000_000
"""Loop passes, calls and list items of one rendering. A thousand messages with the longest template take 30,000."""

MAX_TEXT: Final = 64 * 2**20
"""Characters that one rendering may make or compare, intermediate strings included."""

MAX_BITS: Final = 65_536
"""Of any number that is reckoned with: the interpreter's division takes time in the square of it."""

_VIEWS: Final = (KeysView, ItemsView, ValuesView)
_CONTAINERS: Final = (list, tuple, dict, *_VIEWS)


class Exhausted(Exception):
    """The budget is used up."""


class Budget(threading.local):
    """What the rendering of this thread may still use."""

    steps = 0
    text = 0

    def reset(self) -> None:
        """A new rendering begins."""
        self.steps, self.text = MAX_STEPS, MAX_TEXT

    def step(self, count: int = 1) -> None:
        """Pays for passes, calls and items; raises Exhausted."""
        self.steps -= count
        if self.steps < 0:
            raise Exhausted(f"the chat template takes more than {MAX_STEPS} steps")

    def spend(self, size: int) -> None:
        """Pays for characters; raises Exhausted."""
        self.text -= size
        if self.text < 0:
            raise Exhausted(f"the chat template makes more than {MAX_TEXT} characters of text")

    def print(self, value: Any, times: int = 1) -> None:
        """Pays for the text of any value; lists that hold one another many times count as often as they print."""
        self.spend(times * self.weight(value))

    def weight(self, value: Any) -> int:
        """Deep size: what printing, hashing or comparing the value takes at most. Finding it costs a step an item."""
        return len(value) if isinstance(value, str) else self._weight(value, {})

    def _weight(self, value: Any, known: dict[int, int]) -> int:
        if isinstance(value, str | bytes):
            return 1 + len(value)
        if isinstance(value, int):
            return 1 + value.bit_length() // 3
        if isinstance(value, Namespace):
            parts = list(vars(value).values())
        elif isinstance(value, dict):
            parts = [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            parts = value  # type: ignore[assignment]  # only read
        elif isinstance(value, _VIEWS):
            parts = list(value)
        else:
            return 1
        if id(value) not in known:
            known[id(value)] = 1  # a namespace may hold itself
            self.step(1 + len(parts))
            known[id(value)] = 2 + sum(self._weight(part, known) for part in parts)
        return known[id(value)]

    def compare(self, left: Any, right: Any) -> None:
        """Pays for ==, < and the like: the smaller side's deep size, where both sides have one."""
        if isinstance(left, str) and isinstance(right, str):
            self.spend(min(len(left), len(right)))
        elif all(isinstance(side, _CONTAINERS) for side in (left, right)) or (
            isinstance(left, int) and isinstance(right, int)
        ):
            self.spend(min(self.weight(left), self.weight(right)))

    def hash(self, *values: Any) -> None:
        """Pays for values used as keys: tuples are hashed anew each time, deeply."""
        for value in values:
            if isinstance(value, tuple):
                self.print(value)

    def order(self, values: list[Any]) -> None:
        """Pays for sorting, or for finding equals among, these values."""
        self.spend(self.weight(values) * max(1, len(values).bit_length()))

    def drawn(self, items: Iterator[Any]) -> list[Any]:
        """What a lazy filter gives, a step an item, so that it can be measured."""
        out = []
        for item in items:
            self.step()
            out.append(item)
        return out

    def contains(self, needle: Any, holder: Any) -> bool:
        """The operator `in`, paid as it goes."""
        if isinstance(holder, str):
            self.spend(len(holder))
        elif isinstance(holder, dict | KeysView | range):
            self.hash(needle)
        elif isinstance(holder, list | tuple | ItemsView | ValuesView | Iterator):
            return any(self._same(needle, item) for item in holder)
        return needle in holder

    def _same(self, needle: Any, item: Any) -> bool:
        self.step()
        if needle is item:
            return True
        self.compare(needle, item)
        return bool(needle == item)
