"""What a run will take of memory and disk, estimated before it begins; too small a budget is refused with the number.

Knows shapes, methods' needs and how the executor holds things; measures nothing.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from inhouse.compress.blocks import activation_bytes, matrix_names
from inhouse.compress.cut import Piece, segments
from inhouse.compress.matrix import SLAB_BYTES
from inhouse.compress.memory import anonymous_bytes
from inhouse.compress.quadratic import WIDE
from inhouse.compress.recipe import Recipe, Stage
from inhouse.compress.stages import selected
from inhouse.compress.stats import WIDE_GRAM
from inhouse.compress.table import METHODS
from inhouse.compress.work import Work
from inhouse.core.errors import CapacityError

METHOD_COPIES = 6  # float32 matrices that a method makes of the one it is given
SOLVER_COPIES = 5  # Gram matrices that a method makes of the one it is given
WHOLE_COPIES = 2  # of the model in float32, that a method of scope `model` holds: as it is and as it was
GROWTH = 96 << 20  # what libraries take once they work: arenas, buffers of products, the engine that measures
LEARNED_COPIES = 6  # weights, gradients, two moments, the teacher, the best so far


@dataclass(frozen=True, slots=True)
class Need:
    """An estimate. `fixed` bytes whatever the chunk; `sequence`: bytes of one sequence's activations."""

    base: int  # the process as it is: Python, torch
    fixed: int
    sequence: int

    @property
    def least(self) -> int:
        return self.base + self.fixed + self.sequence


def estimate(work: Work, recipe: Recipe, length: int | None) -> Need:
    """What compressing takes at least, its proof included. length: tokens of a row of the calibration; None: no rows
    are run."""
    stages = [(stage, set(selected(work, stage))) for stage in recipe.stages]
    matrix = [(stage, names) for stage, names in stages if {row.scope for row in stage.methods()} == {"matrix"}]
    wanted = {name for stage, names in matrix for name in names if stage.needs(name) == {"gram"}}
    pieces = segments(work.program) if length is not None else []
    single = max((_matrix(work, name, matrix) for name in work.matrices()), default=0)
    most = max((_piece(work, piece, wanted) for piece in pieces), default=0)
    sequence = activation_bytes(pieces, length) if length is not None else 0
    model = _copies(recipe) * 4 * sum(_size(work, name) for name in work.names()) + _learning(work, recipe)
    return Need(anonymous_bytes() + GROWTH, max(single, most, model), sequence)


def _learning(work: Work, recipe: Recipe) -> int:
    """While a batch is learned from: every value of the Program, its gradient, and the logits twice more."""
    batches = [getattr(stage.options, "batch_tokens", 0) for stage in recipe.stages if "gradients" in stage.needs()]
    widths = sum(value.width for op in work.program.ops for value in op.outputs)
    return max(batches, default=0) * 4 * (2 * widths + 2 * work.spec.vocab_size)


def _copies(recipe: Recipe) -> int:
    """Of the whole model in float32, held by methods of scope `model`."""
    rows = [(stage, row) for stage in recipe.stages for row in stage.methods() if row.scope == "model"]
    learned = any("gradients" in stage.needs() for stage, _ in rows)
    return LEARNED_COPIES if learned else WHOLE_COPIES if rows else 0


def _matrix(work: Work, name: str, stages: Sequence[tuple[Stage, set[str]]]) -> int:
    """While one matrix is done: what is read of it, the method's own copies, and how it is packed (16-bit floats, or
    codes twice while runs of rows are joined)."""
    whole = 4 * _size(work, name)
    rows = [METHODS[stage.choice(name)[0]] for stage, names in stages if name in names]
    if not rows:
        return whole + whole // 2
    if all(row.rows_apart for row in rows):
        return (1 + METHOD_COPIES) * min(whole, SLAB_BYTES) + whole // 2
    return (1 + METHOD_COPIES) * whole + whole // 2


def _piece(work: Work, piece: Piece, wanted: set[str]) -> int:
    """While a piece runs: its matrices as floats and the sums of its tap; while the tap is visited: those and the
    largest of its matrices with what a solver makes."""
    names = [name for op in piece.ops if op.kind != "embed" for name in op.weights if name in work.programs.weights]
    weights = sum(4 * _size(work, name) for name in dict.fromkeys(names))
    tapped = matrix_names(piece.tap) if piece.tap is not None else []
    grams = {name: _gram(work.shape(name)[1]) for name in tapped if name in wanted}
    experts = int(piece.tap.attrs["experts"]) if piece.tap is not None and piece.tap.kind == "expert_linears" else 1
    sums = max(grams.values(), default=0) * experts
    solver = SOLVER_COPIES * max((_factored(work.shape(name)[1]) for name in grams), default=0)
    visited = max((4 * (1 + METHOD_COPIES) * _size(work, name) for name in tapped), default=0)
    return max(weights + sums, sums + solver + (visited if grams else 0))


def _gram(width: int) -> int:
    return width * width * (8 if width <= WIDE_GRAM else 4)


def _factored(width: int) -> int:
    """One matrix of a solver: as `quadratic.settled` makes it."""
    return width * width * (8 if width <= WIDE else 4)


def _size(work: Work, name: str) -> int:
    total = 1
    for length in work.shape(name):
        total *= length
    return total


def check_memory(need: Need, ram: int | None) -> int:
    """Bytes left for activations of one chunk. Raises CapacityError naming what is needed."""
    if ram is None:
        return 1 << 30
    if need.least > ram:
        raise CapacityError(
            f"--ram {_size_text(ram)} does not suffice: this needs about {_size_text(need.least)} "
            f"({_size_text(need.base)} for the program itself, {_size_text(need.fixed)} for the largest layer or what "
            f"is learned, {_size_text(need.sequence)} for one sequence)",
            remedy=f"Give --ram {_size_text(need.least * 11 // 10)}, or calibrate on shorter sequences",
            param="ram", needed=need.least,
        )  # fmt: skip
    return ram - need.base - need.fixed


def _size_text(nbytes: int) -> str:
    """Bytes as `--ram` takes them."""
    return f"{nbytes / 1e9:.2f}GB" if nbytes >= 10**9 else f"{-(-nbytes // 10**6)}MB"


def check_disk(folder: Path, needed: int) -> None:
    """Raises CapacityError where the disk has less room than that."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CapacityError(
            f"the run needs about {needed / 1e9:.2f}GB of disk under {place}, {free / 1e9:.2f}GB are free",
            remedy="Make room, or set INHOUSE_HOME to another disk", needed=needed, free=free,
        )  # fmt: skip
