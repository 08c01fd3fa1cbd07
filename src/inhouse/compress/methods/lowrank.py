"""Low rank: a matrix stored and run as two thin ones, y = b (a x), and the ranks of a whole model under one budget.

Truncated SVD (Eckart and Young 1936), ASVD (Yuan et al. 2023, arXiv 2312.05821), whitened SVD (SVD-LLM, Wang et al.
2024, arXiv 2403.07378) as `compress.spectrum` has them. Ranks by budget: the knapsack of SVD-LLM v2 (arXiv 2503.12340)
with the loss that was measured at one rank spread over the others by their theoretical error.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from inhouse.compress.allocate import Choice, allocate
from inhouse.compress.pack_as import pack_as
from inhouse.compress.spectrum import METHODS, Spectrum, cut, decompose, output_error, rank_choices
from inhouse.core.errors import UsageError
from inhouse.runtime.form import Form

# Plain storage that a low-rank form of floats is held against, widest first.
_PLAIN = ("f32", "bf16", "q8_0", "q6_0", "q4_0")


@dataclass(frozen=True, slots=True)
class LowRank:
    """Options of the matrix-wise method."""

    method: str = "whitened"  # svd | asvd | whitened
    ratio: float = 0.2  # share of the matrix's numbers to save
    rank: int = 0  # instead of `ratio`
    alpha: float = 0.5  # asvd: exponent of mean |x|
    factors: str = "bf16"  # format of both factors
    keep_if_better: bool = False  # keep the matrix unless the factors beat plain storage of no more bytes

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}", remedy=f"Use {', '.join(METHODS)}", param="method")
        if not self.rank and not 0.0 < self.ratio < 1.0:
            raise UsageError(f"ratio is {self.ratio}, must lie between 0 and 1", param="ratio")


def rank_for(shape: tuple[int, int], ratio: float) -> int:
    """The largest rank whose factors save at least `ratio` of the matrix's numbers; 0 where there is none."""
    rows, columns = shape
    return int((1.0 - ratio) * rows * columns / (rows + columns))


def factorise(
    weight: Tensor, options: LowRank, gram: Tensor | None = None, mean_abs: Tensor | None = None
) -> Form | None:
    """The low-rank form of a matrix [out, in]; None where `keep_if_better` and plain storage is better.

    Raises UnsupportedError where the factors would be larger than the matrix, UsageError where the statistics that the
    method needs are missing or the matrix has no rank that saves so much.
    """
    shape = (weight.shape[0], weight.shape[1])
    rank = options.rank or rank_for(shape, options.ratio)
    if rank < 1:
        raise UsageError(f"no rank of a matrix {list(shape)} saves {options.ratio:.0%}", param="ratio")
    taken = decompose(weight, options.method, gram=gram, mean_abs=mean_abs, alpha=options.alpha)
    form = form_of(taken, rank, options.factors)
    if options.keep_if_better and not better_than_plain(weight, form, gram):
        return None
    return form


def form_of(taken: Spectrum, rank: int, factors: str = "bf16") -> Form:
    """The best approximation of that rank, its factors stored in a format of `pack_as`."""
    a, b = cut(taken, rank)
    return Form(None, (pack_as(a, factors), pack_as(b, factors)))


def better_than_plain(weight: Tensor, form: Form, gram: Tensor | None = None) -> bool:
    """Whether the form's output error is below that of every plain format with no more bytes (a form of a few bits is
    held against plain storage of as few); true where no plain format is that small."""
    ours = output_error(weight, torch.from_numpy(form.value()), gram)
    for name in _PLAIN:
        plain = Form(pack_as(weight, name))
        if plain.nbytes <= form.nbytes:
            return ours < output_error(weight, torch.from_numpy(plain.value()), gram)
    return True


@dataclass(frozen=True, slots=True)
class Candidate:
    """A matrix that may be cut, and how much its error matters."""

    spectrum: Spectrum
    weight: float = 1.0  # loss of the model for one unit of squared output error


def measured_weight(spectrum: Spectrum, rank: int, loss: float) -> float:
    """The `Candidate.weight` at which the error of that rank is the loss that was measured with this matrix alone cut
    to it (never negative: noise may make a measured loss so)."""
    tail = float(spectrum.tail[rank])
    return max(loss, 0.0) / tail if tail > 0 else 0.0


def ranks_by_budget(candidates: Mapping[str, Candidate], budget: int, step: int = 1) -> dict[str, int]:
    """The rank of each matrix, 0 for those left whole, that keep at most `budget` numbers in all at the least loss.

    Thin matrices (k and v of grouped-query attention) are judged by their own loss, so they are cut less, or not.
    Raises UsageError for a budget below the smallest possible.
    """
    options = {
        name: [
            Choice("0", rows * columns, 0.0),
            *(
                Choice(str(rank), rank * (rows + columns), one.weight * float(one.spectrum.tail[rank]))
                for rank in rank_choices(one.spectrum, step)
            ),
        ]
        for name, one in candidates.items()
        for rows, columns in [one.spectrum.shape]
    }
    return {name: int(choice.label) for name, choice in allocate(options, budget).items()}
