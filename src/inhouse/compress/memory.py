"""What a run takes of memory and disk: measured while it runs, and estimated before it begins.

Counted are anonymous and shared pages (RssAnon + RssShmem): mapped files are the system's to drop. Knows Linux's
/proc; elsewhere the resident set stands in.
"""

import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from inhouse.compress.blocks import activation_bytes, matrix_names
from inhouse.compress.calibrate import Calibration
from inhouse.compress.cut import Piece, segments
from inhouse.compress.quadratic import WIDE
from inhouse.compress.stats import WIDE_GRAM
from inhouse.compress.work import Work
from inhouse.core.errors import CapacityError

STATUS = Path("/proc/self/status")
SAMPLE_SECONDS = 0.02
SLAB_BYTES = 64 << 20  # of float32 rows that a method gets at once of a large matrix, where its rows are apart
METHOD_COPIES = 6  # float32 matrices that a method makes of the one it is given
SOLVER_COPIES = 5  # Gram matrices that a method makes of the one it is given


def anonymous_bytes() -> int:
    """Anonymous and shared memory of this process, in bytes."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return int(psutil.Process().memory_info().rss)
    found = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return sum(int(found.get(key, "0 kB").split()[0]) * 1024 for key in ("RssAnon", "RssShmem"))


class PeakMemory:
    """The largest `anonymous_bytes` while the context lasts, sampled by a thread."""

    def __init__(self) -> None:
        self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, anonymous_bytes())


@dataclass(frozen=True, slots=True)
class Need:
    """An estimate. `fixed` bytes whatever the chunk; `sequence`: bytes of one sequence's activations."""

    base: int  # the process as it is: Python, torch
    fixed: int
    sequence: int

    @property
    def least(self) -> int:
        return self.base + self.fixed + self.sequence


def estimate(work: Work, calibration: Calibration | None, gram: Iterable[str], slabs: bool) -> Need:
    """What compressing takes at least, its proof included.

    Args:
        calibration: None: no rows are run. gram: names whose Gram matrix is summed up. slabs: large matrices are given
            in runs of rows.
    """
    wanted = set(gram)
    pieces = segments(work.program) if calibration is not None else []
    single = max((_matrix(work, name, slabs and name not in wanted) for name in work.matrices()), default=0)
    most = max((_piece(work, piece, wanted) for piece in pieces), default=0)
    sequence = activation_bytes(pieces, calibration.tokens.shape[1]) if calibration is not None else 0
    return Need(anonymous_bytes(), max(single, most), sequence)


def _matrix(work: Work, name: str, slabs: bool) -> int:
    whole = 4 * _size(work, name)
    part = min(whole, SLAB_BYTES) if slabs else whole
    packed = whole // 2  # 16-bit floats, or codes twice while runs of rows are joined
    return (part if slabs else whole) + METHOD_COPIES * part + packed


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
            f"--ram {ram / 1e9:.2f}GB does not suffice: this needs about {need.least / 1e9:.2f}GB "
            f"({need.base / 1e9:.2f} for the program itself, {need.fixed / 1e9:.2f} for the largest layer, "
            f"{need.sequence / 1e9:.2f} for one sequence)",
            remedy=f"Give --ram {-(-need.least * 11 // 10 // 10**8) / 10:.1f}GB, or calibrate on shorter sequences",
            param="ram", needed=need.least,
        )  # fmt: skip
    return ram - need.base - need.fixed


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
