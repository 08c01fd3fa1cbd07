"""Iterative pruning: exact targets, zeros that stay, and the last good round kept when the gate breaks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from inhouse.compress.calibrate import Calibration
from inhouse.compress.gradual import GradualOptions, gradual
from inhouse.compress.recipe import parse_recipe
from inhouse.compress.work import Work
from inhouse.core.errors import UsageError
from tests.compress.tiny_models import make

pytestmark = [pytest.mark.torch, pytest.mark.realdata]

SHORT: dict[str, Any] = {"steps": 2, "batch_tokens": 160, "rate": 1e-3, "warmup": 1, "validate_every": 2}


def rows(count: int = 24, length: int = 12) -> Calibration:
    tokens = torch.randint(3, 500, (count, length), generator=torch.Generator().manual_seed(3))
    return Calibration(tokens, torch.full((count,), length), "hash", ())


@pytest.fixture
def work(stories: Path, tmp_path: Path) -> Iterator[Work]:
    folder = make("Llama", stories, tmp_path / "model", num_hidden_layers=2)
    with Work.open(str(folder), tmp_path / "run") as opened:
        yield opened


def zeros(work: Work) -> dict[str, int]:
    """Of each row of each linear of the layers: the number, where all rows have it."""
    found = {}
    for name in work.matrices():
        if name.startswith("layers."):
            counts = set((work.value(name) == 0).sum(1).tolist())
            assert len(counts) == 1, name
            found[name] = counts.pop()
    return found


def run(work: Work, **options: Any) -> dict[str, Any]:
    report: dict[str, Any] = {}
    work.begin("prune")
    gradual(work, rows(), GradualOptions(**(SHORT | options)), report)
    work.save("prune/model")
    return report


@pytest.mark.parametrize("scores", ["magnitude", "sparsegpt"])
def test_the_target_is_met_exactly_in_every_linear(work: Work, scores: str) -> None:
    report = run(work, scores=scores, rounds=2, sparsity=0.5)
    assert [one[2] for one in report["rounds"]] == [True, True]
    assert report["reached"] == 0.5
    for name, count in zeros(work).items():
        assert count == work.shape(name)[1] // 2
        mask = work.mask(name)
        assert mask is not None
        assert not work.value(name)[~mask].any()
    assert work.mask("embed.weight") is None


def test_layers_with_outliers_keep_more(work: Work) -> None:
    loud = work.value("layers.1.mlp.down.weight").clone()
    loud[:, ::7] *= 30.0
    work.put("layers.1.mlp.down.weight", loud)
    run(work, rounds=1, scores="wanda", spread=0.1)
    found = zeros(work)
    quiet, heard = (sum(n for name, n in found.items() if name.startswith(f"layers.{i}.")) for i in range(2))
    widths = sum(work.shape(name)[1] for name in found)
    assert heard < quiet
    assert (quiet + heard) / widths == pytest.approx(0.5, abs=0.02)


def test_when_the_gate_breaks_the_last_good_round_stays(work: Work) -> None:
    free = run(work, rounds=2, sparsity=0.9, schedule="geometric", scores="wanda")
    first, second = free["rounds"][0][1], free["rounds"][1][1]
    assert first < second
    with Work.open(str(work.located.path), work.folder.parent / "gated") as gated:
        report = run(gated, rounds=2, sparsity=0.9, schedule="geometric", scores="wanda", gate=(first + second) / 2)
        assert [one[2] for one in report["rounds"]] == [True, False]
        assert report["rounds"][0][:2] == free["rounds"][0][:2]
        target = report["rounds"][0][0]
        assert report["reached"] == target
        for name, count in zeros(gated).items():
            assert count == round(target * gated.shape(name)[1])


def test_a_gate_that_nothing_passes_leaves_the_model_whole(work: Work) -> None:
    before = {name: work.value(name).clone() for name in work.names()}
    with pytest.raises(UsageError, match="no round passed"):
        run(work, rounds=2, sparsity=0.9, gate=-1.0, teacher="")
    assert all(torch.equal(work.value(name), value) for name, value in before.items())
    assert all(work.mask(name) is None for name in before)


def test_bad_options_are_refused(work: Work) -> None:
    for options, word in (
        ({"scores": "wand"}, "scores"),
        ({"schedule": "cubid"}, "schedule"),
        ({"sparsity": 1.5}, "sh"),
    ):
        with pytest.raises(UsageError, match=word):
            run(work, **options)
    with pytest.raises(UsageError, match="texts"):
        gradual(work, None, GradualOptions(), {})
    with pytest.raises(UsageError, match="20 rows"):
        gradual(work, rows(8), GradualOptions(**SHORT), {})


def test_recipes_name_pruning(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a text.")
    recipe = parse_recipe(
        {
            "calibration": {"texts": [str(text)]},
            "stages": [
                {"prune": {"method": "structured", "ffn": 0.25, "layers": 1}},
                {"prune": {"method": "neurons"}},
                {"prune": {"method": "gradual", "sparsity": 0.5, "rounds": 2, "steps": 10}},
                {"prune": {"method": "wanda", "sparsity": 124, "exclude": ["embed.weight"]}},
                {"quantize": {"method": "rtn", "format": "i8_g32"}},
            ],
        }
    )
    assert [stage.method for stage in recipe.stages] == ["structured", "neurons", "gradual", "wanda", "rtn"]
    with pytest.raises(UsageError, match="cannot come after"):
        parse_recipe(
            {"stages": [{"quantize": {"method": "rtn", "format": "q4_0"}}, {"prune": {"method": "magnitude"}}]}
        )
    with pytest.raises(UsageError, match="sparsity"):
        parse_recipe({"stages": [{"prune": {"method": "magnitude", "sparsity": 1.5}}]})
