"""Masks of sparse matrices: patterns, choosing what is kept by a score, weights refitted to a mask, ratios by layer.

Pure torch. A mask is bool [out, in], True where a weight is kept; a weight that is not kept is exactly 0.0. Knows no
model and no file; what a score means is a method page's own matter.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inhouse.core.errors import UsageError

GROUP_MOST = 256  # of N:M; wider groups are rows cut in pieces, which unstructured sparsity does better


@dataclass(frozen=True, slots=True)
class Pattern:
    """What part of a matrix becomes zero: a share, or all but `n` of each `m` weights along the inputs."""

    sparsity: float = 0.5  # of all weights; of N:M it is 1 - n / m
    n: int = 0  # kept of each group; 0: unstructured
    m: int = 0

    @property
    def grouped(self) -> bool:
        return self.m > 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.grouped else f"{self.sparsity:g}"


def parse_pattern(text: str | float) -> Pattern:
    """`0.5`, `50%` or `2:4` (two of four are kept). Raises UsageError for anything else, 0 and 1 included.

    YAML 1.1 reads an unquoted 2:4 as a number of base 60, 124; whole numbers above 60 are read back as
    what was meant.
    """
    if isinstance(text, int | float) and text > 60 and text == int(text):
        text = f"{int(text) // 60}:{int(text) % 60}"
    told = str(text).strip()
    groups = re.fullmatch(r"(\d{1,3}):(\d{1,3})", told)
    if groups:
        n, m = int(groups[1]), int(groups[2])
        if not 1 <= n < m <= GROUP_MOST:
            raise UsageError(f"{told} keeps {n} of {m}", remedy=f"Use N:M with 1 <= N < M <= {GROUP_MOST}, such as 2:4")
        return Pattern(1.0 - n / m, n, m)
    try:
        share = float(told[:-1]) / 100.0 if told.endswith("%") else float(told)
    except ValueError:
        share = -1.0
    if not 0.0 < share < 1.0:
        raise UsageError(f"sparsity {told!r} is no share between 0 and 1", remedy="Use 0.5, 50% or N:M such as 2:4")
    return Pattern(share)


def keep_matrix(scores: Tensor, sparsity: float) -> Tensor:
    """Mask of the highest scores of a whole matrix [out, in]; exactly round(sparsity * size) are dropped, ties in
    favour of the earlier weight."""
    return _keep_highest(scores.reshape(1, -1), sparsity).reshape(scores.shape)


def keep_rows(scores: Tensor, sparsity: float) -> Tensor:
    """Mask of the highest scores of each row; exactly round(sparsity * in) of every row are dropped."""
    return _keep_highest(scores, sparsity)


def _keep_highest(scores: Tensor, sparsity: float) -> Tensor:
    drop = round(sparsity * scores.shape[1])
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    mask.scatter_(1, order[:, : scores.shape[1] - drop], value=True)
    return mask


def keep_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Mask of the `n` highest scores of each `m` along the inputs; a shorter last group keeps at most `n` as well."""
    rows, width = scores.shape
    short = -width % m
    padded = torch.nn.functional.pad(scores, (0, short), value=float("-inf")).reshape(rows, -1, m)
    order = torch.argsort(padded, dim=2, descending=True, stable=True)
    mask = torch.zeros(padded.shape, dtype=torch.bool)
    mask.scatter_(2, order[..., :n], value=True)
    return mask.reshape(rows, -1)[:, :width].contiguous()


def keep(scores: Tensor, pattern: Pattern, *, by_row: bool) -> Tensor:
    """Mask of a pattern; unstructured it is taken by row or over the whole matrix."""
    if pattern.grouped:
        return keep_groups(scores, pattern.n, pattern.m)
    return keep_rows(scores, pattern.sparsity) if by_row else keep_matrix(scores, pattern.sparsity)


def held(scores: Tensor, prior: Tensor | None) -> Tensor:
    """Scores under which a weight that is dropped already (`prior` False) is dropped first."""
    return scores if prior is None else scores.masked_fill(~prior, float("-inf"))


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """The weights kept, exact zeros elsewhere, whatever stood there (infinities included)."""
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))


def zeros_of(weight: Tensor) -> int:
    """Exact zeros of a tensor."""
    return int((weight == 0).sum())


def check_groups(mask: Tensor, n: int, m: int) -> bool:
    """Whether no group of `m` along the inputs keeps more than `n`."""
    short = -mask.shape[1] % m
    groups = torch.nn.functional.pad(mask, (0, short)).reshape(mask.shape[0], -1, m)
    return bool((groups.sum(dim=2) <= n).all())


def refit(weight: Tensor, mask: Tensor, gram: Tensor, *, steps: int = 100, damping: float = 1e-4) -> Tensor:
    """The kept weights that answer best for the whole matrix: argmin over V on the mask of tr((V - W) H (V - W)^T).

    Every row is a least-squares problem of its own; all are solved at once by conjugate gradients with a diagonal
    preconditioner, restricted to the mask, in f64 (memory: a few matrices; a step costs one product with `gram`).

    Args:
        weight: [out, in]; what is approximated.
        gram: [in, in], mean or sum of x x^T over the calibration tokens.
        damping: of the mean diagonal, added to it.

    Returns f32 [out, in], 0.0 off the mask.
    """
    target = weight.double()
    h = gram.double().clone()
    h.diagonal().add_(damping * float(h.diagonal().mean()) + 1e-30)
    kept = mask.double()
    inverse = 1.0 / h.diagonal()
    x = target * kept
    residual = ((target - x) @ h) * kept
    z = residual * inverse
    direction = z.clone()
    rho = (residual * z).sum(1, keepdim=True)
    floor = 1e-24 * ((target @ h) * target).sum(1, keepdim=True).clamp_min(1e-300)
    for _ in range(steps):
        moved = (direction @ h) * kept
        curve = (direction * moved).sum(1, keepdim=True)
        going = (rho > floor) & (curve > 0)
        if not bool(going.any()):
            break
        step = torch.where(going, rho / curve.clamp_min(1e-300), 0.0)
        x += step * direction
        residual -= step * moved
        z = residual * inverse
        after = (residual * z).sum(1, keepdim=True)
        direction = z + torch.where(going, after / rho.clamp_min(1e-300), 0.0) * direction
        rho = after
    return masked(x.float(), mask)


def output_error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    """Relative squared error of the outputs, tr(D H D^T) / tr(W H W^T) with D = W - V; f64 inside."""
    w, h = weight.double(), gram.double()
    d = w - other.double()
    return float(((d @ h) * d).sum() / ((w @ h) * w).sum().clamp_min(1e-300))


def outlier_share(scores: Tensor, times: float = 5.0) -> float:
    """Share of scores above `times` their mean: the layer-wise outlier distribution of OWL (arXiv 2310.05175)."""
    return float((scores > times * scores.mean()).double().mean())


def spread_ratios(shares: Sequence[float], sparsity: float, spread: float = 0.08) -> list[float]:
    """Sparsity of each layer, the fewer zeros the more outliers it has: within `spread` of a mean of `sparsity` (OWL,
    arXiv 2310.05175, section 3). Layers that weigh differently must be given once for each unit of weight."""
    values = torch.tensor(list(shares), dtype=torch.float64)
    low, high = float(values.min()), float(values.max())
    if high == low or spread == 0.0:
        return [sparsity] * len(values)
    lifted = (values - low) / (high - low) * 2.0 * spread
    ratios = sparsity - (lifted - lifted.mean())
    return [min(0.99, max(0.0, float(one))) for one in ratios]
