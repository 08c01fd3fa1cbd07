"""`quantization_config` read strictly: what a scheme honours is read, what names or trained it is let pass, and the
rest is refused by name."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from inhouse.core.errors import FormatError, UnsupportedError

_MISSING = object()


class QuantConfig:
    """The keys of one quantization_config; `finish` refuses those that nobody asked for."""

    def __init__(self, values: Mapping[str, Any], where: str = "quantization_config") -> None:
        self._values, self._where, self._read = values, where, {"quant_method"}

    def raw(self, *names: str, default: Any = None) -> Any:
        """The first of the names that is there and not null."""
        self._read.update(names)
        return next((self._values[name] for name in names if self._values.get(name) is not None), default)

    def integer(self, *names: str, default: int | None = None) -> int:
        value = self.raw(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise FormatError(f"{self._where}: {names[0]} is {value!r}, expected a whole number", param=names[0])
        return value

    def flag(self, *names: str, default: bool) -> bool:
        value = self.raw(*names, default=default)
        if not isinstance(value, bool):
            raise FormatError(f"{self._where}: {names[0]} is {value!r}, expected true or false", param=names[0])
        return value

    def text(self, *names: str, default: str | None = None) -> str:
        value = self.raw(*names, default=default)
        if not isinstance(value, str):
            raise FormatError(f"{self._where}: {names[0]} is {value!r}, expected a word", param=names[0])
        return value

    def expect(self, name: str, allowed: Sequence[Any]) -> None:
        """Refuses a key whose value is none of `allowed` (absent and null pass)."""
        value = self.raw(name)
        if value is not None and value not in allowed:
            raise self.unsupported(name, value)

    def unsupported(self, name: str, value: object) -> UnsupportedError:
        return UnsupportedError(
            f"{self._where}: {name} = {str(value)[:60]!r} is not read",
            remedy="Quantise the model again in a form that is.",
            param=name,
        )

    def finish(self, inert: Sequence[str]) -> None:
        """Refuses every key that was not read and matches none of `inert`."""
        for name in self._values:
            if name not in self._read and not any(fnmatchcase(name, pattern) for pattern in inert):
                raise UnsupportedError(
                    f"{self._where} has the unknown key {name!r}",
                    remedy="It may change how codes are read, so the model is not opened.",
                    param=name,
                )


def names_module(patterns: Sequence[str], module: str) -> bool:
    """Whether a list of module names, parts of names or `re:` patterns means this module."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.match(pattern[3:], module):
                return True
        elif module == pattern or module.endswith(f".{pattern}") or f".{pattern}." in f".{module}.":
            return True
    return False
