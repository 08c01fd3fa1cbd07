"""What is fuzzed: for each format its seeds, its way of breaking them, and what must hold for every input.

What must hold: an InhouseError, or a source whose every tensor has the announced size and can be read to its
last byte; and the folder holds the same files afterwards. Anything else that escapes is a failure.
"""

import json
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from inhouse.core.errors import FormatError, InhouseError
from inhouse.core.tensors import TensorSource
from inhouse.model.build import build
from inhouse.model.families.table import resolve
from inhouse.store.gguf_values import Cursor, Strings
from inhouse.store.safetensors import open_safetensors, open_sharded
from inhouse.store.source import check_finite, open_source, read_json
from inhouse.store.stored_model import TABLE, WEIGHTS
from inhouse.store.stored_source import StoredSource

from . import seeds
from .mutate import damage, damage_json, set_number, with_length


@dataclass(frozen=True, slots=True)
class Target:
    """`seeds()` gives valid inputs; `mutate(seeds, rng)` one input; `accept(path)` raises InhouseError, or
    returns having read everything, or breaks the promise by any other exception. `beside()` gives files
    that lie in the folder of the input."""

    name: str
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[Sequence[bytes], Random], bytes]
    accept: Callable[[Path], None]
    beside: Callable[[], dict[str, bytes]] = dict


def targets() -> dict[str, Target]:
    """All targets by name; a new one is a row here."""
    rows = (
        Target("safetensors", seeds.safetensors_files, _mutate_safetensors, _accept_source),
        Target(
            "safetensors-index", lambda: [json.dumps(seeds.INDEX).encode()], _mutate_index, _accept_index, seeds.shards
        ),
        Target("gguf", seeds.gguf_files, _mutate_gguf, _accept_source),
        Target("torch", seeds.torch_files, _mutate_torch, _accept_source),
        Target(
            "inhouse.json", _stored_seed(TABLE), _mutate_stored_table, _accept_stored_table, _stored_beside(WEIGHTS)
        ),
        Target("inhouse", _stored_seed(WEIGHTS), _mutate_safetensors, _accept_stored_weights, _stored_beside(TABLE)),
        Target("config.json", seeds.config_files, _mutate_config, _accept_config),
    )
    return {row.name: row for row in rows}


def make_input(target: Target, base: Sequence[bytes], seed: int, index: int) -> bytes:
    """Input number `index`: a function of seed, target and index alone."""
    return target.mutate(base, Random(f"{seed}/{target.name}/{index}"))


# Ways of breaking: half of the inputs are broken blindly, half where the format keeps its numbers.


def _mutate_safetensors(base: Sequence[bytes], rng: Random) -> bytes:
    data = rng.choice(base)
    if rng.random() < 0.5:
        return damage(data, rng, base)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return with_length(damage_json(header, rng), data[8 + length :], rng)


def _mutate_index(base: Sequence[bytes], rng: Random) -> bytes:
    return damage(base[0], rng, base) if rng.random() < 0.3 else damage_json(seeds.INDEX, rng)


def _mutate_config(base: Sequence[bytes], rng: Random) -> bytes:
    return damage(rng.choice(base), rng, base) if rng.random() < 0.3 else damage_json(rng.choice(seeds.CONFIGS), rng)


class _FieldRecorder(Cursor):
    """A cursor that notes where the numbers of a valid file stand."""

    def __init__(self, data: bytes) -> None:
        super().__init__(np.frombuffer(data, np.uint8), "seed")
        self.fields: list[tuple[int, int]] = []

    def _advance(self, nbytes: int, what: str) -> int:
        if nbytes in (1, 2, 4, 8):
            self.fields.append((self.at, nbytes))
        return super()._advance(nbytes, what)


def _gguf_fields(data: bytes) -> list[tuple[int, int]]:
    cursor = _FieldRecorder(data)
    cursor.at = 4
    cursor.u32("version")
    n_tensors, n_kv = cursor.u64("tensors"), cursor.u64("pairs")
    for _ in range(n_kv):
        cursor.string("key")
        cursor.value(cursor.u32("kind"), "value")
    for _ in range(n_tensors):
        cursor.string("name")
        for _ in range(cursor.u32("rank")):
            cursor.u64("dim")
        cursor.u32("type")
        cursor.u64("offset")
    return cursor.fields


