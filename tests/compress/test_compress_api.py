"""`inhouse.compress(...)` asks for all that the command does, and says what is wrong before anything is done."""

from pathlib import Path
from typing import Any

import pytest
import torch

import inhouse.api
from inhouse.compress import search
from inhouse.compress.candidates import candidates
from inhouse.compress.runs import SEARCHES, list_runs
from inhouse.core.errors import CapacityError, InhouseError, UsageError
from inhouse.store.home import Home
from tests.compress.tiny_models import make

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.realdata]


@pytest.fixture
def model(stories: Path, tmp_path: Path) -> str:
    torch.set_num_threads(1)
    return str(make("Llama", stories, tmp_path / "m"))


@pytest.mark.parametrize("limit", ["target_size", "max_kld"])
def test_a_limit_is_searched_for(model: str, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(search, "LEAST", 3)
    monkeypatch.setattr(search, "SEQUENCES", 2)
    monkeypatch.setattr(search, "candidates", lambda layers: list(_plain(layers)))
    given: Any = {"target_size": "120KB", "max_kld": 0.5}[limit]
    done = inhouse.api.compress(model, "best", threads=1, **{limit: given})
    measured = [one for one in done.result["search"]["candidates"] if not one["error"]]
    assert len(measured) >= 3
    best = next(one for one in measured if one["name"] == done.result["search"]["best"])
    assert best["nbytes"] == done.result["bytes"]
    if limit == "target_size":
        assert done.result["bytes"] <= 120_000
        assert best["kld"] == min(one["kld"] for one in measured if one["nbytes"] <= 120_000)
    else:
        assert best["kld"] <= 0.5
        assert best["nbytes"] == min(one["nbytes"] for one in measured if one["kld"] <= 0.5)


def _plain(layers: int) -> Any:
    return [one for one in candidates(layers) if one.plain][1:4]


def test_to_and_recipe_and_budget(model: str) -> None:
    one = inhouse.api.compress(model, "one", to="q8", ram="3GB", threads=1)
    two = inhouse.api.compress(model, "two", {"stages": [{"quantize": {"method": "round", "format": "q8_0"}}]})
    assert one.result["ram"] == 3 * 10**9
    assert two.result["ram"] is None
    assert one.result["bytes"] == two.result["bytes"]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, UsageError, "none is given"),
        ({"to": "q8", "max_kld": 0.1}, UsageError, "to and max_kld are given"),
        ({"to": "q9"}, UsageError, "no recipe called 'q9'"),
        ({"max_kld": 0.0}, UsageError, "must be above 0"),
        ({"target_size": "small"}, UsageError, "is no size"),
        ({"target_size": 1000}, CapacityError, "cannot be reached"),
        ({"recipe": {"budget": 5, "stages": [{"kv": "int8"}]}, "ram": "1GB"}, UsageError, "expected a mapping"),
        ({"to": "q8", "threads": 0}, UsageError, "1 or more"),
    ],
)
def test_what_is_wrong_is_said_before(model: str, given: Any, error: type[InhouseError], words: str) -> None:
    with pytest.raises(error, match=words):
        inhouse.api.compress(model, "new", **given)
    assert not list_runs(Home.find())
    assert not (Home.find().data / SEARCHES / "new").exists()
