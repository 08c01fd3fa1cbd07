"""Strict reading of tokenizer files written by others: sizes, types, duplicates, ranges, before any library sees them.

Knows JSON and the shape of tokenizer.json. Does not know what a tokenizer does.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from inhouse.core.errors import FormatError, UnsupportedError

MAX_FILE: Final = 256 * 2**20
"""Bytes of one tokenizer file. The largest in use (262k entries) is 34 MB."""

MAX_ID: Final = 2**24
"""Ids are below this. The largest vocabulary in use has 262,144."""

MAX_TOKEN: Final = 1024
"""Characters of one token that can be built by merges. The longest in use has 512 (a run of spaces)."""

MAX_PATTERN: Final = 16_384
"""Characters of one regular expression. The longest in use has about 1,000."""

MAX_GROWTH: Final = 4096
"""How many times longer than the text a normaliser may make it."""


def read_bytes(path: Path) -> bytes:
    """The file's bytes; FormatError where it is too large or cannot be read."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE:
            raise FormatError(f"{path.name} has {size} bytes, the limit is {MAX_FILE}")
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"{path.name} cannot be read: {error.strerror}") from error


def text_of(data: bytes, name: str) -> str:
    """UTF-8 text; FormatError naming the byte where it is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error


def json_object(data: bytes, name: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or infinity; FormatError naming what is wrong."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            double = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"{name} has the key {double[:60]!r} twice")
        return found

    def no_constant(word: str) -> Any:
        raise FormatError(f"{name} holds {word}")

    text = text_of(data, name)
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError as error:
        raise FormatError(f"{name} is nested too deeply") from error
    except ValueError as error:
        raise FormatError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{name} holds a {type(value).__name__}, an object was expected")
    return value


def optional_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object of a file that may be absent (then empty)."""
    path = folder / name
    return json_object(read_bytes(path), name) if path.is_file() else {}


def token_id(value: Any, what: str) -> int:
    """A whole number from 0 to MAX_ID - 1."""
    if type(value) is not int or not 0 <= value < MAX_ID:
        raise FormatError(f"{what} has the id {str(value)[:40]}, ids are whole numbers from 0 to {MAX_ID - 1}")
    return value


def vocabulary(value: Any, name: str) -> dict[str, int]:
    """A mapping of token to id without two tokens of one id."""
    if not isinstance(value, dict):
        raise FormatError(f"the vocabulary of {name} is a {type(value).__name__}, an object was expected")
    ids: list[Any] = list(value.values())
    if not all(type(i) is int for i in ids) or (ids and not 0 <= min(ids) <= max(ids) < MAX_ID):
        for token, i in value.items():
            token_id(i, f"token {token[:60]!r} of {name}")
    if len(set(ids)) != len(ids):
        seen: dict[int, str] = {}
        for token, i in value.items():
            if i in seen:
                raise FormatError(f"tokens {seen[i][:60]!r} and {token[:60]!r} of {name} share the id {i}")
            seen[i] = token
    return value


def tokenizer_json(data: bytes) -> dict[str, Any]:
    """The object of a tokenizer.json, its vocabulary, added tokens and patterns checked.

    Raises:
        FormatError: naming what is wrong.
        UnsupportedError: merges with dropout (an encoder that is random).
    """
    content = json_object(data, "tokenizer.json")
    model = content.get("model")
    if not isinstance(model, dict):
        raise FormatError("tokenizer.json has no model")
    vocab = model.get("vocab")
    if isinstance(vocab, list):
        _scored(vocab, model.get("unk_id"))
    else:
        merges(model, vocabulary(vocab, "tokenizer.json"))
    if model.get("dropout"):
        raise UnsupportedError(f"the tokenizer merges at random (dropout {model['dropout']})")
    longest = model.get("max_input_chars_per_word", 100)
    if type(longest) is not int or not 0 < longest <= 10_000:
        raise FormatError(f"tokenizer.json has max_input_chars_per_word {str(longest)[:40]}, 1 to 10000 is possible")
    added_tokens(content.get("added_tokens") or [])
    _patterns(content)
    if _growth(content.get("normalizer")) > MAX_GROWTH:
        raise FormatError(f"tokenizer.json has a normaliser that makes text more than {MAX_GROWTH} times longer")
    return content


