"""Deterministic damage: bytes, length fields and JSON, all drawn from one `random.Random`.

Knows how files break and how attackers break them; does not know any format.
"""

import copy
import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

# Numbers that have overflowed, wrapped or allocated too much somewhere before.
HOSTILE_INTS = (
    0,
    1,
    2,
    7,
    8,
    31,
    32,
    127,
    128,
    255,
    256,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x10000,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 32,
    (1 << 53) + 1,
    1 << 61,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 32,
    (1 << 64) - 1,
)
HOSTILE_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1 << 31,
    1 << 63,
    1 << 64,
    10**100,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\0",
    "../../etc/passwd",
    "é" * 300,
    "\ud800",
    "a" * 10_000,
    [],
    {},
    [[[[]]]],
    {"": {"": {"": 0}}},
    [0] * 1000,
    "F32",
    "__metadata__",
)


def damage(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    """One to four random operations on the bytes; `others` are files to splice from."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        if not out:
            break
        rng.choice(_OPERATIONS)(out, rng, others)
    return bytes(out)


def _at(out: bytearray, rng: Random) -> int:
    # Headers are where the danger is: half of all places lie in the first 512 bytes.
    return rng.randrange(min(len(out), 512) if rng.random() < 0.5 else len(out))


def _truncate(out: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    del out[_at(out, rng) :]


def _flip_bits(out: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        out[_at(out, rng)] ^= 1 << rng.randrange(8)


def _set_bytes(out: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    at = _at(out, rng)
    out[at : at + rng.choice((1, 4, 16))] = bytes([rng.choice((0, 0xFF, 0x7F, 0x80, rng.randrange(256)))])


def _set_number(out: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    set_number(out, _at(out, rng), rng.choice((1, 2, 4, 8)), rng)


def _nudge(out: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    at = _at(out, rng)
    out[at] = (out[at] + rng.choice((-2, -1, 1, 2, 16))) & 0xFF


def _delete(out: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    at = _at(out, rng)
    del out[at : at + rng.choice((1, 2, 8, 64))]


def _repeat(out: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    at = _at(out, rng)
    part = bytes(out[at : at + rng.choice((1, 8, 64, 512))])
    out[at:at] = part * rng.choice((1, 2, 16))


def _insert_noise(out: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    at = _at(out, rng)
    out[at:at] = rng.randbytes(rng.choice((1, 4, 32)))


def _splice(out: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    if other:
        begin, at = rng.randrange(len(other)), _at(out, rng)
        part = other[begin : begin + rng.choice((8, 64, 512))]
        out[at : at + rng.choice((0, len(part)))] = part


_OPERATIONS: tuple[Callable[[bytearray, Random, Sequence[bytes]], None], ...] = (
    _truncate,
    _flip_bits,
    _set_bytes,
    _set_number,
    _nudge,
    _delete,
    _repeat,
    _insert_noise,
    _splice,
)


def set_number(out: bytearray, at: int, nbytes: int, rng: Random) -> None:
    """Writes a hostile number, or one near the number that is there, into `nbytes` little-endian bytes."""
    old = int.from_bytes(out[at : at + nbytes], "little")
    new = rng.choice((rng.choice(HOSTILE_INTS), old + rng.choice((-8, -1, 1, 8)), len(out), old * 2))
    out[at : at + nbytes] = (new % (1 << (8 * nbytes))).to_bytes(nbytes, "little")


def damage_json(document: Any, rng: Random) -> bytes:
    """The document with one to three nodes changed, as UTF-8 (or nearly)."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 2, 3))):
        _change_node(document, rng)
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.15:
        text = _break_text(text, rng)
    return text.encode("utf-8", "surrogatepass")


def _change_node(document: Any, rng: Random) -> None:
    holder = rng.choice([node for node in _nodes(document) if node] or [document])
    if not holder:
        return
    key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    value = holder[key]
    action = rng.randrange(6)
    if action == 0:
        del holder[key]
    elif action == 1:
        holder[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
    elif action == 2 and type(value) is int:
        holder[key] = value + rng.choice((-8, -1, 1, 8, value))
    elif action == 3 and isinstance(holder, dict):
        holder[rng.choice(("", "extra", "__metadata__", "\ud83d", "k" * 70_000))] = value
    elif action == 4:
        holder[key] = [value]
    elif isinstance(holder, list):
        holder.insert(key, rng.choice(HOSTILE_INTS))
    else:
        holder[key] = copy.deepcopy(rng.choice(list(holder.values())))


def _nodes(document: Any) -> list[Any]:
    found = [document]
    for node in found:
        inner = node.values() if isinstance(node, dict) else node
        found += [child for child in inner if isinstance(child, dict | list)]
    return found


def _break_text(text: str, rng: Random) -> str:
    depth = rng.choice((10, 70, 1000, 100_000))
    return rng.choice(
        (
            text.replace(",", "," + text[1 : text.find(",") + 1], 1),  # the first key twice
            text[: len(text) // 2],
            text + text,
            " " + text,
            "\ufeff" + text,
            text.replace("]", "," + "[" * depth + "]" * depth + "]", 1),
            text.replace("0", "NaN", 1),
            text.replace("1", "1e999", 1),
            text.replace('"', '"\\ud800', 1),
            text.replace(":", ":" + "9" * 5000, 1),
        )
    )


def with_length(header: bytes, data: bytes, rng: Random) -> bytes:
    """A u64 length (now and then a wrong one), the header, the data."""
    length = len(header) if rng.random() < 0.9 else rng.choice((len(header) + 1, *HOSTILE_INTS))
    return struct.pack("<Q", length % (1 << 64)) + header + data
