"""The command that makes the model, as far as it goes in seconds: data, a first checkpoint, resumption, bad input."""

import argparse
import math
from pathlib import Path

import pytest
from demo.make import CONTEXT, Screen, config, find_realdata, make, programs

from inhouse.core.errors import NotFoundError
from inhouse.train.data import load_dataset
from inhouse.train.loop import StepReport

pytestmark = pytest.mark.torch


def options(realdata: Path, work: Path) -> argparse.Namespace:
    """As the command line gives them, with no time to train."""
    made = {"realdata": str(realdata), "work": work, "out": None, "device": "cpu", "threads": 0}
    return argparse.Namespace(**made, steps=2, samples=400, minutes=0.0, json=True)


@pytest.mark.realdata
def test_it_stops_when_time_is_up_and_keeps_what_it_has(
    realdata: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(options(realdata, tmp_path)) == 1
    assert "again to go on" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").exists()
    data = load_dataset(tmp_path / "data.npz")
    assert len(data) == 400
    assert data.lengths.max() <= CONTEXT
    assert data.ids.max() < 6000
    made = (tmp_path / "data.npz").stat().st_mtime_ns
    assert make(options(realdata, tmp_path)) == 1
    assert (tmp_path / "data.npz").stat().st_mtime_ns == made


def test_missing_texts_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="tinystories"):
        find_realdata(str(tmp_path))


def test_the_model_has_the_size_that_the_card_says() -> None:
    parameters = sum(math.prod(spec.shape) for spec in programs().weights.values())
    assert 4_000_000 <= parameters <= 5_500_000
    assert config(10).noise_vocab < 6000


def test_the_screen_shows_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(as_json=False)(StepReport(100, 200, 1.5, 1e-3, 5000, 60.0, 61.0))
    assert "100/200" in (shown := capsys.readouterr().err)
    assert "left 1:01" in shown
    Screen(as_json=True)(StepReport(1, 2, 1.5, 1e-3, 5000, 60.0, 61.0))
    assert '"eta_s": 61.0' in capsys.readouterr().out
