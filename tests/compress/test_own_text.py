"""Runs without texts: the model's own text is drawn once for a whole search, after what can be refused before, and
candidates leave nothing in the cache of packs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from inhouse.compress import generated, own_text, search
from inhouse.compress.pipeline import compress
from inhouse.compress.recipe import parse_recipe
from inhouse.core.errors import CapacityError
from inhouse.store.home import Home
from tests.compress.tiny_models import make

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.realdata]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents each draw of calibration text was asked for."""
    counts: list[int] = []
    sample = generated.sample_documents

    def counted(session: Any, count: int, **options: Any) -> Iterator[list[int]]:
        counts.append(count)
        return sample(session, count, **options)

    monkeypatch.setattr(own_text, "sample_documents", counted)
    torch.set_num_threads(1)
    return counts


def test_a_search_draws_once_and_keeps_no_packs(
    stories: Path, tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "LEAST", 5)
    monkeypatch.setattr(search, "SEQUENCES", 2)
    model = make("Llama", stories, tmp_path / "m")
    base = {"calibration": {"samples": 4, "length": 16}}
    found = search.search(str(model), "best", search.Limit(120_000), base)
    assert sum("gptq" in one.name for one in found.measured if not one.error) >= 1, "one that calibrates was run"
    assert drawn == [4]
    assert len(list(Home.find().packs.glob("*.pack"))) == 1, "that of the model itself"


def test_too_little_memory_is_said_before_the_model_writes(stories: Path, drawn: list[int]) -> None:
    stages = [{"quantize": {"method": "gptq", "format": "q4_0"}}]
    recipe = parse_recipe({"stages": stages, "budget": {"ram": "60MB"}})
    with pytest.raises(CapacityError, match="does not suffice"):
        compress(str(stories / "hf"), "small", recipe)
    assert drawn == []


def test_a_run_keeps_the_packs_of_what_stays(stories: Path, tmp_path: Path) -> None:
    """The checkpoint under the gate is moved into the store afterwards: a pack of its folder would never be used."""
    model = make("Llama", stories, tmp_path / "m")
    compress(str(model), "child", parse_recipe({"stages": [{"quantize": {"method": "round", "format": "q8_0"}}]}))
    assert len(list(Home.find().packs.glob("*.pack"))) == 2, "of the model and of the stored version"
