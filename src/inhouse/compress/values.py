"""Plain values (of YAML, JSON, Python) as the types that dataclasses declare, each refused with the path to its key.

A number may stand with the range that it must lie in, beside the field itself: `damping: NotNegative = 0.01`. What is
not finite is refused everywhere. Knows no recipes.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from inhouse.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Range:
    """Where a number must lie; the ends belong to it unless `above` (the low one) or `below` (the high one)."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Whether a number lies there; nan never does."""
        over = value > self.low if self.above else value >= self.low
        return over and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        if math.isinf(self.high):
            return low
        return f"{low} and {f'below {self.high:g}' if self.below else f'at most {self.high:g}'}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, (1 << 63) - 1)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]  # the ends are meant
Part = Annotated[float, Range(0, 1, above=True, below=True)]  # neither nothing nor all
AtMostOne = Annotated[float, Range(0, 1, above=True)]
LessThanOne = Annotated[float, Range(0, 1, below=True)]
Finite = Annotated[float, Range()]


def check_options(options: Any) -> None:
    """Raises UsageError for the first value of a dataclass that its field does not take: for options that more than
    recipes make."""
    hints = typing.get_type_hints(type(options), include_extras=True)
    for one in fields(options):
        plain(getattr(options, one.name), hints[one.name], one.name)


def plain(value: Any, kind: Any, where: str) -> Any:
    """A plain value as a type of a dataclass field. Raises UsageError."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(value, float) and not math.isfinite(value):
        raise not_finite(where, value)
    if kind is Any:
        return value
    if origin is Annotated:
        return _ranged(plain(value, inner[0], where), inner[1:], where)
    if origin is typing.Literal:
        return choice(value, inner, where)
    if origin in (typing.Union, types.UnionType):
        return _union(value, inner, kind, where)
    if origin in (tuple, list, Sequence) or origin is typing.get_origin(Sequence[int]):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise wrong(where, f"is {value!r}, expected a list")
        if origin is tuple and inner[-1] is not Ellipsis and len(value) != len(inner):
            raise wrong(where, f"has {len(value)} numbers, expected {len(inner)}")
        return tuple(plain(one, inner[0], f"{where}[{i}]") for i, one in enumerate(value))
    if origin is dict or origin is typing.get_origin(Mapping[str, int]):
        return {str(k): plain(v, inner[1], f"{where}.{k}") for k, v in mapping(value, where).items()}
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and not isinstance(value, kind):
        given = mapping(value, where)
        known(given, [f.name for f in fields(kind)], where)
        hints = typing.get_type_hints(kind, include_extras=True)
        return kind(**{key: plain(one, hints[key], f"{where}.{key}") for key, one in given.items()})
    if kind is float:
        value = _as_float(value, where)
    if not isinstance(kind, type) or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise wrong(where, f"is {value!r}, expected {getattr(kind, '__name__', kind)}")
    return value


def _as_float(value: Any, where: str) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str):  # YAML reads 1e-3 as a string
        try:
            number = float(value)
        except ValueError:
            return value
        if not math.isfinite(number):
            raise not_finite(where, number)
        return number
    return value


def _ranged(value: Any, ranges: Sequence[Any], where: str) -> Any:
    for one in ranges:
        if isinstance(one, Range) and not one.holds(value):
            raise UsageError(f"{where} is {value:g}", remedy=f"Give a number that is {one}", param=where)
    return value


def _union(value: Any, inner: Sequence[Any], kind: Any, where: str) -> Any:
    if value is None and type(None) in inner:
        return None
    rest = [one for one in inner if one is not type(None)]
    if len(rest) == 1:
        return plain(value, rest[0], where)
    for one in rest:
        try:
            return plain(value, one, where)
        except UsageError:
            continue
    raise wrong(where, f"is {value!r}, expected {kind}")


def choice(value: Any, allowed: Sequence[Any], where: str) -> Any:
    """The value, if it is one of those allowed. Raises UsageError with the nearest of them."""
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), [str(one) for one in allowed], 1)
    raise UsageError(
        f"{where} is {value!r}, allowed {', '.join(map(str, allowed))}",
        remedy=f"Did you mean {near[0]}?" if near else "Write one of these", param=where,
    )  # fmt: skip


def check_finite(document: Any, where: str = "") -> None:
    """Raises UsageError naming the key of a number, anywhere in a plain document, that is not finite."""
    if isinstance(document, float) and not math.isfinite(document):
        raise not_finite(where, document)
    if isinstance(document, Mapping):
        for key, value in document.items():
            check_finite(value, f"{where}.{key}" if where else str(key))
    elif isinstance(document, Sequence) and not isinstance(document, str):
        for at, value in enumerate(document):
            check_finite(value, f"{where}[{at}]")


def not_finite(where: str, value: float) -> UsageError:
    return UsageError(f"{where} is {value}", remedy="Give a finite number, or leave the key out", param=where)


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """The value, if it is a mapping. Raises UsageError."""
    if not isinstance(value, Mapping):
        raise wrong(where, f"is {value!r}, expected a mapping")
    return value


def known(given: Collection[Any], names: Collection[str], where: str) -> None:
    """Raises UsageError for the first key that is none of `names`, with the nearest of them."""
    for key in _unknown(given, names):
        near = difflib.get_close_matches(str(key), names, 1, cutoff=0.5)
        path = f"{where}.{key}" if where else str(key)
        remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(names)}"
        raise UsageError(f"{path}: there is no such key", remedy=remedy, param=path)


def _unknown(given: Collection[Any], names: Collection[str]) -> Iterator[Any]:
    yield from (key for key in given if key not in names)


def wrong(where: str, what: str) -> UsageError:
    return UsageError(f"{where} {what}", remedy="See docs/compression.md", param=where)
