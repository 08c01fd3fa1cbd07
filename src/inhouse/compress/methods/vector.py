"""Vector codes as methods: each matrix with codebooks of its own, or all matrices of a model with the same.

AQLM (Egiazarian et al. 2024, arXiv 2401.06118) and GPTVQ (van Baalen et al. 2024, arXiv 2402.15319), as
`compress.vector_codes` has them. Codebooks of one matrix take books * 2 KiB: nothing beside millions of weights, more
than the codes themselves in a model 64 wide. There `vector-shared` fits one set to all, and codes matrix after matrix
behind predecessors that are coded already.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from torch import Tensor

from inhouse.compress.blocks import BlockRunner, Tap
from inhouse.compress.calibrate import Calibration
from inhouse.compress.stats import LinearStats
from inhouse.compress.values import Count, Natural, NotNegative, Range, Seed
from inhouse.compress.vector_codes import VectorOptions, fit, form_of, recode
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from inhouse.core.progress import Progress, silent
from inhouse.runtime.form import Form

BOOKS = {"vq1_row": 1, "vq2_row": 2, "vq3_row": 3}


@dataclass(frozen=True, slots=True)
class VectorMethod:
    """Options; `vector_codes.VectorOptions` says what they mean. books: where the recipe names no format. sequential
    (of `vector-shared`): codes behind coded predecessors."""

    books: Annotated[int, Range(1, 4)] = 2
    entries: Annotated[int, Range(2, 256)] = 256
    beam: Count = 8
    rounds: Natural = 4
    damp: NotNegative = 0.01
    seed: Seed = 0
    sequential: bool = True

    def core(self, fmt: str = "") -> VectorOptions:
        """Raises UsageError for another format than `vq1_row` .. `vq3_row`."""
        if fmt and fmt not in BOOKS:
            raise UsageError(f"vector codes are stored as {', '.join(BOOKS)}, not {fmt}", param="format")
        rest = {key: value for key, value in asdict(self).items() if key not in ("books", "sequential")}
        return VectorOptions(books=BOOKS.get(fmt, self.books), **rest)


def vector(weight: Tensor, stats: LinearStats | None, options: VectorMethod, fmt: str = "") -> Form:
    """As the table of methods calls it: weight f32 [out, in] -> Form with its own codebooks."""
    gram = stats.gram if stats is not None and stats.count else None
    found = fit([weight], [gram], options.core(fmt))
    return form_of(found.coded[0], found.books)


def vector_shared(
    work: Work,
    calibration: Calibration | None,
    options: VectorMethod,
    report: dict[str, Any],
    progress: Progress = silent,
) -> None:
    """Every matrix of the model in codes of one set of codebooks. All matrices and moments are held at once: for models
    small enough that sharing pays. Raises UsageError without a calibration."""
    if calibration is None:
        raise UsageError("vector codes are fitted to the inputs of matrices", remedy="Give a calibration text")
    core, grams = options.core(), _grams(work, calibration, progress)
    names = [name for name in work.matrices()]
    found = fit([work.value(name) for name in names], [grams.get(name) for name in names], core)
    for name, coded in zip(names, found.coded, strict=True):
        if not options.sequential or name not in grams:
            work.put_form(name, form_of(coded, found.books))
    if options.sequential:
        floats = {name: work.float_value(name) for name in grams}

        def visit(tap: Tap) -> None:
            for name, stats in tap.stats.items():
                work.put_form(name, form_of(recode(floats[name], stats.gram, found.books, core), found.books))

        BlockRunner(work, calibration, work.folder).run(visit, progress=progress)
    report |= {"books": core.books, "losses": [round(loss, 6) for loss in found.losses]}


def _grams(work: Work, calibration: Calibration, progress: Progress) -> dict[str, Tensor]:
    """E[x x^T] in front of every matrix that a linear reads, of the model as it is."""
    found: dict[str, Tensor] = {}

    def visit(tap: Tap) -> None:
        for name, stats in tap.stats.items():
            if stats.gram is not None and stats.count:
                found[name] = stats.gram

    BlockRunner(work, calibration, work.folder).run(visit, progress=progress)
    return found
