"""Typed reading of a config that somebody else wrote: every key is asked for, or refused at the end."""

import fnmatch
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from inhouse.core.errors import FormatError, UnsupportedError

_REQUIRED = object()
LARGEST = 1 << 63  # of any number that a config may hold


class Fields:
    """A mapping of keys read one by one. What was never read and is not known to be inert is an error.

    Args:
        config: key -> value, from JSON or a GGUF table.
        what: how messages call it (`config.json`, `the GGUF metadata`).
        prefix: put before every key (`llama.`).
        single: fractions were stored as float32; they are read as the shortest decimal that rounds to it (1e-05, not
            9.99999974e-06), which is what the author wrote.
    """

    def __init__(self, config: Mapping[str, Any], what: str, prefix: str = "", single: bool = False) -> None:
        self._config, self._what, self._prefix, self._single = config, what, prefix, single
        self._read: set[str] = set()

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as it stands; `default` where it is absent or null."""
        self._read.add(key)
        value = self._config.get(self._prefix + key)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        return default if value is None else value

    def has(self, key: str) -> bool:
        """Whether the key is there, be it null."""
        return self._prefix + key in self._config

    def was_read(self, key: str) -> bool:
        """Whether the key was asked for."""
        return key in self._read

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        """A whole number; raises FormatError if it is not one."""
        value = self._required(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= LARGEST:
            raise self._wrong(key, value, "a whole number below 2^63")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A number below 2^63."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < LARGEST:  # NaN too
            raise self._wrong(key, value, "a number below 2^63")
        return float(str(np.float32(value))) if self._single else float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """true or false."""
        value = self._required(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        """A string."""
        value = self._required(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def expect(self, key: str, allowed: Collection[Any]) -> None:
        """Raises UnsupportedError if the key is there with a value that is not allowed."""
        value = self.raw(key)
        if value is not None and value not in allowed:
            raise self.unsupported(key, value)

    def expect_all(self, allowed: Mapping[str, Any]) -> None:
        """`expect` of each key with its one value."""
        for key, value in allowed.items():
            self.expect(key, (value,))

    def nested(self, key: str) -> "Fields | None":
        """The mapping under a key, or None where it is absent; raises FormatError if it is no mapping."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(key, value, "an object")
        return Fields(value, f"{key} of {self._what}")

    def refuse_rest(self, inert: Collection[str] = ()) -> None:
        """Raises UnsupportedError naming the first key that was not read, unless it is null or a pattern in `inert`
        matches it."""
        for key, value in self._config.items():
            if not isinstance(key, str) or not key.startswith(self._prefix):
                continue
            short = key[len(self._prefix) :]
            if short in self._read or value is None:
                continue
            if not any(fnmatch.fnmatchcase(short, pattern) for pattern in inert):
                raise self.unsupported(short, value)

    def unsupported(self, key: str, value: Any) -> UnsupportedError:
        """The error for a key whose value cannot be honoured."""
        return UnsupportedError(
            f"{self._what} has {self._prefix}{key} = {_short(value)}, which we cannot honour",
            remedy="If the key does not change the computation, remove it and try again; else open an issue",
            param=self._prefix + key,
        )

    def _required(self, key: str, default: Any) -> Any:
        value = self.raw(key, default)
        if value is _REQUIRED:
            raise FormatError(f"{self._what} lacks {self._prefix}{key}", param=self._prefix + key)
        return value

    def _wrong(self, key: str, value: Any, wanted: str) -> FormatError:
        key = self._prefix + key
        return FormatError(f"{self._what} has {key} = {_short(value)}, expected {wanted}", param=key)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
