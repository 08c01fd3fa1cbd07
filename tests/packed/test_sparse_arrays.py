"""Sparse matrices as arrays: the arrays of scipy.sparse, exact there and back, hostile ones refused."""

import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inhouse.core.errors import FormatError, UsageError
from inhouse.runtime.packed_sparse import choose_sparse_format
from inhouse.runtime.sparse import Bitmask, Bsr, Csc, Csr, TwoOfFour

pytestmark = pytest.mark.null


def matrix(shape: tuple[int, int], share: float, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape).astype(np.float32) * (rng.random(shape) < share)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_rows_and_columns_are_scipys(share: float) -> None:
    dense = matrix((37, 53), share)
    for ours, theirs in (
        (Csr.of(dense), scipy.sparse.csr_array(dense)),
        (Csc.of(dense), scipy.sparse.csc_array(dense)),
    ):
        assert np.array_equal(ours.indptr, theirs.indptr)
        assert np.array_equal(ours.indices, theirs.indices)
        assert np.array_equal(ours.data, theirs.data)
        assert np.array_equal(ours.dense(), dense)
    assert np.array_equal(Csr.of(dense).to_csc().indices, Csc.of(dense).indices)
    assert np.array_equal(Csc.of(dense).to_csr().data, Csr.of(dense).data)


def test_products_are_scipys() -> None:
    dense, x = matrix((37, 53), 0.1).astype(np.float64), np.random.default_rng(2).normal(size=(53, 4))
    assert np.allclose(Csr.of(dense).times(x), np.asarray(scipy.sparse.csr_array(dense).dot(x)), rtol=1e-13, atol=1e-13)
    assert np.allclose(Csr.of(dense).times(x[:, 0]), dense @ x[:, 0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("block", [(1, 1), (4, 8), (16, 16)])
def test_blocks_are_scipys(block: tuple[int, int]) -> None:
    dense = matrix((48, 64), 0.01)
    ours, theirs = Bsr.of(dense, block), scipy.sparse.bsr_array(dense, blocksize=block)
    theirs.sort_indices()
    assert np.array_equal(ours.indptr, theirs.indptr)
    assert np.array_equal(ours.indices, theirs.indices)
    assert np.array_equal(ours.data, theirs.data)
    assert np.array_equal(ours.dense(), dense)
    with pytest.raises(UsageError, match="not made of blocks"):
        Bsr.of(dense, (5, 8))


def test_torch_opens_ours() -> None:
    dense = matrix((16, 32), 0.2)
    ours = Csr.of(dense)
    starts, columns, values = (torch.from_numpy(part) for part in (ours.indptr, ours.indices, ours.data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once a process, that the form is in beta
        theirs = torch.sparse_csr_tensor(starts, columns, values, size=ours.shape, check_invariants=True)
    assert np.array_equal(theirs.to_dense().numpy(), dense)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
def test_masks_and_two_of_four_come_back(rows: int, eights: int, share: float, seed: int) -> None:
    dense = matrix((rows, eights * 8 - seed % 3), share, seed)
    assert np.array_equal(Bitmask.of(dense).dense(), dense)
    fours = matrix((rows, eights * 8), share, seed).reshape(rows, -1, 4)
    fours[..., seed % 4] = 0
    fours[..., (seed + 1 + seed % 3) % 4] = 0
    pairs = fours.reshape(rows, -1)
    assert np.array_equal(TwoOfFour.of(pairs).dense(), pairs)


def test_what_does_not_fit_is_refused() -> None:
    ours = Csr.of(matrix((8, 8), 0.5))
    wrong = ((ours.indptr[:-1], ours.indices), (ours.indptr, ours.indices + 8), (ours.indptr, ours.indices * 0))
    for indptr, indices in wrong:
        with pytest.raises(FormatError):
            Csr((8, 8), indptr, indices, ours.data)
    with pytest.raises(FormatError, match="does not fit"):
        Bitmask((2, 8), np.array([[255], [1]], np.uint8), np.ones(3))
    with pytest.raises(UsageError, match="more than two"):
        TwoOfFour.of(np.ones((1, 8)))
    with pytest.raises(FormatError, match="ascend"):
        TwoOfFour((1, 8), np.zeros((1, 1), np.uint8), np.ones((1, 4)))


@pytest.mark.parametrize(
    ("share", "bits", "group", "wanted"),
    [
        (1.0, 8, "g32", "i8_g32"), (0.5, 8, "g32", "s8_g32"), (0.5, 4, "g128", "s4_g128"), (0.7, 4, "g32", "i4_g32"),
        (0.01, 8, "row", "csr_i8"), (0.01, 8, "g32", "s8_g32"), (0.05, 16, "row", "csr_bf16"), (0.5, 16, "row", "bf16"),
    ],
)  # fmt: skip
def test_the_fastest_format_by_share(share: float, bits: int, group: str, wanted: str) -> None:
    assert choose_sparse_format(matrix((64, 256), share) != 0, bits, group) == wanted
    two = np.tile(np.array([True, False, True, False]), (64, 64))
    assert choose_sparse_format(two, 8) == "p8_g32"
    with pytest.raises(UsageError, match="3 bits"):
        choose_sparse_format(two, 3)
