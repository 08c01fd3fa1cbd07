"""The model run over its calibration piece by piece, so that what is compressed next sees what was compressed before.

One forward pass in all: the plain Program is cut in front of every op whose matrices are compressed; a piece runs for
all rows with the weights as they then are, its values go to disk, the inputs of the next matrices are summed up as they
come by, and those matrices are visited (true-sequential, Frantar et al. 2022, arXiv 2210.17323). For methods that
optimise a layer at once, `run_blocks` goes layer by layer along two paths, with the weights as they were and as they
are. In memory lie the weights of one piece (one layer), one chunk of rows and the sums.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from inhouse.compress.calibrate import Calibration
from inhouse.compress.cut import Piece, blocks, segments, widest
from inhouse.compress.spill import Spill
from inhouse.compress.stats import Accumulator, LinearStats
from inhouse.compress.work import Work
from inhouse.core.errors import UnsupportedError
from inhouse.core.progress import Progress, silent
from inhouse.model.seq2seq import Seq2SeqSpec
from inhouse.runtime.program import Op
from inhouse.runtime.torch_dense import DenseRows
from inhouse.runtime.torch_moe import routed
from inhouse.runtime.torch_program import evaluate_ops

CHUNK_TOKENS = 8192  # more at once is no faster
SPILL_BYTES = 4 << 30  # of activations as f32; where they would be more they are kept as bf16


@dataclass(frozen=True, slots=True)
class Tap:
    """Matrices about to be visited. `stats`: by name; experts have each their own. `inputs`: their input rows, float32
    chunks [n, in], padding left out, again at every call (of `expert_linears`: of all experts, routed)."""

    op: Op
    layer: int
    stats: Mapping[str, LinearStats]
    inputs: Callable[[], Iterator[Tensor]]

    @property
    def names(self) -> list[str]:
        return list(self.stats)


Visit = Callable[[Tap], None]


class Block:
    """One layer for a method that optimises it: chunks of inputs and targets, and the layer as a function.

    `given(i)`: values that the layer reads, float32, along the path of the weights as they are; `original(i)`: along
    the path of the weights as the stage found them. `target(i)`: what the original layer makes of `original(i)`.
    `formats`: canonical name -> format that the recipe wants it in, of the matrices that the stage works on.
    """

    def __init__(self, layer: int, piece: Piece, sources: tuple[Spill, Spill], chunks: "Chunks") -> None:
        self.layer, self.names = layer, [name for op in piece.ops for name in op.weights if name]
        self.chunks = len(chunks)
        self.formats: Mapping[str, str] = {}
        self.outputs = [value for value in piece.kept]
        self._piece, (self._now, self._before), self._chunks = piece, sources, chunks

    def given(self, chunk: int) -> dict[int, Tensor]:
        return {value: self._now.read(value, chunk) for value in self._piece.given}

    def original(self, chunk: int) -> dict[int, Tensor]:
        return {value: self._before.read(value, chunk) for value in self._piece.given}

    def target(self, chunk: int) -> dict[int, Tensor]:
        return {value: self._before.read(value, chunk) for value in self._piece.kept}

    def valid(self, chunk: int) -> Tensor:
        """bool [rows]: rows that are no padding."""
        return self._chunks.valid(chunk)

    @property
    def ops(self) -> tuple[Op, ...]:
        """The layer's ops in order."""
        return self._piece.ops

    def values(
        self, given: Mapping[int, Tensor], weights: Mapping[str, Tensor], wanted: Sequence[int], chunk: int, stop: int
    ) -> dict[int, Tensor]:
        """Values by id, [rows, width], after the first `stop` ops; of `given` too."""
        made = evaluate_ops(self._piece.ops[:stop], given, wanted, weights, self._chunks.rows(chunk))
        return {value: made[value] for value in wanted}  # type: ignore[misc]

    def forward(self, given: Mapping[int, Tensor], weights: Mapping[str, Tensor], chunk: int) -> dict[int, Tensor]:
        """The layer's outputs by value id, [rows, width]; differentiable with respect to weights and `given`."""
        made = evaluate_ops(self._piece.ops, given, self._piece.kept, weights, self._chunks.rows(chunk))
        return {value: made[value] for value in self._piece.kept}  # type: ignore[misc]


class Chunks:
    """Calibration rows in chunks of whole sequences."""

    def __init__(self, calibration: Calibration, size: int, bidirectional: bool) -> None:
        self.tokens, self.lengths, self.size = calibration.tokens, calibration.lengths, size
        self._padded = bool((self.lengths < self.tokens.shape[1]).any())
        self._bidirectional = bidirectional

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.size)

    def part(self, chunk: int) -> Tensor:
        """int64 [b, length]."""
        return self.tokens[chunk * self.size : (chunk + 1) * self.size]

    def valid(self, chunk: int) -> Tensor:
        """bool [b * length]."""
        lengths = self.lengths[chunk * self.size : (chunk + 1) * self.size]
        return (torch.arange(self.tokens.shape[1])[None] < lengths[:, None]).flatten()

    def rows(self, chunk: int) -> DenseRows:
        part = self.part(chunk)
        apart = self._padded and self._bidirectional  # causal rows do not see padding on their right
        segments = self.valid(chunk).reshape(part.shape).long() if apart else None
        return DenseRows(part, None, segments, None)


