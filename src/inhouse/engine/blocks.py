"""Blocks of paged state: who holds which, what each full one contains, and when it may be used again.

Knows ids, reference counts and token ids; not one byte of what an executor keeps in a block.

A block is in exactly one of three places, each in its state group's pool:

    free  --take-->  used (references >= 1)  --drop the last-->  free, or idle if its content is published
                       ^                                           |
                       '------------- share (a prefix hit) --------'   idle ones are taken last, oldest first
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from inhouse.core.errors import CapacityError
from inhouse.runtime.program import StateGroup
from inhouse.runtime.step import BLOCK_SIZE

Tables = dict[str, "array[int]"]  # state group -> block ids of one sequence, -1 where none is lent
Copy = tuple[str, int, int]  # state group, from block, onto block


@dataclass(frozen=True, slots=True)
class BlockKey:
    """The content of a full block: its tokens after everything before them. `digest` hashes (parent, tokens)."""

    digest: bytes
    parent: bytes
    tokens: bytes  # int32 ids, native order


def root_digest(model: str, adapter: str, salt: str, read: bytes = b"") -> bytes:
    """Where the chain of a sequence begins: weights' digest, adapter, salt, and what its encoder reads, decide who may
    share."""
    return hashlib.blake2b(repr((model, adapter, salt)).encode() + read, digest_size=16).digest()


def next_key(parent: bytes, tokens: "array[int]", start: int) -> BlockKey:
    """The key of the block that begins at token `start`, following `parent`."""
    raw = tokens[start : start + BLOCK_SIZE].tobytes()
    return BlockKey(hashlib.blake2b(parent + raw, digest_size=16).digest(), parent, raw)


class BlockPool:
    """The blocks of one state group."""

    def __init__(self, group: StateGroup, count: int) -> None:
        self.group = group
        self.count = count
        self.references = array("i", bytes(4 * count))
        self._free = list(range(count - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # published and unreferenced, oldest first
        self._keys: dict[int, BlockKey] = {}
        self._found: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` can lend."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        return self.count - self.available

    def take(self) -> int:
        """Lends a block, forgetting the oldest idle content if it must; raises CapacityError if none is left."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._found[self._keys.pop(block).digest]
        else:
            raise CapacityError(f"all {self.count} blocks of {self.group.name} are in use")
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a used or idle block."""
        self._idle.pop(block, None)
        self.references[block] += 1

    def drop(self, block: int) -> None:
        """One holder less; the last one leaves a published block idle and any other free."""
        self.references[block] -= 1
        if self.references[block]:
            return
        if block in self._keys:
            self._idle[block] = None
        else:
            self._free.append(block)

    def publish(self, block: int, key: BlockKey) -> None:
        """Lets others find the block by its content; the first block with that content stays the one found."""
        if block not in self._keys and key.digest not in self._found:
            self._keys[block] = key
            self._found[key.digest] = block

    def find(self, key: BlockKey) -> int | None:
        """The block with that content; a digest alone is not trusted, the tokens are compared."""
        block = self._found.get(key.digest)
        return block if block is not None and self._keys[block] == key else None

    def check(self, tables: Iterable["array[int]"]) -> None:
        """Asserts the invariants: each block in one place, references equal to the holders, index true to the keys."""
        held = [0] * self.count
        for table in tables:
            for block in table:
                if block >= 0:
                    held[block] += 1
        assert held == self.references.tolist(), f"{self.group.name}: references differ from what tables hold"
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), f"{self.group.name}: a block is free twice"
        assert not free & idle, f"{self.group.name}: a block is free and idle"
        unused = {block for block, count in enumerate(held) if not count}
        assert unused == free | idle, f"{self.group.name}: a block is lost, or used and free at once"
        assert not free & self._keys.keys(), f"{self.group.name}: a free block is published"
        assert idle <= self._keys.keys(), f"{self.group.name}: an idle block is not published"
        assert {k.digest: b for b, k in self._keys.items()} == self._found, f"{self.group.name}: index out of step"


class Blocks:
    """The pools of all state groups of a model, and what a sequence does with them."""

    def __init__(self, groups: Sequence[StateGroup], counts: Mapping[str, int]) -> None:
        self.pools = {group.name: BlockPool(group, counts[group.name]) for group in groups}
        self.shareable = all(group.shareable for group in groups)

    def empty_tables(self) -> Tables:
        """Tables of a sequence that holds nothing."""
        return {name: array("i") for name in self.pools}

    def usage(self) -> float:
        """Used share of the fullest pool, 0..1."""
        return max((pool.used / pool.count for pool in self.pools.values()), default=0.0)

    def match(self, keys: Sequence[BlockKey]) -> int:
        """How many leading blocks are found in every group (a window group needs only those that it still sees)."""
        count = len(keys)
        for pool in self.pools.values():
            if not pool.group.window:
                count = next((i for i in range(count) if pool.find(keys[i]) is None), count)
        while count and not all(self._window_found(pool, keys, count) for pool in self.pools.values()):
            count -= 1
        return count

    @staticmethod
    def _window_found(pool: BlockPool, keys: Sequence[BlockKey], count: int) -> bool:
        if not pool.group.window:
            return True
        start = first_block(pool.group.window, count * BLOCK_SIZE)
        return all(pool.find(keys[i]) is not None for i in range(count) if i >= start or is_static(pool.group, i))

    def adopt(self, tables: Tables, keys: Sequence[BlockKey], count: int) -> None:
        """Fills empty tables with the first `count` blocks that `match` found."""
        for name, pool in self.pools.items():
            start = first_block(pool.group.window, count * BLOCK_SIZE)
            for i in range(count):
                needed = i >= start or is_static(pool.group, i)
                block = pool.find(keys[i]) if needed else None
                assert not needed or block is not None
                if block is not None:
                    pool.share(block)
                tables[name].append(-1 if block is None else block)

    def extend(self, tables: Tables, first: int, end: int) -> list[Copy] | None:
        """Makes positions first..end-1 writable: lends blocks, and takes a copy of the one block that is shared and
        partly written. Blocks that left the window are dropped first. All or nothing: None if any pool is short."""
        for name, pool in self.pools.items():
            self._leave_window(pool, tables[name], first)
        for name, pool in self.pools.items():
            if pool.available < self._missing(pool, tables[name], first, end):
                return None
        return [copy for name, pool in self.pools.items() for copy in self._lend(pool, tables[name], first, end)]

    @staticmethod
    def _leave_window(pool: BlockPool, table: "array[int]", first: int) -> None:
        for i in range(min(first_block(pool.group.window, first), len(table)) - 1, -1, -1):
            if is_static(pool.group, i):
                continue
            if table[i] < 0:
                break
            pool.drop(table[i])
            table[i] = -1

    @staticmethod
    def _must_copy(pool: BlockPool, table: "array[int]", first: int) -> bool:
        index = first // BLOCK_SIZE
        return index < len(table) and pool.references[table[index]] > 1

    def _missing(self, pool: BlockPool, table: "array[int]", first: int, end: int) -> int:
        return blocks_of(end) - len(table) + self._must_copy(pool, table, first)

    def _lend(self, pool: BlockPool, table: "array[int]", first: int, end: int) -> list[Copy]:
        copies: list[Copy] = []
        if self._must_copy(pool, table, first):
            index = first // BLOCK_SIZE
            block = pool.take()
            copies.append((pool.group.name, table[index], block))
            pool.drop(table[index])
            table[index] = block
        while len(table) < blocks_of(end):
            table.append(pool.take())
        return copies

    def fork(self, tables: Tables) -> Tables:
        """Tables that share every block of `tables`."""
        for name, pool in self.pools.items():
            for block in tables[name]:
                if block >= 0:
                    pool.share(block)
        return {name: array("i", table) for name, table in tables.items()}

    def publish(self, tables: Tables, keys: Sequence[BlockKey], start: int) -> None:
        """Publishes blocks start..len(keys)-1, whose positions are all computed."""
        for name, pool in self.pools.items():
            for i in range(start, len(keys)):
                if tables[name][i] >= 0:
                    pool.publish(tables[name][i], keys[i])

    def release(self, tables: Tables) -> None:
        """Gives everything back, last block first, so that of a prefix the end is forgotten before the beginning."""
        for name, pool in self.pools.items():
            for block in reversed(tables[name]):
                if block >= 0:
                    pool.drop(block)
            del tables[name][:]

    def capacity(self, step_tokens: int, sequences: int = 1) -> int:
        """The longest sequence, in tokens, so many of which fit when alone; a window group must hold the window
        and one step of each, and bounds nothing then, unless it keeps every so many blocks for good."""
        longest = 2**31 - 1
        for pool in self.pools.values():
            each, group = pool.count // sequences, pool.group
            spare = each - window_blocks(group.window, step_tokens) - group.sink // BLOCK_SIZE
            if spare < 0:
                longest = min(longest, each * BLOCK_SIZE)
            elif group.stride:
                longest = min(longest, int(spare) * group.stride * BLOCK_SIZE)
        return longest

    def check(self, tables: Sequence[Tables]) -> None:
        """Asserts the invariants of every pool against the tables of all living sequences."""
        for name, pool in self.pools.items():
            pool.check(t[name] for t in tables)


def blocks_of(tokens: int) -> int:
    """Blocks that hold that many positions."""
    return -(-tokens // BLOCK_SIZE)


def is_static(group: StateGroup, block: int) -> bool:
    """True for a block that a window group keeps for good."""
    return block < group.sink // BLOCK_SIZE or bool(group.stride and block % group.stride == 0)


def first_block(window: int, first: int) -> int:
    """The first block that a row at position `first` sees (window 0: all)."""
    return max(first - window + 1, 0) // BLOCK_SIZE if window else 0


def window_blocks(window: int, step_tokens: int) -> float:
    """Blocks with which a window group never runs short for one sequence; infinite for a group without a window."""
    return blocks_of(window + step_tokens) + 1 if window else float("inf")
