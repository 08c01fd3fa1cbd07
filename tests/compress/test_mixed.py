"""The knapsack over formats and its local search against brute force; fusion groups and folding maps of real graphs."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from inhouse.compress.graph import fusion_groups, linear_folds, norm_folds
from inhouse.compress.mixed import Group, Plan, group_bytes, local_search, plan_bytes, share_out
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from tests.compress.tiny_models import make

FORMATS = ("u2_g32", "u3_g32", "i4_g32", "q6_0", "q8_0")


def problem(seed: int) -> tuple[list[Group], dict[tuple[Group, str], float], dict[str, tuple[int, ...]]]:
    """Six groups of one or two matrices, with losses that fall by about a quarter a bit, not always in order."""
    made = np.random.default_rng(seed)
    groups: list[Group] = [(f"a{i}", f"b{i}") if i % 2 else (f"a{i}",) for i in range(6)]
    shapes: dict[str, tuple[int, ...]] = {n: (int(made.integers(8, 90)), 64) for group in groups for n in group}
    losses = {
        (group, fmt): float(made.exponential() * 4.0**-i * made.uniform(0.5, 1.5))
        for group in groups
        for i, fmt in enumerate(FORMATS)
    }
    return groups, losses, shapes


@pytest.mark.parametrize("seed", range(6))
def test_the_knapsack_finds_what_brute_force_finds(seed: int) -> None:
    groups, losses, shapes = problem(seed)
    least = plan_bytes(dict.fromkeys(groups, "u2_g32"), shapes)
    most = plan_bytes(dict.fromkeys(groups, "q8_0"), shapes)
    budget = (least + most) // 2
    sizes = {pair: group_bytes(*pair, shapes) for pair in losses}
    best = min(
        sum(losses[pair] for pair in zip(groups, plan, strict=True))
        for plan in itertools.product(FORMATS, repeat=6)
        if sum(sizes[pair] for pair in zip(groups, plan, strict=True)) <= budget
    )
    found = share_out(groups, losses, shapes, budget)
    assert plan_bytes(found, shapes) <= budget
    assert sum(losses[pair] for pair in found.items()) == pytest.approx(best)
    with pytest.raises(UsageError, match="smallest"):
        share_out(groups, losses, shapes, least - 1)


@pytest.mark.parametrize("seed", range(4))
def test_local_search_mends_what_separate_losses_hide(seed: int) -> None:
    """The measured loss has an interaction that the knapsack cannot see."""
    groups, losses, shapes = problem(seed)
    budget = plan_bytes(dict.fromkeys(groups, "i4_g32"), shapes)

    def measure(plan: Plan) -> float:
        assert plan_bytes(plan, shapes) <= budget
        total = sum(losses[pair] for pair in plan.items())
        return total * (1 + 3 * (plan[groups[0]] == plan[groups[1]]))

    start = share_out(groups, losses, shapes, budget)
    found, loss, swaps = local_search(start, losses, shapes, budget, measure, 60)
    assert loss == measure(found) <= measure(start)
    assert swaps == 0 or loss < measure(start)
    same, first, none = local_search(start, losses, shapes, budget, measure, 1)
    assert (same, first, none) == (start, measure(start), 0)


@pytest.mark.realdata
@pytest.mark.torch
def test_graphs_say_what_is_fused_and_what_folds(stories: Path, tmp_path: Path) -> None:
    with Work.open(str(stories / "hf"), tmp_path / "run") as work:
        groups = fusion_groups(work.program, work.matrices())
        assert sorted(n for group in groups for n in group) == sorted(work.matrices())
        assert tuple(f"layers.3.attn.{x}.weight" for x in "qkv") in groups
        assert ("layers.0.mlp.gate.weight", "layers.0.mlp.up.weight") in groups
        assert ("embed.weight",) in groups
        folds = {fold.gain: fold.consumers for fold in norm_folds(work.program)}
        assert folds["layers.2.mlp_norm"] == ("layers.2.mlp.gate.weight", "layers.2.mlp.up.weight")
        assert len(folds) == 10  # the last norm feeds a tied head: its columns are the embedding's too
        pairs = {(fold.kind, fold.producer, fold.consumer) for fold in linear_folds(work.program)}
        assert ("v_o", "layers.1.attn.v.weight", "layers.1.attn.o.weight") in pairs
        assert ("up_down", "layers.1.mlp.up.weight", "layers.1.mlp.down.weight") in pairs
        assert len(pairs) == 10


@pytest.mark.realdata
@pytest.mark.torch
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Mixtral", "DeepseekV2"])
def test_every_matrix_is_in_one_group(family: str, stories: Path, tmp_path: Path) -> None:
    with Work.open(str(make(family, stories, tmp_path / "model")), tmp_path / "run") as work:
        groups = fusion_groups(work.program, work.matrices())
        assert sorted(n for group in groups for n in group) == sorted(work.matrices())
        for fold in norm_folds(work.program):
            assert all(name in work.matrices() for name in fold.consumers)