class BlockRunner:
    """Runs a Work's Program over a calibration.

    Args:
        folder: of the run; activations go into `spill` under it.
        memory: bytes that one chunk's activations may take; more sequences go into one chunk while it lasts.
        dtype: of activations on disk; None: f32 up to SPILL_BYTES, else bf16.

    Raises UnsupportedError for an encoder-decoder, whose Programs take two inputs.
    """

    def __init__(
        self, work: Work, calibration: Calibration, folder: Path, memory: int = 1 << 30, dtype: str | None = None
    ) -> None:
        if isinstance(work.spec, Seq2SeqSpec):
            raise UnsupportedError(
                f"{work.spec.family} is an encoder-decoder; calibration runs decoders and encoders",
                remedy="Use a method that needs no calibration (round, magnitude)",
            )
        self._work, self._folder = work, folder
        self._pieces = segments(work.program)
        self.tokens = calibration.tokens.numel()
        self.dtype = dtype or spill_dtype(work, calibration)
        masks = {str(op.attrs["mask"]) for op in work.program.ops if op.kind == "attention"}
        size = chunk_size(self._pieces, calibration, memory)
        self.chunks = Chunks(calibration, size, bidirectional=masks - {"causal"} != set())

    def run(
        self,
        visit: Visit,
        needs_gram: Callable[[str], bool] = lambda name: True,
        progress: Progress = silent,
    ) -> None:
        """Visits every op with matrices in the order of the forward pass, statistics in hand; what `visit` puts into
        the Work is what the rest of the pass runs with."""
        spill = Spill(self._folder / "spill", self.dtype)
        try:
            for at, piece in enumerate(self._pieces):
                progress("calibrate", at, len(self._pieces))
                self._visit(piece, self._advance(piece, spill, needs_gram), spill, visit)
            progress("calibrate", len(self._pieces), len(self._pieces))
        finally:
            spill.close()

    def outputs(self) -> dict[str, Tensor]:
        """Role -> float32 [all rows, width] of the whole Program, run piece by piece (for tests of the cut)."""
        spill = Spill(self._folder / "spill", "f32")
        try:
            for piece in segments(self._work.program, finish=True):
                self._advance(piece, spill, lambda name: False)
            return {
                role: torch.cat([spill.read(value.id, i) for i in range(len(self.chunks))])
                for role, value in self._work.program.outputs.items()
            }
        finally:
            spill.close()

    def run_blocks(self, visit: Callable[[Block], None], progress: Progress = silent) -> None:
        """Visits every layer in order along two paths (see Block); what `visit` puts is what the next layers see."""
        now, before = Spill(self._folder / "spill", self.dtype), Spill(self._folder / "spill-before", self.dtype)
        pieces = blocks(self._work.program)
        last = max((at for at, piece in enumerate(pieces) if piece.layer >= 0), default=-1)
        try:
            for at, piece in enumerate(pieces[: last + 1]):
                progress("calibrate", at, last + 1)
                self._through(piece, before, self._weights(piece, before=True))
                if piece.layer >= 0:
                    visit(Block(piece.layer, piece, (now, before), self.chunks))
                self._through(piece, now, self._weights(piece))
                for value in piece.dead:
                    now.drop(value)
                    before.drop(value)
            progress("calibrate", last + 1, last + 1)
        finally:
            now.close()
            before.close()

    def _advance(self, piece: Piece, spill: Spill, needs_gram: Callable[[str], bool]) -> dict[str, Accumulator]:
        """Runs a piece over all chunks; the sums of what its tap is going to read."""
        sums = _Sums(piece.tap, needs_gram)
        self._through(piece, spill, self._weights(piece), sums)
        for value in piece.dead:
            spill.drop(value)
        return sums.by_name

    def _through(self, piece: Piece, spill: Spill, weights: Mapping[str, Tensor], sums: "_Sums | None" = None) -> None:
        fresh = [value for value in piece.kept if value not in spill]
        with torch.no_grad():
            for chunk in range(len(self.chunks)):
                given: dict[int, Tensor] = {value: spill.read(value, chunk) for value in piece.given}
                rows = self.chunks.rows(chunk)
                made = {op.outputs[0].id: self._embed(op, rows) for op in piece.ops if op.kind == "embed"}
                ops = [op for op in piece.ops if op.kind != "embed"]
                out = evaluate_ops(ops, given | made, piece.kept, weights, rows)
                kept = {value: spill.write(value, out[value]) for value in fresh}  # type: ignore[arg-type]
                if sums is not None:  # of what was spilled, rounding included: `Tap.inputs` gives the same rows
                    tapped = {v: kept[v] if v in kept else spill.read(v, chunk) for v in sums.values}
                    sums.add(tapped, self.chunks.valid(chunk))

    def _embed(self, op: Op, rows: DenseRows) -> Tensor:
        """The op `embed` from the rows of the table that are needed."""
        ids = rows.ids(str(op.attrs["source"]), op.outputs[0].axis) + int(op.attrs["offset"])
        unique, where = torch.unique(ids, return_inverse=True)
        table = self._work.gather(op.weights[0], unique.numpy())
        scale = float(op.attrs["scale"])
        return table[where] if scale == 1.0 else table[where] * scale

    def _weights(self, piece: Piece, before: bool = False) -> dict[str, Tensor]:
        read = self._work.value_before if before else self._work.value
        used = dict.fromkeys(name for op in piece.ops if op.kind != "embed" for name in op.weights if name)
        constants = self._work.constants()
        return {name: constants[name] if name in constants else read(name) for name in used}

    def _visit(self, piece: Piece, sums: Mapping[str, Accumulator], spill: Spill, visit: Visit) -> None:
        tap = piece.tap
        if tap is None:
            return
        shared: dict[int, LinearStats] = {}
        stats = {}
        for name, accumulator in sums.items():
            if id(accumulator) not in shared:
                shared[id(accumulator)] = accumulator.finish()
            stats[name] = shared[id(accumulator)]

        def inputs() -> Iterator[Tensor]:
            for chunk in range(len(self.chunks)):
                given = {value.id: spill.read(value.id, chunk) for value in tap.inputs}
                yield from (rows for _, rows in _counted(tap, given, self.chunks.valid(chunk)))

        visit(Tap(tap, tap.layer, stats, inputs))


