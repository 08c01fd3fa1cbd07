"""The page of compression cannot lie: its tables are those of the code and of the recorded results."""

import json
import re

import pytest
from tools.compression_page import PAGE, RESULTS, page

from inhouse.compress.recipe import ORDER
from inhouse.compress.shorts import SHORTS
from inhouse.compress.table import METHODS

pytestmark = pytest.mark.torch


def test_the_tables_are_current() -> None:
    text = PAGE.read_text("utf-8")
    assert page(text) == text, "run `python -m tools.compression_page`"


def test_every_method_and_every_short_name_has_a_row() -> None:
    text = PAGE.read_text("utf-8")
    for name in (*METHODS, *SHORTS):
        assert f"| `{name}` |" in text


def test_the_recipe_on_the_page_is_a_recipe() -> None:
    import yaml

    from inhouse.compress.recipe import parse_recipe

    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    recipe = parse_recipe(yaml.safe_load(block))
    assert [stage.kind for stage in recipe.stages] == ["prune", "lowrank", "quantize"]
    assert all(stage.kind in ORDER for stage in recipe.stages)


def test_results_are_sorted_and_have_their_commands() -> None:
    entries = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else []
    assert [one["id"] for one in entries] == sorted(one["id"] for one in entries)
    assert all(one["command"] and one["what"] for one in entries)
