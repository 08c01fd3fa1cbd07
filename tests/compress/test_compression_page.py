"""The page of compression cannot lie: its tables are those of the code and of the recorded results."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from inhouse.compress.recipe import ORDER
from inhouse.compress.shorts import SHORTS
from inhouse.compress.table import METHODS

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs" / "compression.md", ROOT / "docs" / "compression-results.json"


def test_the_tables_are_current() -> None:
    command = [sys.executable, "tools/compression_page.py", "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"run `python tools/compression_page.py` {done.stderr}"


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


def test_figures_that_fall_short_in_part_say_so_in_the_table() -> None:
    lines = PAGE.read_text("utf-8").splitlines()
    (cut,) = [line for line in lines if "healed: rise of the held-out loss" in line]
    (measured,) = [one for one in json.loads(RESULTS.read_text("utf-8")) if one["id"] == "demo-structured-loss"]
    answers = measured["value"]["answers alone"]
    assert f"answers alone {answers:g}" in cut
    assert ("answers alone hold it" if answers <= 0.05 else f"answers alone lose {answers:.0%}, above the goal") in cut
    (cache,) = [line for line in lines if "KV cache int8 on stories260K" in line]
    assert "nothing saved beside bf16" in cache