def _mutate_gguf(base: Sequence[bytes], rng: Random) -> bytes:
    data = rng.choice(base)
    if rng.random() < 0.4:
        return damage(data, rng, base)
    out = bytearray(data)
    fields = _gguf_fields(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, nbytes = rng.choice(fields)
        set_number(out, at, nbytes, rng)
    return bytes(out)


_OPCODES = tuple(code.code.encode("latin-1") for code in pickletools.opcodes)
_PAYLOADS = (
    b"cos\nsystem\nX\x04\x00\x00\x00true\x85R",
    b"cbuiltins\neval\nX\x01\x00\x00\x001\x85R",
    b"ctorch\nFloatStorage\n",
    b"ctorch\nSize\n",
    b"}",
    b")",
    b"N",
    b"0",
    b"2",
    b"h\x00",
    b"q\x00",
    b"\x94",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"J\xff\xff\xff\xff",
    b"r\xff\xff\xff\xff",
)


def _mutate_torch(base: Sequence[bytes], rng: Random) -> bytes:
    if rng.random() < 0.4:
        return damage(rng.choice(base), rng, base)
    legacy = rng.random() < 0.5
    pickled = seeds.state_pickle(legacy)
    if rng.random() < 0.2:
        pickled = damage(pickled, rng, [pickled])
    else:
        pickled = _damage_opcodes(pickled, rng)
    return seeds.torch_legacy(pickled) if legacy else seeds.torch_zip(pickled)


def _damage_opcodes(pickled: bytes, rng: Random) -> bytes:
    """The pickle with operations deleted, repeated, exchanged, inserted, or their numbers changed."""
    starts = [position or 0 for _, _, position in pickletools.genops(pickled)]
    operations = [pickled[a:b] for a, b in zip(starts, [*starts[1:], len(pickled)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(operations))
        action = rng.randrange(6)
        if action == 0 and len(operations) > 1:
            del operations[at]
        elif action == 1:
            operations.insert(at, rng.choice(_PAYLOADS))
        elif action == 2:
            operations.insert(at, rng.choice(_OPCODES) + rng.randbytes(rng.choice((0, 1, 4))))
        elif action == 3:
            operations[at : at + 1] = [operations[at]] * rng.choice((2, 100))
        elif action == 4:
            other = rng.randrange(len(operations))
            operations[at], operations[other] = operations[other], operations[at]
        else:
            changed = bytearray(operations[at])
            set_number(changed, min(1, len(changed) - 1), max(1, len(changed) - 1) if len(changed) < 9 else 4, rng)
            operations[at] = bytes(changed)
    return b"".join(operations)


# What must hold.


def _accept_source(path: Path) -> None:
    source = open_source(path)
    try:
        _read_all(source)
    finally:
        source.close()


def _accept_index(path: Path) -> None:
    source = open_sharded(path)
    try:
        _read_all(source)
    finally:
        source.close()


def _stored_seed(name: str) -> Callable[[], list[bytes]]:
    return lambda: [seeds.stored_model()[name]]


def _stored_beside(name: str) -> Callable[[], dict[str, bytes]]:
    return lambda: {name: seeds.stored_model()[name]}


def _mutate_stored_table(base: Sequence[bytes], rng: Random) -> bytes:
    document = json.loads(base[0])
    if rng.random() < 0.1:  # what no reader of weights looks at
        return json.dumps(document | {"manifest": {"recipe": rng.random()}}).encode()
    return damage(base[0], rng, base) if rng.random() < 0.3 else damage_json(document, rng)


def _accept_stored_table(path: Path) -> None:
    _read_stored(path.with_name(WEIGHTS), path)


def _accept_stored_weights(path: Path) -> None:
    _read_stored(path, path.with_name(TABLE))


def _read_stored(weights: Path, table: Path) -> None:
    base = open_safetensors(weights)
    try:
        source = StoredSource(base, read_json(table))
        for name in source:
            info = source.info(name)
            assert source.hints
            source.check(name)
            if len(info.shape) == 2:
                values = source.packed(name).dequantize()
                assert values.shape == info.shape
        for name in source.ranks:
            assert len(source.form(name).shape) == 2
    finally:
        base.close()


def _accept_config(path: Path) -> None:
    config = read_json(path)
    json.dumps(config).encode("utf-8")
    spec, _ = resolve(config)
    programs = build(spec)
    assert len(str(programs)) > 0


def _read_all(source: TensorSource) -> None:
    names = list(source)
    assert len(names) == len(source) == len(set(names))
    for name in names:
        info, raw = source.info(name), source.raw(name)
        assert name in source
        assert info.name == name
        assert raw.dtype == np.uint8
        assert raw.shape == (info.nbytes,)
        assert not raw.flags.writeable
        int(raw.sum(dtype=np.uint64))
        try:
            check_finite(source, name)
        except FormatError:
            pass
    for key, value in source.metadata.items():
        assert isinstance(key, str)
        _read_value(value)
    if source.format == "gguf":
        try:
            build(resolve(source.metadata, names)[0])
        except InhouseError:
            pass


def _read_value(value: Any) -> None:
    if isinstance(value, Strings):
        try:
            assert len(list(value)) == len(value)
        except InhouseError:
            assert all(isinstance(value.bytes_at(at), bytes) for at in range(len(value)))
    elif isinstance(value, list):
        for item in value:
            _read_value(item)
    elif isinstance(value, np.ndarray):
        assert len(value.tobytes()) == value.nbytes
