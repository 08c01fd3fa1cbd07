"""GPTQ against plain rounding, enumeration, and the published bands; the solvers of its loss."""

import itertools

import numpy as np
import pytest
import torch

from inhouse.compress.feedback import GptqOptions, gptq_codes
from inhouse.compress.grids import Grid
from inhouse.compress.methods.gptq import gptq
from inhouse.compress.quadratic import corrected, descend, inverse_factor, losses, relative_error, resolve, settled
from inhouse.compress.stats import LinearStats
from inhouse.core.errors import UsageError

from .synthetic import correlated


def stats(gram: torch.Tensor) -> LinearStats:
    square = gram.diagonal().float()
    return LinearStats(100, square, square.sqrt(), square.sqrt(), gram)


@pytest.mark.parametrize("name", ["i4_g32", "u3_g64", "q4_1", "iq4_nl", "q4_k", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("act_order", [False, True])
def test_with_the_identity_it_is_rounding(name: str, act_order: bool) -> None:
    weight = torch.randn(12, 256, generator=torch.Generator().manual_seed(1))
    grid = Grid(name, 256)
    done = gptq_codes(weight, torch.eye(256, dtype=torch.float64), grid, GptqOptions(act_order, refine=0))
    plain = grid.fit(weight, torch.ones(256))
    assert torch.equal(done.codes, grid.round(weight, plain, grid.index()))


def test_it_beats_rounding_on_nearly_every_seed() -> None:
    wins = 0
    for seed in range(100):
        weight, gram = correlated(4, 64, 256, 2, seed)
        grid = Grid("u4_g32", 64)
        done = gptq_codes(weight, gram, grid, GptqOptions())
        plain = grid.nearest(weight, grid.fit(weight, gram.diagonal()), grid.index())
        found = grid.decode(done.codes, done.params, grid.index())
        wins += float(losses(weight - found, gram).sum()) <= float(losses(weight - plain, gram).sum())
    assert wins >= 99


@pytest.mark.parametrize("seed", range(8))
def test_refinement_ends_near_the_optimum_of_enumeration(seed: int) -> None:
    """4 inputs at 2 bits with given scales: all 256 codes of a row enumerated."""
    weight, gram = correlated(16, 4, 64, 0, seed)
    grid = Grid("u2_row_f32", 4)
    done = gptq_codes(weight, gram, grid, GptqOptions(damping=1e-6))
    params, index = done.params, grid.index()
    best = torch.full((16,), torch.inf, dtype=torch.float64)
    for one in itertools.product(range(4), repeat=4):
        value = grid.decode(torch.tensor([one], dtype=torch.uint8).expand(16, 4), params, index)
        best = torch.minimum(best, losses(weight - value, gram))
    plain = losses(weight - grid.nearest(weight, params, index), gram)
    ours = losses(weight - grid.decode(done.codes, params, index), gram)
    codes = descend(weight, settled(gram)[0], grid, params, done.codes, 4)
    descended = losses(weight - grid.decode(codes, params, index), gram)
    assert (ours >= best * (1 - 1e-9)).all()
    assert (descended <= ours * (1 + 1e-9)).all()
    assert float(descended.sum() - best.sum()) <= 0.5 * float(plain.sum() - best.sum()) + 1e-12


@pytest.mark.parametrize(
    ("name", "rounding", "plain", "ordered"),
    [("i4_g128", 0.0167, 0.0018, 0.0008), ("u3_g128", 0.077, 0.0085, 0.0039), ("u2_g128", 0.366, 0.057, 0.020)],
)
def test_the_published_bands(name: str, rounding: float, plain: float, ordered: float) -> None:
    """Orders of size and ratios of facts 1.3 on a layer of the same kind: each step gains, none is out of its band."""
    weight, gram = correlated()
    grid = Grid(name, 512)
    index = grid.index()
    params = grid.fit(weight, search="minmax")
    rtn = relative_error(weight, grid.nearest(weight, params, index), gram)

    def run(act_order: bool, refine: int = 0) -> float:
        done = gptq_codes(weight, gram, grid, GptqOptions(act_order, refine=refine))
        return relative_error(weight, grid.decode(done.codes, done.params, index), gram)

    unordered, act, refined = run(False), run(True), run(True, 2)
    assert refined <= act < unordered < rtn
    assert rounding / 3 < rtn < rounding * 3
    assert act < 2 * ordered
    assert unordered < 2 * plain


def test_codes_return_to_their_columns() -> None:
    """Act-order permutes only the order of work: with a diagonal Gram, codes are those of rounding."""
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(2))
    gram = torch.diag(torch.rand(96, generator=torch.Generator().manual_seed(3)).double() + 0.1)
    grid = Grid("u4_g32", 96)
    done = gptq_codes(weight, gram, grid, GptqOptions(damping=1e-9))
    params = grid.fit(weight, gram.diagonal().float())
    assert torch.equal(done.codes, grid.round(weight, params, grid.index()))


def test_blocks_do_not_change_the_result() -> None:
    weight, gram = correlated(8, 96, 512, 2)
    grid = Grid("u4_g32", 96)
    whole = gptq_codes(weight, gram, grid, GptqOptions(block=96))
    lazy = gptq_codes(weight, gram, grid, GptqOptions(block=20))
    assert float((whole.codes != lazy.codes).float().mean()) < 0.01  # sums of another order may flip a tie


def test_updated_groups_see_what_columns_have_become() -> None:
    weight, gram = correlated(32, 128, 512, 2)
    grid = Grid("u2_g32", 128)
    static = gptq_codes(weight, gram, grid, GptqOptions(act_order=False, block=48))
    updated = gptq_codes(weight, gram, grid, GptqOptions(act_order=False, groups="updated", block=48))
    aligned = gptq_codes(weight, gram, grid, GptqOptions(act_order=False, groups="updated", block=32))
    assert not torch.equal(static.params.scale, updated.params.scale)
    torch.testing.assert_close(aligned.params.scale, updated.params.scale, rtol=0.02, atol=1e-3)
    with pytest.raises(UsageError, match="updated"):
        gptq_codes(weight, gram, grid, GptqOptions(groups="updated"))


def test_dead_inputs_and_zeros() -> None:
    weight, gram = correlated(8, 64, 256, 1)
    gram[5] = gram[:, 5] = 0
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < 0.5] = 0
    grid = Grid("u4_g32", 64)
    done = gptq_codes(weight, gram, grid, GptqOptions(refine=2))
    value = grid.decode(done.codes, done.params, grid.index())
    assert done.note == "1 dead inputs plainly rounded"
    assert (value[weight == 0] == 0).all()
    assert torch.isfinite(value).all()
    nothing = gptq_codes(weight, torch.zeros_like(gram), grid, GptqOptions())
    assert "64 dead" in nothing.note


