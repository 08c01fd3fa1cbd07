"""Batches hold every sequence once, learn only what is marked, and are the same for the same seed."""

from pathlib import Path

import numpy as np
import pytest

from inhouse.core.errors import FormatError, UsageError
from inhouse.train.data import BatchOrder, Dataset, epoch_order, load_dataset, make_batch, make_dataset

pytestmark = pytest.mark.null


@pytest.fixture
def data() -> Dataset:
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(100):
        size = int(rng.integers(3, 20))
        ids = rng.integers(0, 50, size).tolist()
        samples.append((ids, [False, *([True] * (size - 1))]))
    return make_dataset(samples)


def test_every_sequence_once_within_the_budget(data: Dataset) -> None:
    order = epoch_order(data.lengths, 64, seed=1, epoch=0, window=32)
    assert sorted(np.concatenate(order).tolist()) == list(range(100))
    assert all(batch.size * data.lengths[batch].max() <= 64 for batch in order)


def test_order_depends_on_seed_and_epoch_alone(data: Dataset) -> None:
    first = [b.tolist() for b in epoch_order(data.lengths, 64, seed=1, epoch=0)]
    assert first == [b.tolist() for b in epoch_order(data.lengths, 64, seed=1, epoch=0)]
    assert first != [b.tolist() for b in epoch_order(data.lengths, 64, seed=1, epoch=1)]
    order = BatchOrder(data.lengths, 64, seed=1)
    late = [order.at(step).tolist() for step in range(2 * len(first))]
    assert late[: len(first)] == first
    assert order.at(3).tolist() == first[3]  # also after going back


def test_targets_are_the_next_tokens_of_the_same_sequence() -> None:
    data = make_dataset([([5, 6, 7], [False, False, True]), ([8, 9], [False, True])])
    batch = make_batch(data, np.array([0, 1], np.int64))
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.rows.tolist() == [1, 3]
    assert batch.targets.tolist() == [7, 9]


def test_noise_spares_learned_and_special_tokens(data: Dataset) -> None:
    chosen = np.arange(100, dtype=np.int64)
    clean = make_batch(data, chosen)
    noisy = make_batch(data, chosen, noise=0.5, vocab=40, seed=(3, 7))
    again = make_batch(data, chosen, noise=0.5, vocab=40, seed=(3, 7))
    changed = clean.tokens != noisy.tokens
    assert np.array_equal(noisy.tokens, again.tokens)
    assert changed.any()
    assert (clean.tokens[changed] < 40).all()
    assert np.array_equal(clean.targets, noisy.targets)
    assert not changed[:, 1:][clean.tokens[:, 1:] != 0].any()  # all but the first token of a sequence is learned


def test_saved_and_loaded_are_equal(data: Dataset, tmp_path: Path) -> None:
    data.save(tmp_path / "data.npz")
    assert load_dataset(tmp_path / "data.npz").digest() == data.digest()
    (tmp_path / "data.npz").write_bytes(b"PK\x03\x04 nonsense")
    with pytest.raises(FormatError, match=r"data\.npz"):
        load_dataset(tmp_path / "data.npz")


def test_a_sample_with_nothing_to_learn_is_refused() -> None:
    with pytest.raises(UsageError, match="sample 1"):
        make_dataset([([1, 2], [False, True]), ([1, 2], [True, False])])
    with pytest.raises(UsageError, match="no samples"):
        make_dataset([])
