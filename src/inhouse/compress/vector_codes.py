"""Vector codes: runs of d inputs as sums of M codebook entries, one scale a row: w = s (C_1[i_1] + ... + C_M[i_M]).

Additive codes in the spirit of AQLM (Egiazarian et al. 2024, arXiv 2401.06118), with the error fed forward from run to
run as in GPTVQ (van Baalen et al. 2024, arXiv 2402.15319). All make tr((W - W') H (W - W')^T) small, H = E[x x^T]:

    1. codebooks by k-means weighted with H's diagonal, each on what those before it left
    2. codes by beam search, run by run along the inputs, the error of a run spread over those to come
    3. in rounds: codebooks by conjugate gradients on the quadratic, scales in closed form, codes by coordinate descent,
       each of which can only lower the error; then codebooks rounded so that no sum leaves int8, scales to f16, and
       codes and scales chosen once more

Several matrices may share their codebooks, which is what makes them pay in a small model. Knows matrices, moments and
how the packed format wants its numbers; does not know models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from inhouse.compress.codebook import assign, decode, kmeans, search
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.form import Form
from inhouse.runtime.packed import pack_vectors

SAMPLE = 1 << 16  # vectors that k-means sees


@dataclass(frozen=True, slots=True)
class VectorOptions:
    """How codes are made. Bits a weight: books * log2(entries) / dim, plus scales and codebooks."""

    dim: int = 8
    entries: int = 256
    books: int = 2
    beam: int = 8
    rounds: int = 4
    steps: int = 20  # conjugate-gradient steps of a round
    damp: float = 0.01  # of H's mean diagonal
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dim not in (4, 8) or not 2 <= self.entries <= 256 or not 1 <= self.books <= 4:
            raise UsageError(
                f"{self.books} codebooks of {self.entries} entries of {self.dim} inputs",
                remedy="Use 1 to 4 codebooks, 2 to 256 entries, 4 or 8 inputs", param="entries",
            )  # fmt: skip


@dataclass(slots=True)
class Coded:
    """A matrix [out, in] as codes; `value` is what it stands for, given the codebooks."""

    codes: Tensor  # int64 [out, runs, M]
    scales: Tensor  # f32 [out]
    inputs: int

    def unit(self, books: Tensor) -> Tensor:
        """Before the scales, f32 [out, runs * d]: with the inputs padded to whole runs."""
        return decode(self.codes, books).flatten(1)

    def value(self, books: Tensor) -> Tensor:
        """f32 [out, in]."""
        return (self.unit(books) * self.scales[:, None])[:, : self.inputs]


@dataclass(slots=True)
class _Matrix:
    """One matrix of the problem, its inputs padded to whole runs."""

    weight: Tensor  # f32 [out, width]
    moment: Tensor  # f32 [width, width], damped, its mean diagonal 1 / size of the matrix's own error
    inputs: int
    coded: Coded = field(init=False)

    def error(self, books: Tensor) -> float:
        gap = self.weight - self.coded.unit(books) * self.coded.scales[:, None]
        return float(((gap @ self.moment) * gap).double().sum())


@dataclass(frozen=True, slots=True)
class VectorCodes:
    """Matrices that share codebooks."""

    books: Tensor  # f32 [M, K, d]: whole numbers of which no M add up beyond +-127
    coded: tuple[Coded, ...]
    losses: tuple[float, ...]  # sum of relative output errors after k-means, encoding, and each step of each round

    def values(self) -> list[Tensor]:
        return [one.value(self.books) for one in self.coded]


def fit(
    weights: Sequence[Tensor],
    moments: Sequence[Tensor | None],
    options: VectorOptions,
    importance: Sequence[float] | None = None,
) -> VectorCodes:
    """Codes of matrices [out, in] that share codebooks.

    Args:
        moments: E[x x^T] [in, in] of each, or None for the identity.
        importance: how much the relative output error of each counts; default: its number of weights.

    Raises UsageError where there is nothing to code or a moment does not fit.
    """
    if not weights or len(weights) != len(moments):
        raise UsageError(f"{len(weights)} matrices and {len(moments)} moments")
    counts = importance or [float(w.numel()) for w in weights]
    matrices = [_padded(w, m, c, options) for w, m, c in zip(weights, moments, counts, strict=True)]
    books, losses = _first_books(matrices, options)
    for one in matrices:
        encode_forward(one, books, options.beam)
    losses.append(_total(matrices, books))
    for _ in range(options.rounds):
        books = _better_books(matrices, books, options.steps)
        losses.append(_total(matrices, books))
        losses += _descend(matrices, books, options.beam)
    books = _whole(matrices, books)
    for _ in range(2):
        _descend(matrices, books, options.beam)
    for one in matrices:
        narrow_scales(one.coded)
    losses.append(_total(matrices, books))
    return VectorCodes(books, tuple(one.coded for one in matrices), tuple(losses))


def form_of(coded: Coded, books: Tensor) -> Form:
    """How a matrix is stored: `vq1_row` .. `vq3_row`. Raises UnsupportedError for runs of other than 8 inputs or more
    codebooks than the format has."""
    count, entries, dim = books.shape
    if dim != 8 or count > 3:
        raise UnsupportedError(
            f"{count} codebooks of {dim} inputs have no packed format",
            remedy="Use dim 8 and at most 3 books",
            param="dim",
        )
    whole = np.zeros((count, 256, dim), np.int8)
    whole[:, :entries] = books.numpy()
    index = np.ascontiguousarray(coded.codes.permute(2, 0, 1).to(torch.uint8).numpy())
    return Form(pack_vectors(f"vq{count}_row", index, whole, coded.scales[:, None].numpy(), coded.inputs))


def recode(weight: Tensor, moment: Tensor | None, books: Tensor, options: VectorOptions) -> Coded:
    """Codes and scales of one more matrix with codebooks that are given (of another moment, after its predecessors have
    been coded)."""
    one = _padded(weight, moment, 1.0, options)
    one.coded = Coded(torch.zeros(len(weight), 0, len(books), dtype=torch.int64), _row_scales(one, books), one.inputs)
    encode_forward(one, books, options.beam)
    for _ in range(options.rounds):
        _descend([one], books, options.beam)
    rescale(one, books)
    narrow_scales(one.coded)
    return one.coded


def _padded(weight: Tensor, moment: Tensor | None, importance: float, options: VectorOptions) -> _Matrix:
    """Raises UsageError for a moment of another size."""
    rows, inputs = weight.shape
    width = -(-inputs // options.dim) * options.dim
    h = torch.eye(inputs, dtype=torch.float64) if moment is None else moment.double()
    if h.shape != (inputs, inputs):
        raise UsageError(f"a moment {list(h.shape)} does not belong to a matrix {[rows, inputs]}")
    h = h + torch.eye(inputs, dtype=torch.float64) * (options.damp * float(h.diagonal().mean()) + 1e-12)
    w = weight.double()
    size = float(((w @ h) * w).sum())
    wide = torch.zeros(width, width, dtype=torch.float64)
    wide[:inputs, :inputs] = h * (importance / size if size > 0 else importance)
    wide.diagonal()[inputs:] = 1e-6 * float(wide.diagonal()[:inputs].mean())
    full = torch.zeros(rows, width)
    full[:, :inputs] = weight.float()
    return _Matrix(full, wide.float(), inputs)


def _first_books(matrices: Sequence[_Matrix], options: VectorOptions) -> tuple[Tensor, list[float]]:
    """k-means on what the codebooks before left, over vectors of all matrices divided by their rows' scales."""
    vectors, weights = [], []
    for one in matrices:
        scales = one.weight.square().mean(1).sqrt().clamp(min=1e-20)
        one.coded = Coded(torch.zeros(0), scales, one.inputs)
        vectors.append((one.weight / scales[:, None]).reshape(-1, options.dim))
        importance = scales.square()[:, None] * one.moment.diagonal()
        weights.append(importance.reshape(-1, options.dim))
    left, weight = torch.cat(vectors), torch.cat(weights)
    generator = torch.Generator().manual_seed(options.seed)
    seen = torch.randperm(len(left), generator=generator)[:SAMPLE] if len(left) > SAMPLE else slice(None)
    books, losses = [], []
    for m in range(options.books):
        book, _, _ = kmeans(left[seen], weight[seen], options.entries, seed=options.seed + m)
        codes, distances = assign(left, weight, book)
        left = left - book[codes]
        books.append(book)
        losses.append(float(distances.double().sum()))
    return torch.stack(books), losses


