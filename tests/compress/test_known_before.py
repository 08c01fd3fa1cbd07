"""What shapes and recipes tell against a run is said before a unit of it is done."""

from pathlib import Path
from typing import Any

import pytest

from inhouse.compress.own_text import OwnText
from inhouse.compress.pipeline import compress, dry_run
from inhouse.compress.recipe import parse_recipe
from inhouse.core.errors import InhouseError, NotFoundError, UnsupportedError, UsageError
from inhouse.store.home import Home

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.realdata]
ROUND = {"quantize": {"method": "round", "format": "q8_0"}}


@pytest.mark.parametrize(
    ("stage", "error", "words"),
    [
        ({"method": "svd", "rank": 64}, UnsupportedError, "factors of rank 64 hold"),
        ({"method": "svd", "rank": 65}, UsageError, "has no rank 65"),
        ({"method": "svd", "rank": 8, "overrides": {"layers.3.mlp.up": {"rank": 60}}}, UnsupportedError, "layers.3"),
        ({"method": "svd", "ratio": 0.999, "include": ["attn.k"]}, UsageError, "no rank of a matrix"),
        ({"method": "tensor-train"}, UnsupportedError, "tied"),
        ({"method": "tucker"}, UnsupportedError, "no experts"),
    ],
)
def test_ranks_that_shapes_forbid(stories: Path, stage: dict[str, Any], error: type[InhouseError], words: str) -> None:
    """A dry run does no work: what it refuses is refused before any."""
    with pytest.raises(error, match=words):
        dry_run(str(stories / "hf"), parse_recipe({"stages": [{"lowrank": stage}, ROUND]}))


def test_what_comes_after_a_change_of_shapes_is_not_judged_by_the_old_ones(stories: Path) -> None:
    calibration = {"texts": [str(Path(__file__))], "samples": 2, "length": 16}
    cut = {"prune": {"method": "structured", "layers": 1}}
    low = {"lowrank": {"method": "svd", "rank": 8, "include": ["layers.4"]}}
    dry_run(str(stories / "hf"), parse_recipe({"stages": [cut, low], "calibration": calibration}))


@pytest.mark.parametrize(
    ("stages", "error", "words"),
    [
        ([{"distill": {"teacher": "nosuch"}}], NotFoundError, "no model 'nosuch'"),
        ([{"prune": {"method": "structured", "layers": 1}}, {"distill": {"teacher": "demo"}}], UnsupportedError,
         "different tokenizers"),
        ([{"qat": {"teacher": "demo", "format": "q4_0"}}], UnsupportedError, "different tokenizers"),
        ([{"prune": {"method": "gradual", "teacher": "nosuch"}}], NotFoundError, "no model 'nosuch'"),
        ([{"distill": {"top_k": 4, "hidden": 1.0}}], UnsupportedError, "cached logits have no features"),
    ],
)  # fmt: skip
def test_teachers_are_known_before_any_text_is_drawn(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: list[dict[str, Any]],
    error: type[InhouseError], words: str,
) -> None:  # fmt: skip
    """Without texts the model would have to write some first; a run that is refused leaves no folder either."""
    monkeypatch.setattr(OwnText, "rows", lambda *_: pytest.fail("a text was drawn"))
    home = Home(tmp_path / "home", tmp_path / "cache")
    with pytest.raises(error, match=words):
        compress(str(stories / "hf"), "student", parse_recipe({"stages": stages}), home=home)
    assert not (home.data / "runs" / "student").exists()


def test_scopes_of_one_stage_do_not_mix() -> None:
    stage = {"method": "rtn", "format": "q8_0", "overrides": {"mlp": {"method": "signround", "format": "q4_0"}}}
    with pytest.raises(UsageError, match=r"rtn on a matrix, signround on a block at a time") as found:
        parse_recipe({"stages": [{"quantize": stage}]})
    assert found.value.param == "stages[0].quantize.overrides"
