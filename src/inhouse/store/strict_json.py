"""JSON read strictly: one meaning or none.

Refuses what lenient parsers let pass and readers then disagree about: duplicate keys, NaN and Infinity (spelt or by
overflow), lone surrogates, bytes that are not UTF-8, nesting and size beyond a limit. Does not know what
the document is about. Source: RFC 8259, RFC 7493 (I-JSON).
"""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from inhouse.core.errors import FormatError, NotFoundError

MAX_JSON_BYTES = 64 << 20
MAX_JSON_DEPTH = 64
# Each list, object or element costs about 60 bytes once parsed: this many cost at most half a GiB.
MAX_JSON_ELEMENTS = 8_000_000


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.

    Raises:
        NotFoundError: there is no such file.
        FormatError: too large, not UTF-8, not one JSON object, duplicate keys, NaN or Infinity, nested
            deeper than 64.
    """
    return parse_object(_read(path, limit), what=path.name)


def read_json_list(path: Path, limit: int = MAX_JSON_BYTES) -> list[Any]:
    """The same for a file that holds one JSON list."""
    found: list[Any] = _parse(_read(path, limit), path.name, MAX_JSON_DEPTH, list)
    return found


def _read(path: Path, limit: int) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}", remedy="Check the path.") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}", remedy="Check the path.") from None
    if len(data) > limit:
        raise FormatError(
            f"{path.name} is larger than {limit} bytes", remedy="This is not a file of the kind expected here."
        )
    return data


def parse_object(data: bytes, *, what: str, max_depth: int = MAX_JSON_DEPTH) -> dict[str, Any]:
    """One JSON object in UTF-8; `what` names the document in errors. Raises FormatError."""
    found: dict[str, Any] = _parse(data, what, max_depth, dict)
    return found


def _parse(data: bytes, what: str, max_depth: int, kind: type) -> Any:
    """The one value of `kind` in a document."""
    elements = data.count(b",") + data.count(b"[") + data.count(b"{")
    if elements > MAX_JSON_ELEMENTS:
        raise FormatError(
            f"{what}: {elements} JSON elements, the limit is {MAX_JSON_ELEMENTS}", remedy="Refused as hostile."
        )
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_object,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except RecursionError:
        raise FormatError(f"{what}: JSON nested deeper than {max_depth}", remedy="Refused as hostile.") from None
    except ValueError as error:
        raise FormatError(f"{what}: not valid JSON: {error}", remedy="Fetch the file again.") from None
    if not isinstance(value, kind):
        wanted = "list" if kind is list else "object"
        raise FormatError(f"{what}: a JSON {wanted} was expected, found {type(value).__name__}")
    _check_depth(value, what, max_depth)
    if b"\\ud" in data or b"\\uD" in data:
        _check_surrogates(value, what)
    return value


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key[:80]!a}")
            seen.add(key)
    return out


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} overflows a double")
    return value


def _check_depth(value: Any, what: str, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise FormatError(f"{what}: JSON nested deeper than {max_depth}", remedy="Refused as hostile.")


def _children(node: Any) -> list[Any]:
    inner = node.values() if isinstance(node, dict) else node
    return [child for child in inner if isinstance(child, dict | list)]


def _check_surrogates(value: Any, what: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(f"{what}: a string holds half of a surrogate pair") from None
