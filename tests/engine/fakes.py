"""A fake executor at the seam: its logits are a function of each sequence's own tokens, read back from its blocks.

Every slot of every state group keeps (position, token, hash of all tokens up to here). A row that is written reads
the slot before it, a row that is sampled reads all that its groups should hold; whatever does not fit (a wrong table,
a block lent twice, a copy forgotten, a prefix that is not this one's) raises WrongState.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import ExecutorError
from inhouse.runtime.program import Axis, DType, Op, Program, ProgramSet, StateGroup, StateKind, Value
from inhouse.runtime.step import BLOCK_SIZE, I32, Step, check_step, step_rules

F32 = npt.NDArray[np.float32]
VOCAB = 61


class WrongState(ExecutorError):
    """A block does not hold what its table says."""


def paged(name: str = "full") -> StateGroup:
    return StateGroup(name, StateKind.PAGED, (0,), 1, 4, 4)


def window(size: int, name: str = "window") -> StateGroup:
    return StateGroup(name, StateKind.WINDOW, (1,), 1, 4, 4, window=size)


def programs(*groups: StateGroup, context: int = 256) -> ProgramSet:
    """A ProgramSet whose Program never runs; its ops only name the state groups."""
    groups = groups or (paged(),)
    logits = Value(0, Axis.SAMPLED, VOCAB, DType.F32)
    reads = [Op("attention", (), (), (), {"group": group.name, "cross": False}) for group in groups]
    step = Program("step", (Op("act", (), (), (logits,), {}), *reads), {"logits": logits})
    return ProgramSet({"step": step}, {}, groups, VOCAB, context)


def encoder_programs(context: int = 256) -> ProgramSet:
    """An encoder-decoder: `encode` writes `cross` over the scratch group `encoder`, `step` reads it."""
    cross = StateGroup("cross", StateKind.CROSS, (0,), 1, 4, 4, chunkable=False, shareable=False)
    scratch = StateGroup("encoder", StateKind.PAGED, (0,), 1, 4, 4, chunkable=False, shareable=False)
    plain = programs(paged(), context=context)
    read = Op("attention", (), (), (), {"group": "cross", "cross": True})
    step = replace(plain.programs["step"], ops=(*plain.programs["step"].ops, read))
    writes = [Op("attention", (), (), (), {"group": "encoder", "cross": False})]
    writes.append(Op("write_cross", (), (), (), {"group": "cross"}))
    encode = Program("encode", tuple(writes), {})
    return replace(plain, programs={"step": step, "encode": encode}, groups=(paged(), cross, scratch))


def mix(before: int, token: int) -> int:
    """A 63-bit hash of a history and the token that follows it."""
    return (before * 6364136223846793005 + token * 1442695040888963407 + 1013904223) % 2**63


def digest_of(tokens: Iterable[int]) -> int:
    digest = 0
    for token in tokens:
        digest = mix(digest, token)
    return digest


def logits_after(tokens: Iterable[int], encoder: Iterable[int] | None = None) -> F32:
    """The logits that follow a history, given what the encoder read: the oracle of every test."""
    digest = digest_of(tokens)
    return _logits(digest if encoder is None else mix(digest, digest_of(encoder) % VOCAB))


def _logits(digest: int) -> F32:
    return (np.random.default_rng(digest).standard_normal(VOCAB) * 2).astype(np.float32)


class FakeExecutor:
    """Satisfies `Executor`; `fail_when` names a token whose appearance makes a step fail, `nan_when` one after which
    the logits are NaN."""

    name = "fake"
    kv_dtype = "f32"

    def __init__(self, programs: ProgramSet, *, fail_when: int = -1, nan_when: int = -1, fail_encode: int = -1) -> None:
        self.programs = programs
        self.steps: list[Step] = []
        self.reserved: tuple[int, int, int] | None = None
        self.closed = False
        self.broken = False
        self._nan_when = nan_when
        self._fail_when = {"step": fail_when, "encode": fail_encode}
        self._blocks: dict[str, int] = {}
        self._cells: dict[str, npt.NDArray[np.int64]] = {}

    def allocate(self, blocks: Mapping[str, int]) -> None:
        self._blocks = dict(blocks)
        self._cells = {name: np.full((count, BLOCK_SIZE, 3), -1, np.int64) for name, count in blocks.items()}

    def set_adapter(self, slot: int, adapter: object) -> None:
        """Takes any; this executor computes nothing."""

    def reserve(self, rows: int, sampled: int, sequences: int) -> None:
        assert self._blocks, "state comes first"
        self.reserved = rows, sampled, sequences

    def run(self, program: str, step: Step) -> Mapping[str, F32]:
        assert not self.closed
        check_step(step_rules(self.programs, program), step, self._blocks)
        size = step.tokens.size, step.sampled.size, step.lengths.size
        assert self.reserved is not None, "no room was made"
        assert all(now <= room for now, room in zip(size, self.reserved, strict=True)), "larger than announced"
        self.steps.append(step)
        if self.broken or self._fail_when[program] in step.tokens:
            raise ExecutorError("the fake was told to fail")
        for token, position, sequence in zip(step.tokens, step.positions, step.sequences, strict=True):
            self._write(step, int(token), int(position), int(sequence), program)
        if program == "encode":
            return {}
        rows = [self._read(step, int(step.sequences[row]), int(step.positions[row])) for row in step.sampled]
        return {"logits": np.stack(rows) if rows else np.zeros((0, VOCAB), np.float32)}

    def _cell(self, step: Step, group: str, sequence: int, position: int) -> npt.NDArray[np.int64]:
        block = step.tables[group][sequence, position // BLOCK_SIZE]
        if block < 0:
            raise WrongState(f"{group}: no block for position {position}")
        cell: npt.NDArray[np.int64] = self._cells[group][block, position % BLOCK_SIZE]
        return cell

    def _groups(self, program: str) -> list[StateGroup]:
        """What a Program stores by its own positions."""
        encoders = ("encoder", "cross")
        return [group for group in self.programs.groups if (group.name in encoders) == (program == "encode")]

    def _write(self, step: Step, token: int, position: int, sequence: int, program: str) -> None:
        for group in self._groups(program):
            before = 0
            if position:
                previous = self._cell(step, group.name, sequence, position - 1)
                if previous[0] != position - 1:
                    raise WrongState(f"{group.name}: position {position - 1} holds {previous[0]}")
                before = int(previous[2])
            self._cell(step, group.name, sequence, position)[:] = position, token, mix(before, token)

    def _read(self, step: Step, sequence: int, position: int) -> F32:
        digests = {self._verify(step, group, sequence, position) for group in self._groups("step")}
        if len(digests) != 1:
            raise WrongState("state groups hold different histories")
        if self._cell(step, self.programs.groups[0].name, sequence, position)[1] == self._nan_when:
            return np.full(VOCAB, np.nan, np.float32)
        length = int(step.encoder_lengths[sequence])
        if not length:
            return _logits(digests.pop())
        read = self._verify(step, self.programs.group("cross"), sequence, length - 1)
        return _logits(mix(digests.pop(), read % VOCAB))

    def _verify(self, step: Step, group: StateGroup, sequence: int, position: int) -> int:
        start = max(position - group.window + 1, 0) if group.window else 0
        digest = 0
        for p in range(start, position + 1):
            held, token, now = (int(v) for v in self._cell(step, group.name, sequence, p))
            if held != p or (p > start or p == 0) and mix(digest, token) != now:
                raise WrongState(f"{group.name}: position {p} holds another history")
            digest = now
        return digest

    def copy_blocks(self, group: str, source: I32, target: I32) -> None:
        self._cells[group][target] = self._cells[group][source]

    def read_blocks(self, group: str, blocks: I32) -> npt.NDArray[np.uint8]:
        return self._cells[group][blocks].view(np.uint8).reshape(len(blocks), -1)

    def write_blocks(self, group: str, blocks: I32, data: npt.NDArray[np.uint8]) -> None:
        self._cells[group][blocks] = data.view(np.int64).reshape(len(blocks), BLOCK_SIZE, 3)

    def close(self) -> None:
        self.closed = True