class _Sums:
    """The statistics of one tap, by name; matrices that read the same rows share theirs."""

    def __init__(self, tap: Op | None, needs_gram: Callable[[str], bool]) -> None:
        self._tap = tap
        self.values = tuple(value.id for value in tap.inputs) if tap is not None else ()
        self.by_name: dict[str, Accumulator] = {}
        self._each: list[Accumulator] = []
        if tap is None:
            return
        names = matrix_names(tap)
        experts = int(tap.attrs["experts"]) if tap.kind == "expert_linears" else 1
        width = tap.inputs[0].width // (int(tap.attrs["heads"]) if tap.kind == "head_linears" else 1)
        for expert in range(experts):
            mine = names[expert::experts]
            self._each.append(Accumulator(width, any(map(needs_gram, mine))))
            self.by_name |= dict.fromkeys(mine, self._each[-1])
        self.by_name = {name: self.by_name[name] for name in names}

    def add(self, given: Mapping[int, Tensor], valid: Tensor) -> None:
        """given: the tap's inputs of one chunk by value id."""
        if self._tap is not None:
            for expert, rows in _counted(self._tap, given, valid):
                self._each[expert].add(rows)


def _counted(tap: Op, given: Mapping[int, Tensor], valid: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(expert, or 0; rows [n, in] that are no padding) of one chunk."""
    x = given[tap.inputs[0].id]
    if tap.kind == "head_linears":
        x = x[valid]
        yield 0, x.reshape(len(x) * int(tap.attrs["heads"]), -1)
    elif tap.kind == "expert_linears":
        routing = given[tap.inputs[1].id]
        order, experts = routed(routing)
        counted = valid[order // (routing.shape[1] // 2)]
        for expert in range(int(tap.attrs["experts"])):
            yield expert, x[counted & (experts == expert)]
    else:
        yield 0, x[valid] if len(x) == len(valid) else x


def matrix_names(tap: Op) -> list[str]:
    """Names of an op's matrices; its biases are left out."""
    return list(tap.weights) if tap.kind == "head_linears" else list(tap.weights[: len(tap.weights) // 2])


def spill_dtype(work: Work, calibration: Calibration) -> str:
    """What activations are kept as on disk: f32, or bf16 where they would be many."""
    most = max((sum(value.width for value in op.inputs) for op in work.program.ops), default=0) + 2 * work.spec.hidden
    return "f32" if 4 * most * calibration.tokens.numel() <= SPILL_BYTES else "bf16"


def chunk_size(pieces: list[Piece], calibration: Calibration, memory: int) -> int:
    """Sequences of a chunk: as many as fit `memory` bytes and CHUNK_TOKENS, at least one."""
    length = calibration.tokens.shape[1]
    one = activation_bytes(pieces, length)
    return max(1, min(memory // max(one, 1), CHUNK_TOKENS // length, len(calibration.tokens)))


def activation_bytes(pieces: list[Piece], length: int) -> int:
    """Bytes that the activations of one sequence take at most, twice over for what an op makes on its way."""
    return 2 * 4 * widest(pieces) * length
