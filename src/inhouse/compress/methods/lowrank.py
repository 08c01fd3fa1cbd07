"""Low rank: a matrix stored and run as two thin ones, y = b (a x).

Truncated SVD (Eckart and Young 1936), ASVD (Yuan et al. 2023, arXiv 2312.05821), whitened SVD (SVD-LLM, Wang et al.
2024, arXiv 2403.07378) as `compress.spectrum` has them; each matrix at one ratio (`rank_budget` shares ranks out).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inhouse.compress.pack_as import pack_as
from inhouse.compress.ranks import rank_for
from inhouse.compress.spectrum import METHODS, Spectrum, check_rank, cut, decompose, output_error
from inhouse.compress.stats import LinearStats
from inhouse.compress.values import Natural, NotNegative, Share
from inhouse.compress.work import Work
from inhouse.core.errors import InhouseError, UsageError
from inhouse.runtime.form import Form

# Plain storage that a low-rank form of floats is held against, widest first.
_PLAIN = ("f32", "bf16", "q8_0", "q6_0", "q4_0")


@dataclass(frozen=True, slots=True)
class LowRank:
    """Options of the matrix-wise method."""

    method: str = "whitened"  # svd | asvd | whitened
    ratio: Share = 0.2  # share of the matrix's numbers to save
    rank: Natural = 0  # instead of `ratio`
    alpha: NotNegative = 0.5  # asvd: exponent of mean |x|
    factors: str = "bf16"  # format of both factors
    keep_if_better: bool = False  # keep the matrix unless the factors beat plain storage of no more bytes

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}", remedy=f"Use {', '.join(METHODS)}", param="method")
        if not self.rank and not 0.0 < self.ratio < 1.0:
            raise UsageError(f"ratio is {self.ratio}, must lie between 0 and 1", param="ratio")


def lowrank(weight: Tensor, stats: LinearStats | None, options: LowRank, fmt: str = "") -> Form | Tensor:
    """As the table of methods calls it: weight f32 [out, in] -> its Form, or the weight where it is better kept.
    `fmt`, where it is given, is the format of the factors."""
    if fmt:
        options = replace(options, factors=fmt)
    gram, mean_abs = (None, None) if stats is None else (stats.gram, stats.mean_abs)
    form = factorise(weight, options, gram, mean_abs)
    return weight if form is None else form


def factorise(
    weight: Tensor, options: LowRank, gram: Tensor | None = None, mean_abs: Tensor | None = None
) -> Form | None:
    """The low-rank form of a matrix [out, in]; None where `keep_if_better` and plain storage is better.

    Raises UnsupportedError where the factors would be larger than the matrix, UsageError where the statistics that the
    method needs are missing or the matrix has no rank that saves so much.
    """
    rank = rank_of((weight.shape[0], weight.shape[1]), options)
    taken = decompose(weight, options.method, gram=gram, mean_abs=mean_abs, alpha=options.alpha)
    form = form_of(taken, rank, options.factors)
    if options.keep_if_better and not better_than_plain(weight, form, gram):
        return None
    return form


def rank_of(shape: tuple[int, int], options: LowRank) -> int:
    """The rank that a matrix [out, in] is cut to. Raises UsageError where it has none that saves so much, and
    UnsupportedError where the factors would be larger than the matrix."""
    rank = options.rank or rank_for(shape, options.ratio)
    if rank < 1:
        raise UsageError(f"no rank of a matrix {list(shape)} saves {options.ratio:.0%}", param="ratio")
    check_rank(shape, rank)
    return rank


def lowrank_check(work: Work, name: str, fmt: str, options: LowRank) -> None:
    """Raises where the shape of a weight tells that it cannot be cut so."""
    rows, columns = work.shape(name)
    try:
        rank_of((rows, columns), options)
    except InhouseError as error:
        raise type(error)(f"{name}: {error.message}", remedy=error.remedy, param=name) from None


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
