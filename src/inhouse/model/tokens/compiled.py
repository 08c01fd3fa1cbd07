"""Tokenizers kept compiled in a cache folder: derived from the model's files, never the truth.

Knows the cache file's layout:

    magic 8 | header length u32 | header crc u32 | header (JSON) | sections, each at a multiple of 8

The header names each section's offset, length and CRC-32, the decoding rule, the special tokens, and for vocabularies
that `tables` can serve the shell. Section `json` is the whole tokenizer.json; the others are `tables.Tables`. Nothing
in the file is code. Does not know where a tokenizer came from: the caller gives the key.
"""

import json
import os
import sys
import zlib
from array import array
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

import tokenizers

from inhouse.core.errors import FormatError
from inhouse.model.tokens.library import LibraryCodec, parse
from inhouse.model.tokens.pieces import PieceRule
from inhouse.model.tokens.tables import TableCodec, Tables, can_tabulate, shell_of
from inhouse.model.tokens.tokenizer import Pair, Specials, Tokenizer

VERSION: Final = 2
_MAGIC: Final = b"IHTOK\0\0" + bytes([VERSION])
_ARRAYS: Final[Mapping[str, Literal["I", "Q"]]] = {
    "starts": "I",
    "order": "I",
    "pairs": "Q",
    "ranks": "I",
    "joined": "I",
}
_HEADER_LIMIT: Final = 64 * 2**20


def cache_path(cache: Path, key: str) -> Path:
    """The file of a key; another library or machine byte order has another file."""
    return cache / f"{key}-{VERSION}-{tokenizers.__version__}-{sys.byteorder}.itok"


def load(path: Path) -> Tokenizer:
    """The tokenizer of a compiled file.

    Raises:
        FormatError: the file is damaged or of another version; the caller compiles anew.
    """
    with path.open("rb") as file:
        start = file.read(16)
        if len(start) < 16 or start[:8] != _MAGIC:
            raise FormatError(f"{path.name} is not a compiled tokenizer of version {VERSION}")
        size, crc = array("I", start[8:])
        raw = file.read(size) if size <= _HEADER_LIMIT else b""
        if len(raw) != size or zlib.crc32(raw) != crc:
            raise FormatError(f"the header of {path.name} is damaged")
        header: dict[str, Any] = json.loads(raw)
        sections = header["sections"]
        names = ["text", *_ARRAYS] if header["shell"] else ["json"]
        data = {name: _section(file.fileno(), path, name, sections[name]) for name in names}
    rule, specials = PieceRule(**header["rule"]), _specials(header["specials"])
    if not header["shell"]:
        return Tokenizer(LibraryCodec(parse(data["json"].decode()), header["size"]), rule, specials)
    tables = _tables(header, data)

    def whole() -> str:
        with path.open("rb") as again:
            return _section(again.fileno(), path, "json", sections["json"]).decode()

    return Tokenizer(TableCodec(tables, header["shell"], whole), rule, specials)


def save(path: Path, codec: LibraryCodec, rule: PieceRule, specials: Specials) -> None:
    """Compiles into a file, atomically.

    Raises:
        OSError: the folder cannot be written.
    """
    text = codec.library.to_str()
    content = json.loads(text)
    tabulated = can_tabulate(content)
    header: dict[str, Any] = {
        "size": codec.size,
        "rule": asdict(rule),
        "specials": asdict(specials) | {"eos_ids": sorted(specials.eos_ids)},
        "shell": shell_of(content, codec.size) if tabulated else "",
        "whole_words": bool(content["model"].get("ignore_merges")),
        "added": [[i, special] for i, special in codec.added.items()],
        "outside": [i for i in codec.added if codec.token_of(i) not in content["model"]["vocab"]] if tabulated else [],
    }
    sections = {"json": text.encode()} | (_arrays(content, codec.size) if tabulated else {})
    _write(path, header, sections)


def _arrays(content: Mapping[str, Any], size: int) -> dict[str, bytes]:
    vocab: dict[str, int] = content["model"]["vocab"]
    tokens = [b""] * size
    for token, token_id in vocab.items():
        tokens[token_id] = token.encode()
    for entry in content.get("added_tokens") or []:
        tokens[entry["id"]] = entry["content"].encode()
    starts, at = array("I", [0]), 0
    for token_bytes in tokens:
        at += len(token_bytes)
        starts.append(at)
    order = array("I", sorted((i for i in range(size) if tokens[i]), key=tokens.__getitem__))
    # A pair listed twice has its last rank, as in the library.
    merges = {
        vocab[left] << 32 | vocab[right]: (rank, vocab[left + right])
        for rank, (left, right) in enumerate(content["model"]["merges"])
    }
    pairs = array("Q", sorted(merges))
    return {
        "text": b"".join(tokens),
        "starts": starts.tobytes(),
        "order": order.tobytes(),
        "pairs": pairs.tobytes(),
        "ranks": array("I", (merges[pair][0] for pair in pairs)).tobytes(),
        "joined": array("I", (merges[pair][1] for pair in pairs)).tobytes(),
    }


def _tables(header: Mapping[str, Any], data: Mapping[str, bytes]) -> Tables:
    arrays = {name: memoryview(data[name]).cast(kind) for name, kind in _ARRAYS.items()}
    return Tables(
        size=header["size"],
        text=memoryview(data["text"]),
        added={i: special for i, special in header["added"]},
        outside=frozenset(header["outside"]),
        whole_words=header["whole_words"],
        **arrays,
    )


def _specials(fields: Mapping[str, Any]) -> Specials:
    return Specials(
        fields["bos_id"],
        frozenset(fields["eos_ids"]),
        tuple(fields["prefix"]),
        tuple(fields["suffix"]),
        fields["names"],
        fields["templates"],
        _pair(fields["pair"]),
    )


def _pair(fields: Mapping[str, Any] | None) -> Pair | None:
    if fields is None:
        return None
    first, a, middle, b, last = fields["types"]
    prefix, between, suffix = (tuple(fields[name]) for name in ("prefix", "middle", "suffix"))
    return Pair(prefix, between, suffix, (first, a, middle, b, last))


def _section(descriptor: int, path: Path, name: str, place: list[int]) -> bytes:
    """Read, not mapped: a file cut short under a running server must not kill it."""
    offset, length, crc = place
    data = os.pread(descriptor, length, offset)
    if len(data) != length or zlib.crc32(data) != crc:
        raise FormatError(f"section {name} of {path.name} is damaged")
    return data


def _write(path: Path, header: dict[str, Any], sections: Mapping[str, bytes]) -> None:
    # Offsets stand in the header, whose length moves them: they are written with a fixed width.
    places = {name: [0, len(data), zlib.crc32(data)] for name, data in sections.items()}
    blank = json.dumps(header | {"sections": places}, ensure_ascii=False).encode()
    at = _aligned(16 + len(blank) + 16 * len(sections))
    for name, data in sections.items():
        places[name][0] = at
        at = _aligned(at + len(data))
    raw = json.dumps(header | {"sections": places}, ensure_ascii=False).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(_MAGIC + array("I", [len(raw), zlib.crc32(raw)]).tobytes() + raw)
            for name, data in sections.items():
                file.seek(places[name][0])
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _aligned(at: int) -> int:
    return -(-at // 8) * 8