def test_damping_rises_and_then_rounding_takes_over() -> None:
    weight, gram = correlated(4, 64, 256, 1)
    grid = Grid("u4_g32", 64)
    smallest = float(torch.linalg.eigvalsh(gram)[0])
    mean = float(gram.diagonal().mean())
    shifted = gram - (smallest + 0.03 * mean) * torch.eye(64, dtype=torch.float64)  # wants more than 3 % of damping
    done = gptq_codes(weight, shifted, grid, GptqOptions())
    assert done.note == "damping raised to 0.05"
    broken = -gram + 2 * torch.diag(gram.diagonal())
    hopeless = broken.clone()
    hopeless[0, 1] = hopeless[1, 0] = 1e6
    done = gptq_codes(weight, hopeless, grid, GptqOptions())
    assert "plainly rounded" in done.note
    assert torch.equal(done.codes, grid.round(weight, done.params, grid.index()))
    nan = gptq_codes(weight, gram * torch.nan, grid, GptqOptions())
    assert nan.note.startswith("the Gram matrix is not finite")


def test_the_factor_is_the_inverse() -> None:
    _, gram = correlated(4, 48, 256, 1)
    factor = inverse_factor(gram.clone(), 0.01)
    assert factor is not None
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(48)
    u = factor.upper.double()
    torch.testing.assert_close(u.T @ u, torch.linalg.inv(damped), rtol=1e-4, atol=1e-6)
    assert torch.equal(u, u.triu())


def test_scales_are_solved_together() -> None:
    weight, gram = correlated(16, 96, 512, 2)
    for name in ("i4_g32_f32", "u3_g32_f32", "nf4_g64"):
        grid = Grid(name, 96 if "32" in name else 64)
        w, h = weight[:, : grid.inputs], gram[: grid.inputs, : grid.inputs]
        params = grid.fit(w)
        codes = grid.round(w, params, grid.index())
        before = losses(w - grid.decode(codes, params, grid.index()), h)
        solved = resolve(w, h, grid, params, codes)
        after = losses(w - grid.decode(codes, solved, grid.index()), h)
        assert (after <= before * (1 + 1e-9)).all()
        assert float(after.sum()) < 0.97 * float(before.sum())
        nudged = solved.scale.clone()
        nudged[:, 0] *= 1.01
        worse = losses(w - grid.decode(codes, type(solved)(nudged, solved.zero), grid.index()), h)
        assert float(worse.sum()) > float(after.sum())


def test_weights_are_corrected_for_drifted_inputs() -> None:
    made = torch.Generator().manual_seed(7)
    before = torch.randn(2000, 32, generator=made).double()
    now = before @ (torch.eye(32) + 0.1 * torch.randn(32, 32, generator=made)).double()
    weight = torch.randn(8, 32, generator=made)
    found = corrected(weight, now.T @ now / 2000, before.T @ now / 2000, 1e-9)
    torch.testing.assert_close(now @ found.double().T, before @ weight.double().T, rtol=1e-3, atol=1e-3)
    same = corrected(weight, before.T @ before / 2000, before.T @ before / 2000)
    torch.testing.assert_close(same, weight, rtol=1e-5, atol=1e-5)


def test_the_form_is_what_was_chosen() -> None:
    weight, gram = correlated(20, 172, 512, 2)
    form, record = gptq(weight, stats(gram), GptqOptions(), "u4_g32")
    assert 0 < record["error"] < 0.02
    grid = Grid("u4_g32", 172)
    done = gptq_codes(weight, gram, grid, GptqOptions())
    np.testing.assert_array_equal(form.value(), grid.decode(done.codes, done.params, grid.index()).numpy())
    with pytest.raises(UsageError, match="Gram"):
        gptq(weight, None, GptqOptions(), "u4_g32")


def test_scales_of_many_groups_are_solved_on_several_threads() -> None:
    """256 groups a row: batched LU of oneMKL raised here from two threads on."""
    grid, threads = Grid("i4_g32", 8192), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        generator = torch.Generator().manual_seed(5)
        weight = torch.randn(64, 8192, generator=generator)
        gram = torch.diag(torch.rand(8192, generator=generator) + 0.1)
        params = grid.fit(weight, search="minmax")
        codes = grid.round(weight, params, grid.index())
        found = resolve(weight, gram, grid, params, codes)
    finally:
        torch.set_num_threads(threads)
    before = losses(weight - grid.decode(codes, params, grid.index()), gram)
    after = losses(weight - grid.decode(codes, found, grid.index()), gram)
    assert bool((after < before).all())
