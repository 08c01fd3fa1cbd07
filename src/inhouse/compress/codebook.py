"""Codebooks of short vectors: weighted k-means, and the search for sums of entries.

Knows vectors and distances; does not know matrices, models or formats. All draws come from the seed.
"""

import torch
from torch import Tensor

from inhouse.core.errors import UsageError

RUN = 1 << 22  # distances held at once


def kmeans(
    vectors: Tensor, weights: Tensor, entries: int, *, rounds: int = 20, seed: int = 0
) -> tuple[Tensor, Tensor, list[float]]:
    """Lloyd's algorithm with a weight for every element: least sum of weights * (vectors - entry)^2.

    Args:
        vectors, weights: f32 [n, d], weights not negative.
        entries: of the codebook. With fewer vectors than that, the rest stay zero.

    Returns:
        codebook [entries, d], codes int64 [n], and the loss of each round, which never rises.

    Raises UsageError where there is nothing to cluster.
    """
    if vectors.dim() != 2 or vectors.shape != weights.shape or not len(vectors) or entries < 1:
        raise UsageError(f"cannot cluster {list(vectors.shape)} into {entries}", param="entries")
    book = _spread(vectors, weights, entries, seed)
    losses: list[float] = []
    codes = torch.zeros(len(vectors), dtype=torch.int64)
    for _ in range(rounds):
        codes, distances = assign(vectors, weights, book)
        losses.append(float(distances.double().sum()))
        if len(losses) > 1 and losses[-1] >= losses[-2] * (1 - 1e-4):
            break
        book = _means(vectors, weights, codes, book, distances)
    codes, distances = assign(vectors, weights, book)
    return book, codes, [*losses, float(distances.double().sum())]


def assign(vectors: Tensor, weights: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest entry of each vector (the first of equals) and its weighted squared distance."""
    codes, distances = [], []
    step = max(1, RUN // len(book))
    for first in range(0, len(vectors), step):
        v, w = vectors[first : first + step], weights[first : first + step]
        found = w @ book.square().T - 2 * (w * v) @ book.T
        least = found.min(dim=1)
        codes.append(least.indices)
        distances.append((least.values + (w * v.square()).sum(1)).clamp(min=0.0))
    return torch.cat(codes), torch.cat(distances)


def _spread(vectors: Tensor, weights: Tensor, entries: int, seed: int) -> Tensor:
    """First entries: vectors drawn with probability in proportion to their distance from those drawn before
    (k-means++, Arthur and Vassilvitskii 2007)."""
    generator = torch.Generator().manual_seed(seed)
    book = torch.zeros(entries, vectors.shape[1])
    distance = (weights * vectors.square()).sum(1).double()  # from the zero entry, which costs nothing to have
    for i in range(min(entries, len(vectors))):
        total = distance.cumsum(0)
        if not float(total[-1]) > 0:
            break
        at = int(torch.searchsorted(total, torch.rand(1, generator=generator, dtype=torch.float64) * total[-1]))
        book[i] = vectors[min(at, len(vectors) - 1)]
        distance = torch.minimum(distance, (weights * (vectors - book[i]).square()).sum(1).double())
    return book


def _means(vectors: Tensor, weights: Tensor, codes: Tensor, book: Tensor, distances: Tensor) -> Tensor:
    """Each entry at the weighted mean of its vectors; entries without any move to the vectors that fare worst."""
    shape = book.shape
    mass = torch.zeros(shape, dtype=torch.float64).index_add_(0, codes, weights.double())
    total = torch.zeros(shape, dtype=torch.float64).index_add_(0, codes, (weights * vectors).double())
    means = torch.where(mass > 0, total / mass.clamp(min=1e-300), book.double()).float()
    empty = torch.nonzero(torch.bincount(codes, minlength=len(book)) == 0).flatten()
    worst = torch.argsort(distances, descending=True, stable=True)[: len(empty)]
    means[empty[: len(worst)]] = vectors[worst]
    return means


def search(target: Tensor, books: Tensor, beam: int = 4) -> tuple[Tensor, Tensor]:
    """Codes int64 [n, M] whose entries' sum is near each target [n, d], and the squared distance [n].

    A beam search over books [M, K, d] one after another: the `beam` best partial sums are kept (Babenko and Lempitsky
    2014; AQLM). Exact for one book.
    """
    codes, distances = [], []
    step = max(1, RUN // (books.shape[1] * beam))
    for first in range(0, len(target), step):
        found = _beam(target[first : first + step], books, beam)
        codes.append(found[0])
        distances.append(found[1])
    return torch.cat(codes), torch.cat(distances)


def _beam(target: Tensor, books: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    n, (count, entries, width) = len(target), books.shape
    left = target[:, None]  # [n, kept, d]: what the sums chosen so far leave
    codes = torch.zeros(n, 1, 0, dtype=torch.int64)
    for m in range(count):
        flat = left.reshape(-1, width)
        found = flat.square().sum(1, keepdim=True) - 2 * flat @ books[m].T + books[m].square().sum(1)
        keep = min(beam if m + 1 < count else 1, found.shape[0] // n * entries)
        best = found.reshape(n, -1).topk(keep, dim=1, largest=False, sorted=True).indices
        parent, entry = best // entries, best % entries
        left = left.gather(1, parent[..., None].expand(-1, -1, width)) - books[m][entry]
        codes = torch.cat([codes.gather(1, parent[..., None].expand(-1, -1, m)), entry[..., None]], dim=2)
    return codes[:, 0], left[:, 0].square().sum(1)


def decode(codes: Tensor, books: Tensor) -> Tensor:
    """codes [..., M], books [M, K, d] -> sums of entries [..., d]."""
    total = books[0][codes[..., 0]]
    for m in range(1, len(books)):
        total = total + books[m][codes[..., m]]
    return total
