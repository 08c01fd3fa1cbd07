"""Unstructured and N:M pruning against oracles: exact counts, least squares, the order of the methods."""

import pytest
import torch
from torch import Tensor

from inhouse.compress.grids import Grid
from inhouse.compress.methods.magnitude import MagnitudeOptions, magnitude, magnitude_mask
from inhouse.compress.methods.sparsegpt import SparseGptOptions, inverse_factor, sparse_gpt, sparsegpt
from inhouse.compress.methods.wanda import WandaOptions, wanda, wanda_mask, wanda_scores
from inhouse.compress.sparsity import (
    check_groups,
    keep_groups,
    masked,
    outlier_share,
    output_error,
    parse_pattern,
    refit,
    spread_ratios,
    zeros_of,
)
from inhouse.compress.stats import LinearStats, collect
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.form import Form

pytestmark = pytest.mark.torch


def correlated(width: int, tokens: int = 512, seed: int = 0) -> Tensor:
    """Inputs [tokens, width] whose channels depend on one another, with a few loud ones, as activations have."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=rng) / width**0.5
    loud = torch.exp(torch.randn(width, generator=rng))
    x: Tensor = torch.randn(tokens, width, generator=rng) @ (mix + 0.5 * torch.eye(width)) * loud
    return x


def matrix(rows: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def stats_of(x: Tensor) -> LinearStats:
    return collect([x], x.shape[1])


def swept(weight: Tensor, stats: LinearStats | None, options: SparseGptOptions) -> Tensor:
    made = sparse_gpt(weight, stats, options)
    assert isinstance(made, Tensor)
    return made


@pytest.mark.parametrize(("text", "n", "m", "share"), [
    ("0.5", 0, 0, 0.5), (0.25, 0, 0, 0.25), ("30%", 0, 0, 0.3), ("2:4", 2, 4, 0.5), ("1:8", 1, 8, 0.875),
    (124, 2, 4, 0.5), (124.0, 2, 4, 0.5),  # what YAML 1.1 makes of an unquoted 2:4
])  # fmt: skip
def test_patterns_are_read(text: str | float, n: int, m: int, share: float) -> None:
    pattern = parse_pattern(text)
    assert (pattern.n, pattern.m) == (n, m)
    assert pattern.sparsity == pytest.approx(share)


@pytest.mark.parametrize("text", ["0", "1", "1.5", "-0.1", "4:4", "0:4", "5:4", "half", "2:400", float("nan"), 3])
def test_other_patterns_are_refused(text: str | float) -> None:
    with pytest.raises(UsageError):
        parse_pattern(text)
    with pytest.raises(UsageError):
        WandaOptions(text)


@pytest.mark.parametrize("shape", [(16, 64), (7, 172), (5, 33)])
@pytest.mark.parametrize("share", [0.5, 0.3, 0.9])
def test_the_number_of_zeros_is_exact(shape: tuple[int, int], share: float) -> None:
    weight, x = matrix(*shape), correlated(shape[1])
    stats = stats_of(x)
    by_matrix = masked(weight, magnitude(weight, None, MagnitudeOptions(share)))
    assert zeros_of(by_matrix) == round(share * weight.numel())
    by_row = masked(weight, wanda(weight, stats, WandaOptions(share)))
    assert (by_row == 0).sum(1).tolist() == [round(share * shape[1])] * shape[0]
    for by_row_too in (False, True):
        options = SparseGptOptions(share, block=32, by_row=by_row_too)
        made = swept(weight, stats, options)
        widths = [min(32, shape[1] - start) for start in range(0, shape[1], 32)]
        each = [shape[0] * round(share * w) if by_row_too else round(share * shape[0] * w) for w in widths]
        assert zeros_of(made) == sum(each)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3), (3, 5)])
@pytest.mark.parametrize("width", [64, 43])
def test_every_group_keeps_n(n: int, m: int, width: int) -> None:
    weight, x = matrix(9, width), correlated(width)
    stats, told = stats_of(x), f"{n}:{m}"
    found = [
        magnitude(weight, None, MagnitudeOptions(told)),
        wanda(weight, stats, WandaOptions(told)),
        swept(weight, stats, SparseGptOptions(told)) != 0,
    ]
    for mask in found:
        whole = width // m * m
        assert (mask[:, :whole].reshape(9, -1, m).sum(2) == n).all()
        assert check_groups(mask, n, m)
        assert (mask[:, whole:].sum(1) == min(n, width - whole)).all()


def test_groups_keep_the_highest() -> None:
    scores = torch.tensor([[1.0, 4.0, 2.0, 3.0, 5.0, 0.0, 0.0, 0.0]])
    assert keep_groups(scores, 2, 4).int().tolist() == [[0, 1, 0, 1, 1, 1, 0, 0]]  # ties: the earlier one


def test_wanda_scores_are_weight_times_norm() -> None:
    weight, x = matrix(4, 6), correlated(6)
    wanted = weight.abs() * x.norm(dim=0) / len(x) ** 0.5
    assert torch.allclose(wanda_scores(weight, stats_of(x).mean_square), wanted, rtol=1e-5)


@pytest.mark.parametrize("pattern", ["0.5", "2:4", "0.7"])
def test_the_order_of_the_methods(pattern: str) -> None:
    """Magnitude > Wanda > SparseGPT in output error, and the fit betters each mask: on average and nearly always."""
    wins, seeds = [], 12
    for seed in range(seeds):
        weight, x = matrix(48, 96, seed), correlated(96, 768, seed)
        stats = stats_of(x)
        assert stats.gram is not None
        mask = wanda_mask(weight, stats.mean_square, WandaOptions(pattern))
        errors = [
            output_error(weight, made, stats.gram)
            for made in (
                masked(weight, magnitude_mask(weight, MagnitudeOptions(pattern))),
                masked(weight, mask),
                swept(weight, stats, SparseGptOptions(pattern)),
                swept(weight, stats, SparseGptOptions(pattern, refit=50)),
            )
        ]
        wins.append(all(a > b for a, b in zip(errors, errors[1:], strict=False)))
        assert output_error(weight, refit(weight, mask, stats.gram), stats.gram) < errors[1]
    assert sum(wins) >= seeds - 1


def test_the_update_is_least_squares_on_the_kept_support() -> None:
    """Where the dropped columns come first, the sweep's update is the exact optimum over all the others."""
    weight, x = matrix(5, 12), correlated(12).double()
    gram = x.T @ x / len(x)
    gone = 4
    prior = torch.ones(5, 12, dtype=torch.bool)
    prior[:, :gone] = False
    made, mask = sparsegpt(weight, gram, SparseGptOptions(gone / 12, damping=1e-12, by_row=True), prior=prior)
    assert torch.equal(mask, prior)
    oracle = torch.linalg.lstsq(x[:, gone:], x @ weight.double().T).solution.T
    assert torch.allclose(made[:, gone:].double(), oracle, atol=1e-5)


