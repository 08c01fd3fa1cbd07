"""Recipes of quantization through the whole pipeline: stored, proven against the model in memory, measured."""

from pathlib import Path
from typing import Any

import pytest
import torch

from inhouse.compress.pipeline import Compressed, compress
from inhouse.compress.recipe import load_recipe, parse_recipe
from tests.compress.test_pipeline import GATE, TEXT

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.realdata]

RECIPES = Path(__file__).parents[2] / "bench" / "compress" / "recipes"
STAGES: dict[str, list[dict[str, Any]]] = {
    "awq": [{"smooth": {"method": "awq", "steps": 3, "format": "u4_g32"}}, {"quantize": "gptq"}],
    "smoothquant": [{"smooth": {"method": "smoothquant"}}, {"quantize": "i8_token"}],
    "hadamard": [{"smooth": {"method": "hadamard", "untie": True}}, {"quantize": "gptq"}],
    "auto": [{"quantize": {"method": "auto", "bits": 5.5, "rows": 2, "trials": 4, "formats": ["i4_g32", "q8_0"]}}],
    "gptaq": [{"quantize": {"method": "gptaq", "format": "u4_g32", "gptq": {"refine": 1}}}],
    "mixture": [{"quantize": {"method": "ggufmix", "mixture": "q4_k_m"}}],
    "hqq": [{"quantize": {"method": "hqq", "format": "u4_g32"}}],
}
SHORT: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "format": "u4_g32"},
    "i8_token": {"method": "rtn", "format": "i8_token"},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _run(name: str, stories: Path, folder: Path) -> Compressed:
    (folder / "calibration.txt").write_text(TEXT * 4)
    (folder / "gate.txt").write_text(GATE)
    stages = [{kind: SHORT.get(str(what), what) for kind, what in stage.items()} for stage in STAGES[name]]
    document = {
        "calibration": {"texts": [str(folder / "calibration.txt")], "samples": 8, "length": 64},
        "stages": stages,
        "gates": {"text": str(folder / "gate.txt"), "protocol": "window:32"},
    }
    return compress(str(stories / "hf"), name, parse_recipe(document))


@pytest.mark.parametrize("name", list(STAGES))
def test_a_recipe_gives_a_model_that_runs(name: str, stories: Path, tmp_path: Path) -> None:
    result = _run(name, stories, tmp_path).result
    assert result["proof"]["logits_error"] < 2e-3
    assert 0 < result["gate"]["kld_mean"] < {"smoothquant": 0.02, "auto": 0.15}.get(name, 0.3)


def test_the_recipes_of_the_table_are_sound() -> None:
    names = sorted(path.stem for path in RECIPES.glob("stories_q*.yaml"))
    assert names == ["stories_q2", "stories_q3", "stories_q45", "stories_q50", "stories_q8"]
    for name in names:
        (stage,) = parse_recipe(load_recipe(RECIPES / f"{name}.yaml")).stages
        assert stage.method == "auto"
