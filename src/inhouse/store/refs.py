"""How models are named: `name`, `name:3`, `name:latest`, `name@prod`, or an alias of its own.

Knows the grammar of names; does not know which of them exist.

    name     one to three parts between slashes, each of letters, digits, '.', '_', '-', beginning with a letter
             or digit; 96 characters a part
    :3       the third version; `:latest` the newest
    @prod    the version that the model's alias `prod` stands for; `:prod` means the same
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from inhouse.core.errors import UsageError

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_NAME = re.compile(rf"{_PART}(?:/{_PART}){{0,2}}")
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_REF = re.compile(r"(?P<name>[^:@]+)(?:(?P<mark>[:@])(?P<tag>[^:@]+))?")
LATEST = "latest"
MAX_NUMBER = 1 << 31


@dataclass(frozen=True, slots=True)
class Ref:
    """A parsed reference: at most one of `number` and `alias` is set; neither means the newest version."""

    name: str
    number: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        if self.number is not None:
            return f"{self.name}:{self.number}"
        return f"{self.name}@{self.alias}" if self.alias else self.name


def parse_ref(text: str) -> Ref:
    """Reads a reference. Raises UsageError if it is not one."""
    match = _REF.fullmatch(text)
    if match is None:
        raise UsageError(f"{text[:120]!r} is not a model reference", remedy="Write name, name:3 or name@alias.")
    name, tag = check_name(match["name"]), match["tag"]
    if tag is None or tag == LATEST:
        return Ref(name)
    if match["mark"] == ":" and tag.isascii() and tag.isdigit():
        number = int(tag) if len(tag) <= 10 else MAX_NUMBER
        if not 0 < number < MAX_NUMBER:
            raise UsageError(f"{text[:120]!r}: versions count from 1", param="version")
        return Ref(name, number=number)
    return Ref(name, alias=check_alias(tag))


def check_name(name: str) -> str:
    """The name itself. Raises UsageError if a model cannot be called so."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name[:120]!r} cannot be a model name",
            remedy="Use letters, digits, '.', '_' and '-', in up to three parts between slashes.",
            param="name",
        )
    return name


def check_alias(alias: str) -> str:
    """The alias itself. Raises UsageError if no alias can be called so."""
    if not _WORD.fullmatch(alias) or alias == LATEST:
        raise UsageError(
            f"{alias[:80]!r} cannot be an alias",
            remedy=f"Begin with a letter, then letters, digits, '.', '_' or '-'; not {LATEST!r}.",
            param="alias",
        )
    return alias


def name_from(text: str) -> str:
    """A model name made from any text (a file's stem, a hub's repository), changed as little as possible."""
    parts = [re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-._")[:96] for part in text.split("/")]
    return check_name("/".join(part for part in parts if part)[:200] or "model")


def hint(wanted: str, known: Iterable[str]) -> str:
    """A sentence that names what might have been meant, for the remedy of a NotFoundError."""
    names = sorted(known)
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    near += [name for name in names if wanted and wanted.lower() in name.lower() and name not in near][:3]
    if near:
        return f"Did you mean {' or '.join(near[:3])}?"
    if not names:
        return "The store is empty; import or pull a model first."
    return f"There are: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
