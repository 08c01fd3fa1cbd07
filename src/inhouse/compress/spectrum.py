"""Low-rank factors of a matrix: plain, activation-aware and whitened truncated SVD.

    svd       W = U S V^T, cut to k (Eckart and Young 1936): least ||W - W'||_F
    asvd      the SVD of W diag(mean|x|^alpha) (ASVD, Yuan et al. 2023, arXiv 2312.05821)
    whitened  the SVD of W L with L L^T = E[x x^T] (SVD-LLM, Wang et al. 2024, arXiv 2403.07378): least
              E||(W - W') x||^2, which then equals the energy of the singular values cut off

All arithmetic is float64. Knows matrices and moments of their inputs; knows no models, no formats
and no files.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from inhouse.core.errors import FormatError, UnsupportedError, UsageError

METHODS = ("svd", "asvd", "whitened")
FLOOR = 1e-12  # eigenvalues of the second moment below this share of the largest are raised to it


@dataclass(frozen=True, slots=True)
class Spectrum:
    """A matrix taken apart, best direction first: W = left @ right when all r are kept."""

    left: Tensor  # [out, r] f64, orthogonal columns times singular values
    right: Tensor  # [r, in] f64
    tail: Tensor  # [r + 1] f64: squared error, in the method's own norm, where the first k are kept

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the matrix."""
        return self.left.shape[0], self.right.shape[1]


def moment_root(gram: Tensor, floor: float = FLOOR) -> Tensor:
    """The triangular root of a second moment: lower L, f64 [in, in], L L^T = E[x x^T].

    Of the eigenvalues, those below `floor` times the largest are raised to that, so that an input that never moved, or
    two that always move together, leave it invertible; the root is the QR of the eigenvectors scaled, which never
    squares the condition as Cholesky of the product would. Raises FormatError for a moment that is not finite.
    """
    if not bool(torch.isfinite(gram).all()):
        raise FormatError("the inputs' second moment is not finite", remedy="Calibrate with other text, or in float32")
    values, vectors = torch.linalg.eigh((gram.double() + gram.double().T) / 2)
    largest = float(values[-1].clamp(min=0.0))
    values = values.clamp(min=largest * floor) if largest > 0 else torch.ones_like(values)
    upper: Tensor = torch.linalg.qr((vectors * values.sqrt()).T).R
    sign = torch.where(upper.diagonal() < 0, -1.0, 1.0).double()
    return (upper * sign[:, None]).T


def decompose(
    weight: Tensor,
    method: str = "whitened",
    *,
    gram: Tensor | None = None,
    mean_abs: Tensor | None = None,
    alpha: float = 0.5,
) -> Spectrum:
    """Takes a matrix [out, in] apart.

    Args:
        method: of METHODS.
        gram: [in, in], E[x x^T] or the sum of x x^T; `whitened` needs it.
        mean_abs: [in], mean |x|; `asvd` needs it.

    Raises UsageError for an unknown method or a moment that is missing or misshaped, FormatError for one not finite.
    """
    w = weight.double()
    if method == "svd":
        return _spectrum(w, None, None)
    if method == "asvd":
        scale = _given(mean_abs, (w.shape[1],), "mean |x|").double()
        least = float(scale.max()) * FLOOR
        scale = scale.clamp(min=least).pow(alpha) if least > 0 else torch.ones_like(scale)
        return _spectrum(w * scale, None, scale)
    if method != "whitened":
        raise UsageError(f"unknown decomposition {method!r}", remedy=f"Use {', '.join(METHODS)}", param="method")
    root = moment_root(_given(gram, (w.shape[1], w.shape[1]), "second moments"))
    return _spectrum(w @ root, root, None)


def _given(moment: Tensor | None, shape: tuple[int, ...], what: str) -> Tensor:
    if moment is None or tuple(moment.shape) != shape:
        found = None if moment is None else list(moment.shape)
        raise UsageError(f"needs the inputs' {what} {list(shape)}, got {found}", remedy="Calibrate first")
    return moment


def _spectrum(scaled: Tensor, root: Tensor | None, scale: Tensor | None) -> Spectrum:
    """The SVD of W R, with R taken off the right factor again: a lower triangle `root`, a diagonal `scale`, or none."""
    u, s, vt = torch.linalg.svd(scaled, full_matrices=False)
    if root is not None:
        vt = torch.linalg.solve_triangular(root, vt, upper=False, left=False)
    elif scale is not None:
        vt = vt / scale
    energy = s.square().flip(0).cumsum(0).flip(0)
    return Spectrum(u * s, vt, torch.cat([energy, energy.new_zeros(1)]))


def largest_saving_rank(shape: tuple[int, int]) -> int:
    """The largest k for which k (out + in) < out * in: beyond it the factors are larger than the matrix."""
    rows, columns = shape
    return (rows * columns - 1) // (rows + columns)


def check_rank(shape: tuple[int, int], rank: int, *, allow_larger: bool = False) -> None:
    """Raises UsageError for a rank that a matrix [out, in] does not have, and UnsupportedError where its factors would
    be larger than the matrix (a side branch passes `allow_larger`)."""
    rows, columns = shape
    if not 1 <= rank <= min(shape):
        raise UsageError(f"a matrix [{rows}, {columns}] has no rank {rank}", param="rank")
    if rank > largest_saving_rank(shape) and not allow_larger:
        raise UnsupportedError(
            f"factors of rank {rank} hold {rank * (rows + columns)} numbers, the matrix [{rows}, {columns}] holds "
            f"{rows * columns}",
            remedy=f"Use a rank of at most {largest_saving_rank(shape)}, or leave the matrix as it is",
            param="rank",
        )


def cut(spectrum: Spectrum, rank: int, *, allow_larger: bool = False) -> tuple[Tensor, Tensor]:
    """Factors (a [k, in], b [out, k]), f32, of the best rank-k approximation b a; each direction's size is shared
    evenly between them, so that either may be stored in a narrow type.

    Raises UnsupportedError where the factors would be larger than the matrix (a side branch passes `allow_larger`), and
    UsageError for a rank that the matrix does not have.
    """
    check_rank(spectrum.shape, rank, allow_larger=allow_larger)
    left, right = spectrum.left[:, :rank], spectrum.right[:rank]
    sizes = left.norm(dim=0), right.norm(dim=1)
    share = torch.where(sizes[0] > 0, (sizes[1] / sizes[0].clamp(min=1e-300)).sqrt(), torch.ones_like(sizes[0]))
    share = torch.where(share > 0, share, torch.ones_like(share))
    return (right / share[:, None]).float().contiguous(), (left * share).float().contiguous()


def output_error(weight: Tensor, other: Tensor, gram: Tensor | None = None) -> float:
    """tr((W - W') G (W - W')^T) in f64: with G = E[x x^T] the mean squared error of the output, without it the squared
    Frobenius norm."""
    gap = weight.double() - other.double()
    return float(gap.square().sum()) if gram is None else float(((gap @ gram.double()) * gap).sum())


def rank_choices(spectrum: Spectrum, step: int = 1) -> list[int]:
    """Ranks worth choosing from: multiples of `step` that save."""
    most = min(largest_saving_rank(spectrum.shape), spectrum.right.shape[0])
    return list(range(step, most + 1, step))
