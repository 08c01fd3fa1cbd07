"""Token sequences with the positions that are learned, and the order in which training sees them.

Knows no text and no tokenizer. Every draw is a function of (seed, epoch) or (seed, step), so a run that resumes at a
step sees exactly what an unbroken run would have seen, and no generator state has to be kept.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, UsageError
from inhouse.store.writing import atomic_file

I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Sequences laid end to end. Sequence i is `ids[starts[i]:starts[i + 1]]`; each is a document of its own."""

    ids: npt.NDArray[np.int32]  # [total]
    learn: Bools  # [total]: whether the loss counts this token
    starts: I64  # [sequences + 1]

    def __len__(self) -> int:
        return self.starts.size - 1

    @property
    def lengths(self) -> I64:
        """int64 [sequences]."""
        return np.diff(self.starts)

    def digest(self) -> str:
        """SHA-256 of all three arrays, hexadecimal."""
        sha = hashlib.sha256()
        for array in (self.ids, self.learn, self.starts):
            sha.update(np.ascontiguousarray(array).tobytes())
        return sha.hexdigest()

    def save(self, path: Path) -> None:
        """Writes an .npz, whole or not at all."""
        with atomic_file(path) as file:
            np.savez_compressed(file, ids=self.ids, learn=self.learn, starts=self.starts)


def load_dataset(path: Path) -> Dataset:
    """What `Dataset.save` wrote. Raises FormatError if the arrays do not fit one another."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            ids, learn, starts = arrays["ids"], arrays["learn"], arrays["starts"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(f"{path.name} is no data set: {error}", remedy="Build it again") from error
    ends = starts.size > 1 and starts[0] == 0 and starts[-1] == ids.size and bool(np.all(np.diff(starts) > 0))
    if not ends or learn.shape != ids.shape:
        raise FormatError(f"{path.name}: {ids.size} ids, {learn.size} marks and {starts.size} starts do not fit")
    return Dataset(ids.astype(np.int32), learn.astype(np.bool_), starts.astype(np.int64))


def make_dataset(samples: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Dataset:
    """A data set of (ids, learn) pairs. Raises UsageError if there is none or one has nothing to learn."""
    ids: list[int] = []
    learn: list[bool] = []
    starts = [0]
    for number, (tokens, marks) in enumerate(samples):
        if len(tokens) != len(marks) or not any(marks[1:]):
            raise UsageError(f"sample {number} of {len(tokens)} tokens has nothing to learn", param="samples")
        ids.extend(tokens)
        learn.extend(marks)
        starts.append(len(ids))
    if len(starts) == 1:
        raise UsageError("the data set has no samples", param="samples")
    return Dataset(np.array(ids, np.int32), np.array(learn, np.bool_), np.array(starts, np.int64))


@dataclass(frozen=True, slots=True)
class Batch:
    """B sequences padded on the right to L; under a causal mask no token sees another sequence or a pad."""

    tokens: I64  # [B, L]
    rows: I64  # [S] places in the flattened B * L whose next token is learned
    targets: I64  # [S] those next tokens


def epoch_order(lengths: I64, batch_tokens: int, *, seed: int, epoch: int, window: int = 2048) -> list[I64]:
    """Every sequence once, cut into batches of at most `batch_tokens` padded tokens (one sequence at least).

    Sequences are shuffled, then sorted by length within windows of `window` so that little is padding, cut, and
    the batches shuffled again. The same arguments give the same order.
    """
    rng = np.random.default_rng((seed, epoch))
    shuffled = rng.permutation(lengths.size)
    batches: list[I64] = []
    for begin in range(0, shuffled.size, window):
        part = shuffled[begin : begin + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        at = 0
        while at < part.size:
            fit = np.arange(1, part.size - at + 1) * lengths[part[at:]] <= batch_tokens
            count = max(1, int(fit.sum()))
            batches.append(part[at : at + count])
            at += count
    return [batches[i] for i in rng.permutation(len(batches))]


def make_batch(
    data: Dataset, chosen: I64, *, noise: float = 0.0, vocab: int = 0, seed: tuple[int, int] = (0, 0)
) -> Batch:
    """The chosen sequences as one batch. With `noise`, each unlearned token below `vocab` turns into a random one of
    0..vocab-1 with that probability (tokens from `vocab` up, the special ones, stay)."""
    lengths = data.lengths[chosen]
    width = int(lengths.max())
    tokens = np.zeros((chosen.size, width), np.int64)
    learn = np.zeros((chosen.size, width), np.bool_)
    for row, i in enumerate(chosen):
        begin, end = data.starts[i], data.starts[i + 1]
        tokens[row, : end - begin] = data.ids[begin:end]
        learn[row, : end - begin] = data.learn[begin:end]
    targets = np.roll(tokens, -1, axis=1)
    learned = np.roll(learn, -1, axis=1)
    learned[:, -1] = False
    if noise:
        rng = np.random.default_rng(seed)
        hit = (rng.random(tokens.shape) < noise) & ~learn & (tokens < vocab)
        tokens = np.where(hit, rng.integers(0, vocab, tokens.shape), tokens)
    return Batch(tokens, np.flatnonzero(learned), targets[learned])


class BatchOrder:
    """Endless batches: epochs follow one another, each in its own order."""

    def __init__(self, lengths: I64, batch_tokens: int, *, seed: int) -> None:
        self._lengths, self._batch_tokens, self._seed = lengths, batch_tokens, seed
        self._epoch, self._first = 0, 0  # the epoch at hand, and the step it begins with
        self._order = self._make(0)

    def at(self, step: int) -> I64:
        """The sequences of a step (from 0)."""
        if step < self._first:
            self._epoch, self._first, self._order = 0, 0, self._make(0)
        while step >= self._first + len(self._order):
            self._first += len(self._order)
            self._epoch += 1
            self._order = self._make(self._epoch)
        return self._order[step - self._first]

    def _make(self, epoch: int) -> list[I64]:
        return epoch_order(self._lengths, self._batch_tokens, seed=self._seed, epoch=epoch)
