"""Forms and specs as what a run keeps of them: a Form is one file of its arrays, a spec is JSON.

Knows dataclass fields, not what they mean: a Form that gains a field needs no change here.
"""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from inhouse.compress.journal import Journal
from inhouse.core.errors import FormatError
from inhouse.runtime.form import Form
from inhouse.runtime.packed import Packed

ALIGN = 64

S = TypeVar("S")


def write_form(journal: Journal, form: Form) -> dict[str, Any]:
    """The blob of a Form: the arrays at multiples of 64 bytes, and under `parts` what is where."""
    arrays: list[npt.NDArray[Any]] = []
    place = 0

    def put(array: npt.NDArray[Any]) -> int:
        nonlocal place
        at = place
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        padding = -raw.nbytes % ALIGN
        arrays.extend([raw, np.zeros(padding, np.uint8)])
        place += raw.nbytes + padding
        return at

    def encode(value: Any) -> Any:
        if isinstance(value, Packed):
            return {"packed": value.format, "shape": list(value.shape), "at": put(value.data), "size": value.nbytes}
        if isinstance(value, np.ndarray):
            return {"dtype": value.dtype.str, "shape": list(value.shape), "at": put(value), "size": value.nbytes}
        if isinstance(value, tuple):
            return [encode(inner) for inner in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise FormatError(f"a form holds a {type(value).__name__}, which has no file form")

    parts = {field.name: encode(getattr(form, field.name)) for field in fields(form)}
    return journal.write(arrays).to_dict() | {"parts": parts}


def read_form(path: Path, parts: Mapping[str, Any]) -> Form:
    """The Form of a blob, its arrays views of the mapped file."""
    size = path.stat().st_size
    raw = np.memmap(path, np.uint8, mode="r") if size else np.empty(0, np.uint8)

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(decode(inner) for inner in value)
        if not isinstance(value, Mapping):
            return value
        view = np.asarray(raw[value["at"] : value["at"] + value["size"]])
        if "packed" in value:
            return Packed(value["packed"], (value["shape"][0], value["shape"][1]), view)
        return view.view(np.dtype(value["dtype"])).reshape(value["shape"])

    return Form(**{name: decode(value) for name, value in parts.items()})


def spec_json(spec: Any) -> Any:
    """A spec (a dataclass of dataclasses, tuples and plain values) as JSON."""
    if is_dataclass(spec):
        return {field.name: spec_json(getattr(spec, field.name)) for field in fields(spec)}
    return [spec_json(inner) for inner in spec] if isinstance(spec, tuple) else spec


def read_spec(document: Any, like: S) -> S:
    """A spec of the type of `like` from its JSON. Raises FormatError where they disagree."""
    made = _decode(document, type(like))
    if not isinstance(made, type(like)):
        raise FormatError("the run's spec is damaged", remedy="Begin anew with --restart")
    return made


def _decode(value: Any, kind: Any) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if value is None:
        return None
    if origin in (typing.Union, types.UnionType):
        return _decode(value, next(one for one in inner if one is not type(None)))
    if origin is tuple:
        return tuple(_decode(one, inner[0]) for one in value)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = {field.name: field for field in fields(kind)}
        lacking = [name for name, field in known.items() if name not in value and field.default is MISSING]
        if set(value) - set(known) or lacking:
            raise FormatError("the run's spec is of another version", remedy="Begin anew with --restart")
        return kind(**{name: _decode(one, hints[name]) for name, one in value.items()})
    return kind(value) if kind in (int, float, str, bool) else value
