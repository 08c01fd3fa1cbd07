"""A search that was killed goes on and finds the same; one that was finished answers again, and says so."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import inhouse.api
from inhouse.compress import finish, search
from inhouse.compress.candidates import Candidate
from inhouse.compress.runs import SEARCHES, clean_run, held_folder, list_runs
from inhouse.core.errors import CapacityError, ConflictError, NotFoundError
from inhouse.store.home import Home
from tests.compress.killing_search import few
from tests.compress.tiny_models import make

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.realdata]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(stories: Path, tmp_path: Path) -> str:
    torch.set_num_threads(1)
    return str(make("Llama", stories, tmp_path / "m"))


@pytest.fixture
def asked(model: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the candidates that were measured, as they are."""
    measured: list[str] = []
    measure = search._measure

    def counted(candidate: Candidate, *given: Any) -> Any:
        measured.append(candidate.name)
        return measure(candidate, *given)

    monkeypatch.setattr(search, "LEAST", 4)
    monkeypatch.setattr(search, "SEQUENCES", 2)
    monkeypatch.setattr(search, "candidates", few)
    monkeypatch.setattr(search, "_measure", counted)
    return measured


def test_killed_and_given_again_it_finds_the_same(model: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.compress.killing_search", model, str(tmp_path / "runs")],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{ROOT}/src"}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    names = found["none"]["measured"]
    assert len(names) == 4
    for point, kept in (("between", 2), ("inside", 3)):
        assert found[point]["killed"], point
        assert found[point]["measured"] == names[kept:], "what was measured is not measured again"
        assert found[point]["found"] == found["none"]["found"], point


def test_the_same_command_again_says_that_it_is_done(model: str, asked: list[str]) -> None:
    """Whatever of resume, restart and another limit is given with it."""
    with pytest.raises(NotFoundError, match="no unfinished search"):
        inhouse.api.compress(model, "best", target_size=120_000, threads=1, resume=True)
    assert not (Home.find().data / SEARCHES / "best").exists()
    first = inhouse.api.compress(model, "best", target_size=120_000, threads=1)
    assert first.fresh
    assert len(asked) == 4
    for resume in (None, True):
        again = inhouse.api.compress(model, "best", target_size=120_000, threads=1, resume=resume)
        assert not again.fresh
        assert again.ref == first.ref
        assert again.result == json.loads(json.dumps(first.result)), "as it was kept"
    wider = inhouse.api.compress(model, "best", target_size=1_000_000, threads=1)
    assert wider.result["search"]["best"] == "rtn q8_0", "another limit, from what was measured"
    assert len(asked) == 4
    anew = inhouse.api.compress(model, "best", target_size=120_000, threads=1, resume=False)
    assert anew.fresh
    assert len(asked) == 8
    assert anew.result["search"] == json.loads(json.dumps(first.result["search"]))


def test_a_search_killed_before_its_run_is_resumed_as_such(
    model: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr("inhouse.compress.pipeline.compress", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            inhouse.api.compress(model, "best", target_size=120_000, threads=1)
    (state,) = list_runs(Home.find())
    assert (state.name, state.state, state.units) == ("best", "searching", 4)
    done = inhouse.api.compress(model, "best", target_size=120_000, threads=1, resume=True)
    assert done.fresh
    assert len(asked) == 4
    assert [run.state for run in list_runs(Home.find())] == ["finished"]
    clean_run(Home.find(), "best")
    assert not (Home.find().data / SEARCHES / "best").exists()


def test_texts_that_changed_are_measured_anew(model: str, asked: list[str], tmp_path: Path) -> None:
    """The measurements are of the contents, not of the name of a file."""
    text = tmp_path / "text.txt"
    base = {"calibration": {"texts": [str(text)], "samples": 4, "length": 16}, "budget": {"threads": 1}}
    for words, measured in (("The dog ran. " * 60, 4), ("The dog ran. " * 60, 4), ("A cat sat down. " * 60, 8)):
        text.write_text(words)
        search.search(model, "best", search.Limit(120_000), base)
        assert len(asked) == measured


def test_a_full_disk_ends_the_search_and_keeps_what_was_measured(
    model: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no property of the candidate on which it happens."""
    write = finish.write

    def full(*given: Any) -> Any:
        if len(asked) == 3:
            raise CapacityError("the disk is full", remedy="Make room")
        return write(*given)

    base = {"calibration": {"samples": 4, "length": 16}, "budget": {"threads": 1}}
    with monkeypatch.context() as broken:
        broken.setattr(finish, "write", full)
        with pytest.raises(CapacityError, match="disk is full"):
            search.search(model, "best", search.Limit(120_000), base)
    found = search.search(model, "best", search.Limit(120_000), base)
    assert not any(one.error for one in found.measured)
    assert len(asked) == 5, "the third once more, then the fourth"


def test_two_searches_for_one_name_exclude_each_other(model: str) -> None:
    folder = Home.find().data / SEARCHES / "best"
    with held_folder(folder, "best"), pytest.raises(ConflictError, match="another process is making best"):
        search.search(model, "best", search.Limit(120_000), {})
    assert not folder.exists()