def merges(model: Mapping[str, Any], vocab: Mapping[str, int]) -> None:
    """Checks that every merge of a model names tokens of its vocabulary and gives one."""
    pairs = model.get("merges") or []
    prefix = model.get("continuing_subword_prefix") or ""
    if not isinstance(pairs, list) or not isinstance(prefix, str):
        raise FormatError(f"the merges of tokenizer.json are a {type(pairs).__name__}, a list was expected")
    if not prefix and _all_join(pairs, vocab):
        return
    for number, pair in enumerate(pairs):
        match pair.split(" ") if isinstance(pair, str) else pair:
            case [str(left), str(right)]:
                for token in (left, right, left + right.removeprefix(prefix)):
                    if token not in vocab:
                        raise FormatError(f"merge {number} of tokenizer.json needs {token[:60]!r}, which is no token")
            case _:
                raise FormatError(f"merge {number} of tokenizer.json is {str(pair)[:60]}, two tokens were expected")


def _all_join(pairs: list[Any], vocab: Mapping[str, int]) -> bool:
    """The quick look at 150,000 merges that are as they should be."""
    try:
        return all(
            left in vocab and right in vocab and left + right in vocab
            for left, right in (pair.split(" ") if isinstance(pair, str) else pair for pair in pairs)
        )
    except (TypeError, ValueError):
        return False


def added_tokens(value: Any) -> None:
    """Checks the `added_tokens` list: contents and ids there, and no two of the same."""
    if not isinstance(value, list):
        raise FormatError(f"added_tokens of tokenizer.json is a {type(value).__name__}, a list was expected")
    by_id: dict[int, str] = {}
    for token in value:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise FormatError(
                f"added_tokens of tokenizer.json holds {str(token)[:60]}, an object with a content was expected"
            )
        content = token["content"]
        number = token_id(token.get("id"), f"added token {content[:60]!r}")
        if not content:
            raise FormatError(f"added token {number} of tokenizer.json is empty")
        if by_id.setdefault(number, content) != content:
            raise FormatError(f"added tokens {by_id[number][:60]!r} and {content[:60]!r} share the id {number}")


def _scored(vocab: list[Any], unknown: Any) -> None:
    """Checks a Unigram vocabulary: a list of (piece, finite score), no piece twice."""
    seen: set[str] = set()
    for number, entry in enumerate(vocab):
        match entry:
            case [str(piece), int() | float() as score] if math.isfinite(score):
                if piece in seen:
                    raise FormatError(f"piece {piece[:60]!r} stands twice in the vocabulary of tokenizer.json")
                seen.add(piece)
            case _:
                raise FormatError(f"entry {number} of the vocabulary is {str(entry)[:60]}, [piece, score] was expected")
    if unknown is not None and (type(unknown) is not int or not 0 <= unknown < len(vocab)):
        raise FormatError(f"unk_id {str(unknown)[:40]} is outside the vocabulary of {len(vocab)}")


def _patterns(content: Mapping[str, Any]) -> None:
    """Refuses regular expressions too long to be honest."""
    rest: list[Any] = [content.get("normalizer"), content.get("pre_tokenizer"), content.get("decoder")]
    while rest:
        match rest.pop():
            case {"Regex": str(pattern)} if len(pattern) > MAX_PATTERN:
                raise FormatError(
                    f"a pattern of tokenizer.json has {len(pattern)} characters, the limit is {MAX_PATTERN}"
                )
            case dict() as part:
                rest.extend(part.values())
            case list() as parts:
                rest.extend(parts)


def _growth(normalizer: Any) -> int:
    """The most times that a normaliser's replacements can lengthen a text."""
    match normalizer:
        case {"type": "Sequence", "normalizers": list(steps)}:
            return min(math.prod(_growth(step) for step in steps), MAX_GROWTH + 1)
        case {"type": "Replace", "content": str(text)}:
            return min(max(1, len(text)), MAX_GROWTH + 1)
        case {"type": "Prepend", "prepend": str(text)}:
            return min(1 + len(text), MAX_GROWTH + 1) if len(text) > 16 else 1
        case _:
            return 1
