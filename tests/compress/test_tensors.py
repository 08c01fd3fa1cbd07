"""Tucker and tensor trains beside tensorly, the bounds they keep, and what they refuse."""

import itertools
import math

import numpy as np
import pytest
import torch

from inhouse.compress.tensors import (
    digits,
    near_factors,
    tensor_train,
    train_numbers,
    tucker,
    tucker_numbers,
)
from inhouse.core.errors import UsageError

tensorly = pytest.importorskip("tensorly", reason="the oracle of tensor decompositions is tensorly")


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("ranks", [(3, 2), (5, 6), (10, 8)])
def test_tucker_is_as_good_as_tensorly(ranks: tuple[int, int]) -> None:
    from tensorly.decomposition import partial_tucker

    stack = drawn(6, 10, 3, seed=1) @ drawn(6, 3, 8, seed=2) + 0.1 * drawn(6, 10, 8, seed=3)
    found = tucker(stack, ranks)
    (core, factors), _ = partial_tucker(stack.numpy(), rank=list(ranks), modes=[1, 2], tol=1e-12, n_iter_max=200)
    theirs = tensorly.tenalg.multi_mode_dot(core, factors, modes=[1, 2])
    ours = float((stack - found.value()).norm())
    assert ours <= float(np.linalg.norm(stack.numpy() - theirs)) * (1 + 1e-6) + 1e-9
    assert found.numbers == tucker_numbers((6, 10, 8), ranks)
    assert torch.allclose(found.left.T @ found.left, torch.eye(ranks[0], dtype=torch.float64), atol=1e-10)
    assert torch.allclose(found.right @ found.right.T, torch.eye(ranks[1], dtype=torch.float64), atol=1e-10)


def test_hooi_is_no_worse_than_hosvd_and_full_rank_is_exact() -> None:
    stack = drawn(5, 12, 9, seed=4)
    errors = [float((stack - tucker(stack, (4, 3), rounds=rounds).value()).norm()) for rounds in (0, 1, 20)]
    assert errors[0] >= errors[1] >= errors[2]
    assert float((stack - tucker(stack, (12, 9)).value()).norm()) < 1e-10
    planted = drawn(12, 3, seed=5) @ drawn(5, 3, 2, seed=6) @ drawn(2, 9, seed=7)
    assert float((planted - tucker(planted, (3, 2)).value()).norm()) < 1e-9
    for bad in ((0, 3), (13, 3), (4, 10)):
        with pytest.raises(UsageError):
            tucker(stack, bad)


@pytest.mark.parametrize(("rows", "widths"), [((8, 9), (4, 6)), ((3, 4, 6), (2, 3, 4))])
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_trains_keep_their_bound_and_equal_tensorly(rows: tuple[int, ...], widths: tuple[int, ...], rank: int) -> None:
    from tensorly.decomposition import tensor_train_matrix

    table = drawn(math.prod(rows), math.prod(widths), seed=8)
    found = tensor_train(table, rows, widths, rank)
    error = float((table - found.value()).norm())
    assert error <= math.sqrt(sum(found.tails)) * (1 + 1e-10) + 1e-10
    theirs = tensor_train_matrix(table.numpy().reshape(*rows, *widths), rank=[1, *[rank] * (len(rows) - 1), 1])
    whole = tensorly.tt_matrix_to_tensor(theirs).reshape(table.shape)
    assert error == pytest.approx(float(np.linalg.norm(table.numpy() - whole)), rel=1e-6, abs=1e-9)
    assert found.numbers <= train_numbers(rows, widths, rank)
    ids = torch.tensor([0, 5, len(table) - 1])
    assert torch.allclose(found.rows(ids), found.value()[ids], atol=1e-12)


def test_full_rank_is_exact_and_padding_is_zero() -> None:
    table = drawn(50, 24, seed=9)
    found = tensor_train(table, (8, 8), (4, 6), 64)
    assert float((table - found.value()[:50]).norm()) < 1e-10
    assert float(found.value()[50:].norm()) < 1e-10
    planted = torch.einsum("aw,bv->abwv", drawn(8, 4, seed=10), drawn(8, 6, seed=11)).reshape(64, 24)
    one = tensor_train(planted, (8, 8), (4, 6), 1)
    assert float((planted - one.value()).norm()) < 1e-10
    assert one.numbers == 8 * 4 + 8 * 6


def test_digits_and_factors() -> None:
    ids = torch.arange(60)
    back = torch.zeros_like(ids)
    for digit, size in zip(digits(ids, (3, 4, 5)), (3, 4, 5), strict=True):
        back = back * size + digit
    assert torch.equal(back, ids)
    for size, count in itertools.product((64, 172, 512, 32000, 97), (2, 3)):
        exact, loose = near_factors(size, count, exact=True), near_factors(size, count, exact=False)
        assert math.prod(exact) == size
        assert len(loose) == len(exact) == count
        assert size <= math.prod(loose) <= 1.4 * size
    for rows, widths, rank in (((4, 4), (4, 6), 2), ((8, 8), (4, 5), 2), ((8, 8), (4, 6), 0), ((64,), (24,), 1)):
        with pytest.raises(UsageError):
            tensor_train(drawn(50, 24, seed=1), rows, widths, rank)
