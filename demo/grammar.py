"""Patterns of questions: `(a|b|)` chooses, `{name}` calls a macro. Knows nothing of facts or tokens."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOKEN = re.compile(r"[(|)]|\{\w+\}|[^(|){}]+")


@dataclass(frozen=True, slots=True)
class Choice:
    """One of several sequences of parts; a part is text or another choice."""

    options: tuple[tuple["Choice | str", ...], ...]

    def sample(self, rng: random.Random) -> str:
        parts = rng.choice(self.options)
        return "".join(part if isinstance(part, str) else part.sample(rng) for part in parts)

    def count(self) -> int:
        """How many strings the pattern can give (equal ones counted apart)."""
        total = 0
        for parts in self.options:
            product = 1
            for part in parts:
                product *= 1 if isinstance(part, str) else part.count()
            total += product
        return total


def parse(pattern: str, macros: Mapping[str, "Choice"]) -> Choice:
    """The pattern as a tree; raises ValueError for an unbalanced parenthesis, KeyError for an unknown macro."""
    tokens = TOKEN.findall(pattern)
    choice, rest = _options(tokens, 0, macros)
    if rest != len(tokens):
        raise ValueError(f"unbalanced parenthesis in {pattern!r}")
    return choice


def _options(tokens: Sequence[str], at: int, macros: Mapping[str, Choice]) -> tuple[Choice, int]:
    options: list[list[Choice | str]] = [[]]
    while at < len(tokens) and tokens[at] != ")":
        token = tokens[at]
        if token == "|":
            options.append([])
        elif token == "(":
            inner, at = _options(tokens, at + 1, macros)
            if at >= len(tokens):
                raise ValueError("a parenthesis is never closed")
            options[-1].append(inner)
        elif token[0] == "{":
            options[-1].append(macros[token[1:-1]])
        else:
            options[-1].append(token)
        at += 1
    return Choice(tuple(tuple(parts) for parts in options)), at


@dataclass(frozen=True, slots=True)
class Section:
    """One `[name]` block of a file: its `key: value` lines in order."""

    name: str
    lines: tuple[tuple[str, str], ...]

    def values(self, key: str) -> list[str]:
        return [value for k, value in self.lines if k == key]

    def value(self, key: str) -> str:
        return self.values(key)[0]


def read_sections(text: str) -> tuple[dict[str, Choice], list[Section]]:
    """The macros (`@name = pattern`) and sections of a data file; lines before the first section form section ""."""
    macros: dict[str, Choice] = {}
    sections: list[tuple[str, list[tuple[str, str]]]] = [("", [])]
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("@"):
            name, _, pattern = line[1:].partition(" = ")
            macros[name.strip()] = parse(pattern, macros)
        elif line.startswith("["):
            sections.append((line.strip()[1:-1], []))
        else:
            key, _, value = line.partition(": ")
            sections[-1][1].append((key, value))
    return macros, [Section(name, tuple(lines)) for name, lines in sections]