def test_refit_is_least_squares_row_by_row() -> None:
    weight, x = matrix(6, 20), correlated(20).double()
    gram = x.T @ x / len(x)
    mask = wanda_mask(weight, gram.diagonal(), WandaOptions(0.5))
    made = refit(weight, mask, gram, steps=500, damping=0.0)
    for row in range(6):
        kept = mask[row]
        oracle = torch.linalg.lstsq(x[:, kept], x @ weight[row].double()[:, None]).solution[:, 0]
        assert torch.allclose(made[row, kept].double(), oracle, atol=2e-5)
    assert not made[~mask].any()


def test_without_correlations_nothing_is_updated() -> None:
    weight = matrix(8, 32)
    made, mask = sparsegpt(weight, torch.eye(32), SparseGptOptions(0.5, by_row=False))
    assert torch.equal(made, masked(weight, mask))
    assert torch.equal(mask, magnitude_mask(weight, MagnitudeOptions(0.5)))  # H = I: the score is the square


def test_inverse_factor_is_what_it_says() -> None:
    x = correlated(10).double()
    gram = x.T @ x / len(x)
    gram[3], gram[:, 3] = 0.0, 0.0
    upper, dead = inverse_factor(gram, 0.01)
    damped = gram.clone()
    damped[3, 3] = 1.0
    damped.diagonal().add_(0.01 * float(damped.diagonal().mean()))
    assert dead.tolist() == [i == 3 for i in range(10)]
    assert torch.allclose(upper.T @ upper, torch.linalg.inv(damped), atol=1e-8)


