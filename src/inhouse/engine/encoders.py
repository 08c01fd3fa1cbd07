"""Encoder inputs and their cross state: kept by content, lent to every sequence with that input.

Knows ids, blocks and who holds what; not one byte of what an executor keeps. An encoding is

    made (blocks lent, not yet computed)  --encode ran-->  ready  --last holder gone-->  idle: kept until its blocks are
                                                                                         needed, the oldest goes first
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from inhouse.engine.blocks import Blocks, Tables
from inhouse.runtime.program import StateGroup


@dataclass(slots=True, eq=False)
class Encoding:
    """One encoder input: its tokens, its blocks in the cross groups, and how many sequences hold it."""

    digest: bytes  # of the weights, adapter, salt and tokens: who may share
    tokens: "array[int]"
    tables: Tables
    adapter: int = 0  # LoRA slot that it is encoded with
    holders: int = 0
    ready: bool = False

    @property
    def key(self) -> tuple[bytes, bytes]:
        return self.digest, self.tokens.tobytes()


class Encoders:
    """The cross groups of a model and the scratch groups of its encoder; without such groups, nothing.

    Args:
        cross: groups that `encode` writes for `step`. scratch: groups that only `encode` uses.
        counts: blocks of each.
    """

    def __init__(self, cross: Sequence[StateGroup], scratch: Sequence[StateGroup], counts: Mapping[str, int]) -> None:
        self._blocks = Blocks(cross, counts)
        self._scratch = Blocks(scratch, counts)
        self._known: OrderedDict[tuple[bytes, bytes], Encoding] = OrderedDict()  # oldest use first
        self.present = bool(cross)

    def find(self, digest: bytes, tokens: "array[int]") -> Encoding | None:
        """The encoding of that content; a digest alone is not trusted, the tokens are part of the key."""
        return self._known.get((digest, tokens.tobytes()))

    def make(self, digest: bytes, tokens: "array[int]", adapter: int = 0) -> Encoding | None:
        """A new encoding with blocks lent for it, after idle ones were forgotten where they must; None if short."""
        encoding = Encoding(digest, tokens, self._blocks.empty_tables(), adapter)
        while self._blocks.extend(encoding.tables, 0, len(tokens)) is None:
            idle = next((one for one in self._known.values() if not one.holders), None)
            if idle is None:
                return None
            self._forget(idle)
        self._known[encoding.key] = encoding
        return encoding

    def hold(self, encoding: Encoding) -> Encoding:
        """One holder more."""
        encoding.holders += 1
        self._known.move_to_end(encoding.key)
        return encoding

    def drop(self, encoding: Encoding) -> None:
        """One holder less; the last one leaves a computed encoding idle and gives back any other."""
        encoding.holders -= 1
        if not encoding.holders and not encoding.ready:
            self._forget(encoding)

    def _forget(self, encoding: Encoding) -> None:
        self._blocks.release(encoding.tables)
        del self._known[encoding.key]

    def lend_scratch(self, length: int) -> Tables | None:
        """Scratch blocks for an input of that many tokens; None if short."""
        tables = self._scratch.empty_tables()
        return tables if self._scratch.extend(tables, 0, length) is not None else None

    def return_scratch(self, tables: Tables) -> None:
        """Gives scratch blocks back; the step that used them is over."""
        self._scratch.release(tables)

    @property
    def capacity(self) -> int:
        """The longest input, in tokens, that fits when it is alone."""
        return min(blocks.capacity(0) for blocks in (self._blocks, self._scratch))

    def usage(self) -> float:
        """Share of the fullest cross pool that encodings in use hold, 0..1; idle ones count as free."""
        held = [one for one in self._known.values() if one.holders]
        return max(
            (sum(len(one.tables[name]) for one in held) / pool.count for name, pool in self._blocks.pools.items()),
            default=0.0,
        )

    def check(self, held: Iterable[Encoding | None]) -> None:
        """Asserts the invariants: holders equal to the sequences that hold, no scratch lent, blocks true to tables."""
        counts: dict[int, int] = {}
        for encoding in held:
            if encoding is not None:
                counts[id(encoding)] = counts.get(id(encoding), 0) + 1
        for one in self._known.values():
            assert one.holders == counts.pop(id(one), 0), (
                "holders of an encoding differ from the sequences that hold it"
            )
            assert one.ready or one.holders, "an encoding that nobody waits for was not given back"
        assert not counts, "a sequence holds an encoding that is not known"
        self._blocks.check([one.tables for one in self._known.values()])
        self._scratch.check([])