def _row_scales(one: _Matrix, books: Tensor) -> Tensor:
    """A first guess: the row's size over that of a typical sum of entries."""
    typical = float(books.square().mean(dim=(1, 2)).sum().sqrt().clamp(min=1e-20))
    return (one.weight.square().mean(1).sqrt() / typical).clamp(min=1e-20)


def encode_forward(one: _Matrix, books: Tensor, beam: int) -> None:
    """Codes run by run; what a run loses is made up for by the runs to come (GPTQ's update for whole runs: with U^T U
    the inverse of H, the rest moves by -E U_bb^-1 U_b,rest, and (U_bb^T U_bb)^-1 measures a run's own error)."""
    dim, width = books.shape[2], one.weight.shape[1]
    upper = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(one.moment.double())), upper=True
    ).float()
    left, codes = one.weight.clone(), []
    scales = one.coded.scales[:, None]
    for at in range(0, width, dim):
        own = upper[at : at + dim, at : at + dim]
        root = torch.linalg.solve_triangular(own, torch.eye(dim), upper=True)  # distances are |(v - c) root|
        found, _ = search((left[:, at : at + dim] / scales) @ root, books @ root, beam)
        codes.append(found)
        gap = left[:, at : at + dim] - decode(found, books) * scales
        left[:, at + dim :] -= (gap @ root) @ upper[at : at + dim, at + dim :]
    one.coded = Coded(torch.stack(codes, dim=1), one.coded.scales, one.inputs)


