"""The library's proof of a step against `check_step`, which defines it: the same verdict on steps that are right and on
steps of which one number, type or length was changed."""

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from inhouse.core.errors import UsageError
from inhouse.runtime.native_library import library
from inhouse.runtime.native_steps import NativeSteps
from inhouse.runtime.program import StateGroup, StateKind
from inhouse.runtime.step import BLOCK_SIZE, I32, Step, StepRules, check_step

BLOCKS = {"full": 40, "window": 9, "cross": 12, "other": 3}
RULES = StepRules(
    vocab_size=50,
    context_length=200,
    types=2,
    groups=(
        StateGroup("full", StateKind.PAGED, (0,), 1, 8, 8),
        StateGroup("window", StateKind.WINDOW, (1,), 1, 8, 8, window=20),
    ),
    cross=(StateGroup("cross", StateKind.CROSS, (0,), 1, 8, 8),),
)
ARRAYS = ("tokens", "positions", "sequences", "lengths", "sampled", "types", "prefixes", "encoder_lengths", "adapters")


def ints(values: object) -> I32:
    return np.array(values, np.int32)


def sound_step(random: np.random.Generator) -> Step:
    """Some sequences with a few rows each; blocks that no row reads are not lent."""
    count = int(random.integers(1, 4))
    rows = random.integers(1, 6, count)
    starts = random.integers(0, 60, count)
    lengths = starts + rows
    encoder = random.integers(1, 30, count)
    width = int(lengths.max()) // BLOCK_SIZE + 2
    tables = {}
    for name, window in (("full", 0), ("window", 20)):
        table = np.full((count, width), -1, np.int32)
        for n in range(count):
            first = max(int(starts[n]) - window + 1, 0) // BLOCK_SIZE if window else 0
            last = -(-int(lengths[n]) // BLOCK_SIZE)
            table[n, first:last] = random.integers(0, BLOCKS[name], last - first)
        tables[name] = table
    tables["cross"] = random.integers(0, BLOCKS["cross"], (count, 2)).astype(np.int32)
    total = int(rows.sum())
    return Step(
        tokens=ints(random.integers(0, 50, total)),
        positions=np.concatenate([np.arange(s, s + r, dtype=np.int32) for s, r in zip(starts, rows, strict=True)]),
        sequences=np.repeat(np.arange(count, dtype=np.int32), rows),
        lengths=ints(lengths),
        tables=tables,
        sampled=ints(random.integers(0, total, int(random.integers(0, 3)))),
        adapters=np.zeros(count, np.int32),
        types=ints(random.integers(0, 2, total)),
        prefixes=ints([random.integers(0, length + 1) for length in lengths]),
        encoder_lengths=ints(encoder),
    )


def changed(step: Step, random: np.random.Generator) -> Step:
    """The step with one entry of one array or table set to something near, or to an extreme."""
    value = int(random.choice([-2, -1, 0, 1, 2, 15, 16, 49, 50, 200, 201, 2**31 - 1, -(2**31)]))
    if random.random() < 0.4:
        name = str(random.choice(list(step.tables)))
        table = step.tables[name].copy()
        table[random.integers(len(table)), random.integers(table.shape[1])] = value
        return replace(step, tables={**step.tables, name: table})
    name = str(random.choice(ARRAYS[:-1]))
    array = getattr(step, name).copy()
    if not array.size:
        return step
    at = random.integers(array.size)
    array[at] = value if random.random() < 0.6 else array[at] + random.integers(-2, 3)
    return replace(step, **{name: array})


def steps() -> NativeSteps:
    made = NativeSteps(library(), RULES, list(BLOCKS))
    made.allocated(BLOCKS)
    return made


def fault(check: object, *arguments: object) -> str:
    try:
        check(*arguments)  # type: ignore[operator]
    except UsageError as error:
        return error.message
    return ""


def test_both_give_the_same_verdict() -> None:
    native, random = steps(), np.random.default_rng(7)
    verdicts = []
    for _ in range(2000):
        step = changed(sound_step(random), random)
        wanted = fault(check_step, RULES, step, BLOCKS)
        assert fault(native.make, step) == wanted
        verdicts.append(bool(wanted))
    assert 0.3 < np.mean(verdicts) < 0.9  # both kinds were tried


def test_sound_steps_arrive_as_they_are() -> None:
    native, random = steps(), np.random.default_rng(8)
    for _ in range(50):
        step = sound_step(random)
        made = native.make(step)
        assert (made.rows, made.sequences, made.sampled) == (step.tokens.size, step.lengths.size, step.sampled.size)
        for place, array in (
            (made.tokens, step.tokens), (made.positions, step.positions), (made.sequence_of, step.sequences),
            (made.lengths, step.lengths), (made.sampled_rows, step.sampled), (made.types, step.types),
            (made.prefixes, step.prefixes), (made.encoder_lengths, step.encoder_lengths),
            (made.adapters, step.adapters),
        ):  # fmt: skip
            assert at(place, array.size) == array.tolist()
        for i, name in enumerate(BLOCKS):
            table = step.tables.get(name)
            assert made.table_widths[i] == (0 if table is None else table.shape[1])
            if table is not None:
                assert at(made.tables[i], table.size) == table.reshape(-1).tolist()


def at(address: int, count: int) -> list[int]:
    return list((ctypes.c_int32 * count).from_address(address)) if count else []


@pytest.mark.parametrize("name", ARRAYS)
def test_types_and_lengths_are_seen(name: str) -> None:
    step = sound_step(np.random.default_rng(9))
    array = getattr(step, name)
    for bad in (array.astype(np.int64), array[None], np.concatenate([array, array[:1], ints([0])])):
        change: dict[str, Any] = {name: bad}
        broken = replace(step, **change)
        wanted = fault(check_step, RULES, broken, BLOCKS)
        if wanted:  # one more sampled row is another step, not a wrong one
            assert fault(steps().make, broken) == wanted


@pytest.mark.parametrize("bad", [None, "wide", "short", "flat", "turned"])
def test_tables_that_are_none(bad: str | None) -> None:
    step = sound_step(np.random.default_rng(10))
    table = step.tables["window"]
    instead: dict[str, I32] = {
        "wide": table.astype(np.int64), "short": table[:-1], "flat": table[0], "turned": np.asfortranarray(table)
    }  # fmt: skip
    tables: dict[str, I32] = dict(step.tables)
    del tables["window"]
    if bad is not None:
        tables["window"] = instead[bad]
    broken = replace(step, tables=tables)
    wanted = fault(check_step, RULES, broken, BLOCKS)
    assert wanted or bad == "turned"  # one sequence: both orders are the same
    assert fault(steps().make, broken) == wanted
