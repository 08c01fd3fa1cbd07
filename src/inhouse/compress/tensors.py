"""Tensor decompositions in float64: Tucker of stacks of matrices, tensor trains of tables.

Knows arrays and their errors; does not know models or formats. Sources: HOSVD (De Lathauwer et al. 2000), HOOI (the
same), TT-SVD (Oseledets 2011), TT matrices (Novikov et al. 2015, arXiv 1509.06569).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inhouse.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Tucker:
    """A stack [n, out, in] as cores [n, a, b] between a shared left [out, a] and right [b, in]:
    stack[e] = left @ cores[e] @ right. left has orthonormal columns, right orthonormal rows."""

    left: Tensor
    cores: Tensor
    right: Tensor

    def value(self) -> Tensor:
        """The stack that it stands for."""
        return self.left @ self.cores @ self.right

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return self.left.numel() + self.cores.numel() + self.right.numel()


def tucker_numbers(shape: Sequence[int], ranks: tuple[int, int]) -> int:
    """What a decomposition of a stack [n, out, in] with ranks (a, b) holds."""
    n, rows, columns = shape
    return rows * ranks[0] + n * ranks[0] * ranks[1] + ranks[1] * columns


def tucker(stack: Tensor, ranks: tuple[int, int], *, rounds: int = 20) -> Tucker:
    """Partial Tucker over outputs and inputs, matrices left apart: HOSVD, then alternating best subspaces (HOOI), which
    never lose. Raises UsageError for a rank that the stack does not have."""
    if stack.dim() != 3 or not 1 <= ranks[0] <= stack.shape[1] or not 1 <= ranks[1] <= stack.shape[2]:
        raise UsageError(f"a stack {list(stack.shape)} has no ranks {ranks}", param="ranks")
    x = stack.double()
    left = _leading(torch.einsum("noi,npi->op", x, x), ranks[0])
    right = _leading(torch.einsum("noi,noj->ij", x, x), ranks[1])
    kept = -1.0
    for _ in range(rounds):
        half = x @ right
        left = _leading(torch.einsum("noi,npi->op", half, half), ranks[0])
        half = left.T @ x
        right = _leading(torch.einsum("noi,noj->ij", half, half), ranks[1])
        energy = float((half @ right).square().sum())
        if energy <= kept * (1 + 1e-12):
            break
        kept = energy
    return Tucker(left, left.T @ x @ right, right.T)


def _leading(moment: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors, as columns, largest first; signs fixed by their largest element."""
    vectors = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :rank]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    signed: Tensor = vectors * torch.where(largest < 0, -1.0, 1.0)
    return signed


@dataclass(frozen=True, slots=True)
class Train:
    """A table [prod m, prod n] as cores [m_k, r_(k-1), n_k, r_k], r_0 = r_d = 1: row (i_1 .. i_d), the first index
    slowest, is the product of the slices cores[k][i_k], its columns in the same order."""

    cores: tuple[Tensor, ...]
    tails: tuple[float, ...]  # squared error of each cut: their sum bounds the squared error

    @property
    def numbers(self) -> int:
        return sum(core.numel() for core in self.cores)

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, width] of the table, padding of rows included."""
        return math.prod(core.shape[0] for core in self.cores), math.prod(core.shape[2] for core in self.cores)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows int64 [n] -> [n, width]."""
        made = self.cores[0].new_ones(len(ids), 1, 1)
        for core, index in zip(self.cores, digits(ids, [c.shape[0] for c in self.cores]), strict=True):
            made = torch.einsum("nwr,nrvs->nwvs", made, core[index]).flatten(1, 2)
        return made[..., 0]

    def value(self) -> Tensor:
        """The whole table."""
        return self.rows(torch.arange(self.shape[0]))


def digits(ids: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Each id's digits in the mixed base of `sizes`, the first slowest."""
    found = []
    for size in reversed(sizes):
        found.append(ids % size)
        ids = ids // size
    return found[::-1]


def tensor_train(table: Tensor, rows: Sequence[int], widths: Sequence[int], rank: int) -> Train:
    """TT-SVD of a table [n, width]: prod rows >= n (missing rows are zeros), prod widths = width, inner ranks at most
    `rank`. Raises UsageError where the sizes do not fit."""
    n, width = table.shape
    count = len(rows)
    if count != len(widths) or count < 2 or math.prod(widths) != width or math.prod(rows) < n or rank < 1:
        raise UsageError(f"a table [{n}, {width}] is not {list(rows)} by {list(widths)} at rank {rank}", param="rows")
    whole = table.new_zeros(math.prod(rows), width, dtype=torch.float64)
    whole[:n] = table.double()
    pairs = [axis for k in range(count) for axis in (k, count + k)]
    left = whole.reshape(*rows, *widths).permute(pairs).reshape(rows[0] * widths[0], -1)
    cores, tails, before = [], [], 1
    for k in range(count - 1):
        u, s, vt = torch.linalg.svd(left, full_matrices=False)
        kept = min(rank, len(s))
        cores.append(u[:, :kept].reshape(before, rows[k], widths[k], kept).permute(1, 0, 2, 3).contiguous())
        tails.append(float(s[kept:].square().sum()))
        before = kept
        left = (s[:kept, None] * vt[:kept]).reshape(before * rows[k + 1] * widths[k + 1], -1)
    last = left.reshape(before, rows[-1], widths[-1], 1).permute(1, 0, 2, 3).contiguous()
    return Train((*cores, last), tuple(tails))


def train_numbers(rows: Sequence[int], widths: Sequence[int], rank: int) -> int:
    """The most that a train of these sizes holds."""
    return sum(_sizes(rows, widths, rank))


def train_products(rows: Sequence[int], widths: Sequence[int], rank: int) -> int:
    """Multiplications of all rows of such a train with one vector, the cores taken from the first or from the last one
    on, whichever are fewer. The whole table takes prod rows * prod widths."""
    sizes = _sizes(rows, widths, rank)
    up = sum(n * math.prod(rows[:k]) * math.prod(widths[k + 1 :]) for k, n in enumerate(sizes))
    down = sum(n * math.prod(rows[k + 1 :]) * math.prod(widths[:k]) for k, n in enumerate(sizes))
    return min(up, down)


def _sizes(rows: Sequence[int], widths: Sequence[int], rank: int) -> list[int]:
    """Numbers of each core."""
    ranks = [1]
    for k in range(len(rows) - 1):
        rest = math.prod(rows[k + 1 :]) * math.prod(widths[k + 1 :])
        ranks.append(min(rank, ranks[-1] * rows[k] * widths[k], rest))
    ranks.append(1)
    return [m * ranks[k] * w * ranks[k + 1] for k, (m, w) in enumerate(zip(rows, widths, strict=True))]


def near_factors(size: int, count: int, *, exact: bool) -> list[int]:
    """`size` as a product of `count` numbers near one another; not `exact`: a product a little larger, if that has no
    factors."""
    wanted, found = size, []
    for left in range(count, 1, -1):
        root = max(1, round(wanted ** (1.0 / left)))
        if exact:
            factor = min((f for f in range(1, wanted + 1) if wanted % f == 0), key=lambda f: (abs(f - root), f))
            wanted //= factor
        else:
            factor = root
            wanted = -(-wanted // factor)
        found.append(factor)
    return [*found, wanted]