def _descend(matrices: Sequence[_Matrix], books: Tensor, beam: int) -> list[float]:
    """Scales, then one sweep of coordinate descent over the codes, of every matrix; the losses after each."""
    for one in matrices:
        rescale(one, books)
    losses = [_total(matrices, books)]
    for one in matrices:
        sweep(one, books, beam)
    return [*losses, _total(matrices, books)]


def rescale(one: _Matrix, books: Tensor) -> None:
    """The best scale of each row for its codes: <w, H u> / <u, H u>."""
    unit = one.coded.unit(books)
    moved = unit @ one.moment
    size = (moved * unit).sum(1)
    scales = torch.where(size > 0, (moved * one.weight).sum(1) / size.clamp(min=1e-30), one.coded.scales)
    one.coded.scales = torch.where(scales.abs() > 1e-20, scales, one.coded.scales)


def sweep(one: _Matrix, books: Tensor, beam: int) -> None:
    """Each run's codes anew, all others as they are, kept where that lowers the row's error."""
    dim, scales = books.shape[2], one.coded.scales[:, None]
    gap = one.coded.unit(books) * scales - one.weight
    pull = gap @ one.moment
    for run in range(one.coded.codes.shape[1]):
        part = slice(run * dim, run * dim + dim)
        h = one.moment[part, part]
        root = torch.linalg.cholesky(h.double()).float()  # distances are |(v - c) root|
        now = decode(one.coded.codes[:, run], books)
        wanted = now - torch.cholesky_solve(pull[:, part].T, root).T / scales
        found, after = search(wanted @ root, books @ root, beam)
        before = ((now - wanted) @ root).square().sum(1)
        better = after < before * (1 - 1e-5)
        one.coded.codes[:, run] = torch.where(better[:, None], found, one.coded.codes[:, run])
        change = (decode(one.coded.codes[:, run], books) - now) * scales
        pull += change @ one.moment[part]


def _better_books(matrices: Sequence[_Matrix], books: Tensor, steps: int) -> Tensor:
    """The quadratic of the codebooks, lowered by conjugate gradients in float64; never above where it began."""
    solved = torch.zeros_like(books, dtype=torch.float64)
    residual = -_slope(matrices, books.double(), offset=True)
    direction, size = residual.clone(), residual.square().sum()
    for _ in range(steps):
        if not float(size) > 0:
            break
        image = _slope(matrices, direction, offset=False)
        curvature = (direction * image).sum()
        if not float(curvature) > 0:
            break
        length = size / curvature
        solved += length * direction
        residual -= length * image
        grown = residual.square().sum()
        direction = residual + grown / size * direction
        size = grown
    better = (books.double() + solved).float()
    return better if _total(matrices, better) <= _total(matrices, books) else books


def _slope(matrices: Sequence[_Matrix], books: Tensor, *, offset: bool) -> Tensor:
    """Half the error's gradient by the codebooks; without `offset` its linear part alone, at `books`."""
    total = torch.zeros_like(books)
    width = books.shape[2]
    for one in matrices:
        scales = one.coded.scales.double()[:, None]
        gap = decode(one.coded.codes, books).flatten(1) * scales
        if offset:
            gap = gap - one.weight.double()
        pull = (gap @ one.moment.double()) * scales
        runs = pull.reshape(-1, width)
        for m in range(len(books)):
            total[m].index_add_(0, one.coded.codes[..., m].flatten(), runs)
    return total


def _whole(matrices: Sequence[_Matrix], books: Tensor) -> Tensor:
    """Codebooks as whole numbers of which no M add up beyond +-127, the rest of their size moved into the scales."""
    most = float(books.abs().amax(1).sum(0).max())
    if not most > 0:
        return books
    unit = most / (127.0 - len(books) / 2)
    for one in matrices:
        one.coded.scales = one.coded.scales * unit
    return (books / unit).round()


def narrow_scales(one: Coded) -> None:
    """Scales as they are stored: f16, finite."""
    one.scales = one.scales.clamp(-65504.0, 65504.0).half().float()


def _total(matrices: Sequence[_Matrix], books: Tensor) -> float:
    return sum(one.error(books) for one in matrices)
