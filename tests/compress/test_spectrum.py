"""Truncated SVD, plain and weighted: the theorems they rest on, held to float64 (facts of Eckart-Young, SVD-LLM)."""

import math

import numpy as np
import pytest
import torch

from inhouse.compress.spectrum import (
    cut,
    decompose,
    largest_saving_rank,
    moment_root,
    output_error,
    rank_choices,
)
from inhouse.core.errors import FormatError, UnsupportedError, UsageError


def correlated(inputs: int, rows: int, seed: int, outliers: int = 6) -> torch.Tensor:
    """Inputs [rows, inputs] that move together, some of them far larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) * torch.logspace(0, -2, inputs)[:, None]
    x = torch.randn(rows, inputs, generator=generator) @ mixing
    x[:, torch.randperm(inputs, generator=generator)[:outliers]] *= 12
    return x


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return b.double() @ a.double()


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
def test_plain_svd_reaches_the_bound_of_eckart_and_young(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    taken = decompose(weight, "svd")
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    for rank in (1, 7, min(shape)):
        error = (weight - taken.left[:, :rank] @ taken.right[:rank]).norm()
        assert float(error) == pytest.approx(math.sqrt((values[rank:] ** 2).sum()), abs=1e-10)
        assert float(taken.tail[rank]) == pytest.approx(float(error) ** 2, abs=1e-10)


@pytest.mark.parametrize("dead", [0, 3])
def test_whitened_error_is_the_energy_cut_off(dead: int) -> None:
    x = correlated(32, 500, seed=2).double()
    x[:, :dead] = 0.0
    gram = x.T @ x / len(x)
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    taken = decompose(weight, "whitened", gram=gram)
    for rank in (1, 5, 12, 20):
        gap = weight - taken.left[:, :rank] @ taken.right[:rank]
        measured = float((gap @ x.T).square().sum() / len(x))
        assert measured == pytest.approx(float(taken.tail[rank]), rel=1e-5, abs=1e-7)
    assert float((weight - taken.left @ taken.right).abs().max()) < 1e-8  # all directions kept: the matrix itself


def test_the_root_is_triangular_and_squares_to_the_moment() -> None:
    x = correlated(24, 300, seed=4).double()
    gram = x.T @ x / len(x)
    root = moment_root(gram)
    assert torch.equal(root, root.tril())
    assert torch.allclose(root @ root.T, gram, rtol=1e-9, atol=1e-9 * float(gram.max()))


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_plain_loses_to_asvd_and_asvd_to_whitened(share: float) -> None:
    for seed in range(4):
        x = correlated(96, 2000, seed=10 + seed)
        gram, mean_abs = x.T @ x / len(x), x.abs().mean(0)
        weight = torch.randn(128, 96, generator=torch.Generator().manual_seed(seed)) / 10
        rank = int(share * largest_saving_rank((128, 96)))
        errors = []
        for method in ("svd", "asvd", "whitened"):
            a, b = cut(decompose(weight, method, gram=gram, mean_abs=mean_abs), rank)
            errors.append(output_error(weight, product(a, b), gram))
        assert errors[0] > 1.2 * errors[1] > 1.2 * 1.2 * errors[2], errors


def test_no_other_factors_of_that_rank_do_better() -> None:
    """A random search and gradient descent from the whitened factors find nothing below them."""
    x = correlated(12, 200, seed=5).double()
    gram = x.T @ x / len(x)
    weight = torch.randn(10, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    a, b = (t.double() for t in cut(decompose(weight, gram=gram), 3))
    least = output_error(weight, b @ a, gram)
    generator = torch.Generator().manual_seed(7)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(50):
            near = (b + size * torch.randn(b.shape, generator=generator)) @ (
                a + size * torch.randn(a.shape, generator=generator)
            )
            assert output_error(weight, near, gram) >= least * (1 - 1e-6)


def test_factors_are_balanced_and_zero_directions_stay_finite() -> None:
    weight = torch.zeros(16, 16)
    weight[0, 0] = 3.0
    a, b = cut(decompose(weight, "svd"), 7)
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()
    assert torch.allclose(b @ a, weight, atol=1e-6)
    big = torch.randn(16, 16, generator=torch.Generator().manual_seed(8)) * 1e4
    a, b = cut(decompose(big, "svd"), 5)
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-5)


@pytest.mark.parametrize(("shape", "most"), [((64, 64), 31), ((172, 64), 46), ((2, 2), 0), ((1, 9), 0)])
def test_factors_larger_than_the_matrix_are_refused(shape: tuple[int, int], most: int) -> None:
    assert largest_saving_rank(shape) == most
    taken = decompose(torch.randn(*shape, generator=torch.Generator().manual_seed(9)), "svd")
    assert rank_choices(taken) == list(range(1, min(most, *shape) + 1))
    if most < min(shape):
        with pytest.raises(UnsupportedError, match="factors of rank"):
            cut(taken, most + 1)
        assert cut(taken, most + 1, allow_larger=True)[0].shape == (most + 1, shape[1])
    with pytest.raises(UsageError):
        cut(taken, 0)


def test_bad_statistics_are_named() -> None:
    weight = torch.randn(4, 6)
    with pytest.raises(UsageError, match="second moments"):
        decompose(weight, "whitened")
    with pytest.raises(UsageError, match="mean"):
        decompose(weight, "asvd", mean_abs=torch.ones(5))
    with pytest.raises(UsageError, match="unknown decomposition"):
        decompose(weight, "fwsvd")
    with pytest.raises(FormatError, match="finite"):
        decompose(weight, gram=torch.full((6, 6), float("nan")))
    never = cut(decompose(weight, gram=torch.zeros(6, 6)), 2)
    assert torch.isfinite(product(*never)).all()
