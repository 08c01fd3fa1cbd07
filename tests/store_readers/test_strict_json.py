"""Strict JSON: what one parser would read in one way and another in another is refused."""

import json
from pathlib import Path

import pytest

from inhouse.core.errors import FormatError, NotFoundError
from inhouse.store.strict_json import MAX_JSON_DEPTH, parse_object, read_json

pytestmark = pytest.mark.null


def test_a_plain_document_reads_as_the_standard_library_reads_it(tmp_path: Path) -> None:
    document = {"a": [1, -2.5, None, True, {"ü": "\U0001f600"}], "b": {}, "": ""}
    (tmp_path / "config.json").write_text(json.dumps(document), "utf-8")
    assert read_json(tmp_path / "config.json") == document
    (tmp_path / "config.json").write_text(json.dumps(document, ensure_ascii=False, indent=2), "utf-8")
    assert read_json(tmp_path / "config.json") == document


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"[]", "object was expected, found list"),
        (b"null", "object was expected, found NoneType"),
        (b'{"a": 1, "a": 1}', "duplicate key 'a'"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "duplicate key 'b'"),
        (b'{"a": 1, "\\u0061": 2}', "duplicate key 'a'"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "overflows"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\udc00": 1}', "half of a surrogate pair"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        ("{}".encode("utf-16"), "not valid JSON"),
        (b'{"a": "tab\there"}', "not valid JSON"),
        (b'{"a":' * 100_000, "nested deeper|not valid JSON"),
        (b"[" * 5_000_000, "nested deeper|not valid JSON"),
        (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "nested deeper than 64"),
        (b'{"a": [' + b"," * 8_000_001 + b"]}", "8000003 JSON elements"),
    ],
)
def test_refused(text: bytes, cause: str) -> None:
    with pytest.raises(FormatError, match=cause):
        parse_object(text, what="config.json")


def test_the_greatest_depth_is_allowed() -> None:
    inner = MAX_JSON_DEPTH - 1
    parse_object(b'{"a":' + b"[" * inner + b"]" * inner + b"}", what="config.json")


def test_a_surrogate_pair_is_one_character() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude00"}', what="x") == {"a": "\U0001f600"}


def test_size_and_absence(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(NotFoundError):
        read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path, limit=8) == {"a": 1}
    with pytest.raises(FormatError, match="larger than 7 bytes"):
        read_json(path, limit=7)
    with pytest.raises(FormatError, match="cannot be read"):
        read_json(tmp_path)
