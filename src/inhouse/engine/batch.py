"""A plan becomes the flat arrays of a Step. Knows the Step's table and nothing of executors or sampling."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inhouse.engine.blocks import Copy, Tables
from inhouse.engine.plan import Encode, Plan
from inhouse.engine.sequence import Sequence as Running
from inhouse.runtime.step import I32, Step


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's arrays, and which rows of its logits belong to which chunk."""

    step: Step
    logit_begin: list[int]  # [chunks] first row of logits of each chunk; a chunk without rows has the next one's
    copies: dict[str, tuple[I32, I32]]  # state group -> (from blocks, onto blocks), in order


def build(plan: Plan) -> Batch:
    """The Step of a plan that is not empty."""
    chunks = plan.chunks
    counts = np.array([c.count for c in chunks], np.int32)
    starts = np.array([c.start for c in chunks], np.int32)
    ends = np.cumsum(counts, dtype=np.int32)  # one past the last row of each chunk
    rows = int(ends[-1])
    sampled, begins = _sampled(plan, ends)
    step = Step(
        tokens=np.concatenate([tokens_of(c.sequence.tokens, c.start, c.count) for c in chunks]),
        positions=np.arange(rows, dtype=np.int32) + np.repeat(starts - (ends - counts), counts).astype(np.int32),
        sequences=np.repeat(np.arange(len(chunks), dtype=np.int32), counts),
        lengths=starts + counts,
        tables=stack_tables([_tables_of(c.sequence) for c in chunks]),
        sampled=sampled,
        adapters=np.array([c.sequence.request.adapter for c in chunks], np.int32),
        prefixes=np.array([c.sequence.prefix for c in chunks], np.int32),
        encoder_lengths=np.array([len(c.sequence.request.encoder or ()) for c in chunks], np.int32),
    )
    return Batch(step, begins, _copies([copy for c in chunks for copy in c.copies]))


def build_encode(encodes: Sequence[Encode]) -> Step:
    """The step of `encode` over whole inputs; there is at least one."""
    tokens = [np.frombuffer(e.encoding.tokens, np.int32) for e in encodes]
    counts = np.array([part.size for part in tokens], np.int32)
    return Step(
        tokens=np.concatenate(tokens),
        positions=np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
        sequences=np.repeat(np.arange(len(encodes), dtype=np.int32), counts),
        lengths=counts,
        tables=stack_tables([e.encoding.tables | e.scratch for e in encodes]),
        sampled=np.zeros(0, np.int32),
        adapters=np.array([e.encoding.adapter for e in encodes], np.int32),
    )


def tokens_of(tokens: "array[int]", start: int, count: int) -> I32:
    """A copy of count tokens as int32 (a view would pin the sequence's array while it must grow)."""
    return np.frombuffer(tokens, np.int32, count, 4 * start).copy()


def _sampled(plan: Plan, ends: I32) -> tuple[I32, list[int]]:
    """Rows whose logits are wanted, and where each chunk's begin among them."""
    rows: list[int] = []
    begins: list[int] = []
    for chunk, end in zip(plan.chunks, ends.tolist(), strict=True):
        begins.append(len(rows))
        rows.extend(range(end - chunk.logit_rows, end))
    return np.array(rows, np.int32), begins


def _tables_of(sequence: Running) -> Tables:
    return sequence.tables if sequence.encoding is None else sequence.tables | sequence.encoding.tables


def stack_tables(each: Sequence[Tables]) -> dict[str, I32]:
    """State group -> block ids [N, M] of that many entries, padded with -1."""
    return {name: _table([tables[name] for tables in each]) for name in each[0]}


def _table(tables: "list[array[int]]") -> I32:
    """Block ids [N, M], padded with -1."""
    parts = [np.frombuffer(table, np.int32) for table in tables]
    out = np.full((len(parts), max(part.size for part in parts)), -1, np.int32)
    for i, part in enumerate(parts):
        out[i, : part.size] = part
    return out


def _copies(copies: list[Copy]) -> dict[str, tuple[I32, I32]]:
    out: dict[str, tuple[I32, I32]] = {}
    for group in {group for group, _, _ in copies}:
        pairs = [(source, target) for name, source, target in copies if name == group]
        source, target = np.array(pairs, np.int32).T
        out[group] = np.ascontiguousarray(source), np.ascontiguousarray(target)
    return out
