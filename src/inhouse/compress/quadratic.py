"""The quadratic loss of a linear's output, sum over rows of d H d^T with d = W - W^, and what can be solved in it.

H is the mean of x x^T over calibration (`LinearStats.gram`). Pure: knows grids, no methods.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from inhouse.compress.grids import Grid, Params

WIDE = 4096  # inputs up to which factors are made in f64
DAMPINGS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)  # times the damping asked for, until the matrix factors


class Factor(NamedTuple):
    """upper: U with U^T U = (H + damping * mean(diag H) I)^-1, upper triangular, f32 [in, in]; damping: as used."""

    upper: Tensor
    damping: float


def settled(gram: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of H (f64, or f32 of a wide one) whose dead inputs (diagonal 0) have mean weight and no neighbours, and
    which they are (bool [in])."""
    wide = gram.to(torch.float64 if gram.shape[0] <= WIDE else torch.float32).clone()
    diagonal = wide.diagonal()
    dead = diagonal <= 0
    if bool(dead.any()):
        alive = diagonal[~dead]
        wide[dead] = 0
        wide[:, dead] = 0
        wide[dead, dead] = alive.mean() if alive.numel() else 1.0
    return wide, dead


def inverse_factor(gram: Tensor, damping: float) -> Factor | None:
    """The factor of a settled H, which is used up; None if it does not factor with the strongest damping tried.

    One Cholesky of H with rows and columns reversed and one triangular inverse: H = M M^T with M upper, U = M^-1.
    """
    mean = gram.diagonal().mean().item()
    diagonal = gram.diagonal().clone()
    for times in DAMPINGS:
        share = damping * times
        gram.diagonal().copy_(diagonal + share * mean)
        lower, failed = torch.linalg.cholesky_ex(gram.flip(0, 1))
        if int(failed):
            continue
        inverse = _identity(lower)  # solved in place: of a wide matrix every copy counts
        torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
        del lower
        if bool(torch.isfinite(inverse[-1]).all()):
            return Factor(inverse.to(torch.float32).flip(0, 1), share)
    return None


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[0], dtype=like.dtype)


def losses(difference: Tensor, gram: Tensor) -> Tensor:
    """d H d^T of each row, f64 [out], of differences f32 [out, in]."""
    wide = difference.to(gram.dtype)
    return ((wide @ gram) * wide).sum(1).double()


def relative_error(weight: Tensor, value: Tensor, gram: Tensor) -> float:
    """||(W - W^) X||^2 / ||W X||^2."""
    whole = float(losses(weight, gram).sum())
    return float(losses(weight - value, gram).sum()) / whole if whole > 0 else 0.0


def descend(weight: Tensor, gram: Tensor, grid: Grid, params: Params, codes: Tensor, sweeps: int) -> Tensor:
    """Codes of no greater loss: each column in turn is rounded anew to what is best beside all the others.

    Cyclic coordinate descent (QuantEase, Behdin et al. 2023, arXiv 2309.01885). gram: settled, f64 or f32 [in, in].
    Weights that are exactly 0 stay 0 where the grid has a 0.
    """
    index, codes = grid.index(), codes.clone()
    weight = weight.to(torch.float32)
    gram32 = gram.to(torch.float32)
    held = weight == 0 if grid.keeps_zero else torch.zeros_like(weight, dtype=torch.bool)
    value = grid.decode(codes, params, index)
    pull = (weight - value) @ gram32
    diagonal = gram32.diagonal().clamp(min=1e-20)
    for _ in range(sweeps):
        moved = 0
        for j in range(weight.shape[1]):
            column = slice(j, j + 1)
            wanted = (value[:, j] + pull[:, j] / diagonal[j])[:, None]
            wanted = torch.where(held[:, column], 0.0, wanted)
            code = grid.round(wanted, params, index[column])
            found = grid.decode(code, params, index[column])
            step = found[:, 0] - value[:, j]
            if not bool(step.any()):
                continue
            moved += 1
            pull.addr_(step, gram32[j], alpha=-1)
            value[:, column], codes[:, column] = found, code
        if not moved:
            break
    return codes


def resolve(weight: Tensor, gram: Tensor, grid: Grid, params: Params, codes: Tensor) -> Params:
    """Scales of least loss for codes that are given, row by row over all groups together, as the format stores them.

    For one-level formats without minimums; others keep their params, and so does a row that would not gain.
    """
    if not grid.one_level or params.offset is not None or params.stored is not None:
        return params
    index, groups = grid.index(), params.scale.shape[1]
    ones = Params(torch.ones_like(params.scale), params.zero)
    level = grid.decode(codes, ones, index).double()
    wide, target = gram.double(), weight.double()
    left = torch.zeros(len(weight), groups, groups, dtype=torch.float64)
    right = torch.zeros(len(weight), groups, dtype=torch.float64)
    for group in range(groups):
        columns = slice(group * grid.group, min((group + 1) * grid.group, grid.inputs))
        pushed = level[:, columns] @ wide[columns]
        right[:, group] = (pushed * target).sum(1)
        left[:, group].index_add_(1, index, pushed * level)
    ridge = 1e-9 * left.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    left += torch.diag_embed(ridge[:, None].expand(-1, groups))
    factor, failed = torch.linalg.cholesky_ex(
        left
    )  # of LU, oneMKL loses the pivots of large batches on several threads
    solved = torch.cholesky_solve(right[..., None], factor)[..., 0].float()
    usable = torch.isfinite(solved) & (solved != 0) & (failed == 0)[:, None]
    solved = torch.where(usable, solved, params.scale)
    new = Params(grid.storable(solved), params.zero)
    before = losses(weight - grid.decode(codes, params, index), gram)
    after = losses(weight - grid.decode(codes, new, index), gram)
    return Params(torch.where((after < before)[:, None], new.scale, params.scale), params.zero)


def corrected(weight: Tensor, gram: Tensor, cross: Tensor, damping: float = 1e-3) -> Tensor:
    """The weight whose output on the inputs that there now are is nearest to W on the inputs that there once were:
    W C (H + d I)^-1 with C the mean of x_before x_now^T [in, in], H of x_now. f32 [out, in].

    The closed form behind GPTAQ (Li et al. 2025, arXiv 2504.02692). The damping draws towards W, not towards 0.
    """
    wide = gram.double()
    ridge = damping * wide.diagonal().mean().clamp(min=1e-30) * _identity(wide)
    factor = torch.linalg.cholesky(wide + ridge)
    return torch.cholesky_solve((weight.double() @ (cross.double() + ridge)).T, factor).T.float()