def test_zeros_stay_zero() -> None:
    """A second, sparser round drops more and revives nothing; dead inputs become zeros."""
    weight, x = matrix(16, 64), correlated(64)
    stats = stats_of(x)
    first = swept(weight, stats, SparseGptOptions("2:4"))
    found = [
        masked(first, magnitude(first, None, MagnitudeOptions(0.7))),
        masked(first, wanda(first, stats, WandaOptions(0.7))),
        swept(first, stats, SparseGptOptions(0.7)),
    ]
    for second in found:
        assert not second[first == 0].any()
        assert zeros_of(second) >= round(0.69 * weight.numel())


def test_a_grid_keeps_zeros_and_rounds_what_stays() -> None:
    """Joint with rounding: every kept weight is on the grid, every dropped one decodes to exactly 0, and it is better
    than rounding after pruning."""
    weight, x = matrix(24, 64), correlated(64)
    stats = stats_of(x)
    assert stats.gram is not None
    grid = Grid("i4_g32", 64)
    plain = swept(weight, stats, SparseGptOptions(0.5))
    params = grid.fit(plain, stats.mean_square)

    def column(values: Tensor, j: int) -> Tensor:
        return grid.nearest(values[:, None], params, grid.index()[j : j + 1])[:, 0]

    joint, mask = sparsegpt(weight, stats.gram, SparseGptOptions(0.5), grid=column)
    form = sparse_gpt(weight, stats, SparseGptOptions(0.5), "i4_g32")
    assert isinstance(form, Form)
    stored = torch.from_numpy(form.value())
    assert torch.equal(stored, joint)
    assert not stored[~mask].any()
    assert zeros_of(mask) == 12 * 64
    after = grid.nearest(plain, params, grid.index())
    assert output_error(weight, joint, stats.gram) < output_error(weight, after, stats.gram)
    with pytest.raises(UnsupportedError, match="nf4|zero|0"):
        sparse_gpt(weight, stats, SparseGptOptions(0.5), "q4_1")


def test_without_statistics_magnitudes_count() -> None:
    weight = matrix(6, 16)
    wanted = magnitude_mask(weight, MagnitudeOptions("1:4"))
    assert torch.equal(wanda(weight, None, WandaOptions("1:4", refit=9)), wanted)
    assert torch.equal(swept(weight, None, SparseGptOptions("1:4")), masked(weight, wanted))


def test_bad_statistics_are_refused() -> None:
    weight = matrix(4, 8)
    bare = LinearStats(1, torch.ones(8), torch.ones(8), torch.ones(8))
    with pytest.raises(UsageError, match="Gram"):
        wanda(weight, bare, WandaOptions(refit=3))
    with pytest.raises(UsageError, match="Gram"):
        swept(weight, bare, SparseGptOptions())
    with pytest.raises(UsageError, match="8 inputs"):
        sparsegpt(weight, torch.eye(9), SparseGptOptions())
    with pytest.raises(UsageError, match="8 inputs"):
        wanda_scores(weight, torch.ones(9))


def test_layers_with_outliers_keep_more() -> None:
    ratios = spread_ratios([0.01, 0.02, 0.03, 0.06], 0.5, 0.08)
    assert sum(ratios) / 4 == pytest.approx(0.5)
    assert ratios == sorted(ratios, reverse=True)
    assert max(ratios) - min(ratios) == pytest.approx(0.16)
    assert spread_ratios([0.3, 0.3], 0.6) == [0.6, 0.6]
    loud = torch.ones(10, 10)
    loud[0, 0] = 1000.0
    assert outlier_share(loud) == pytest.approx(0.01)
