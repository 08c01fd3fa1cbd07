"""The short form of the fuzz run, and proof that the harness sees what it is there to see."""

import json
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from inhouse.core.errors import FormatError

from . import harness
from .harness import run_input, run_range
from .run import _work, main, run_batch
from .targets import Target, make_input, targets

pytestmark = pytest.mark.null
INPUTS = 400


@pytest.mark.parametrize("name", list(targets()))
def test_seeds_are_valid(name: str, tmp_path: Path) -> None:
    target = targets()[name]
    for file, data in target.beside().items():
        (tmp_path / file).write_bytes(data)
    for data in target.seeds():
        assert run_input(target, data, tmp_path) == ("accepted", "")


@pytest.mark.parametrize("name", list(targets()))
def test_broken_files_are_errors_or_valid_sources(name: str, tmp_path: Path) -> None:
    outcome = run_range(targets()[name], 20, 0, INPUTS, tmp_path, lambda index: None)
    assert outcome.failures == []
    assert outcome.inputs == INPUTS
    # A mutator that breaks everything, or nothing, tests nothing.
    assert INPUTS // 50 < outcome.verdicts["accepted"] < INPUTS * 9 // 10


@pytest.mark.parametrize("name", list(targets()))
def test_inputs_depend_on_seed_and_index_alone(name: str) -> None:
    target = targets()[name]
    base, again = target.seeds(), target.seeds()
    some = [make_input(target, base, 1, index) for index in range(100)]
    assert some == [make_input(target, again, 1, index) for index in range(100)]
    assert some != [make_input(target, base, 2, index) for index in range(100)]
    assert len(set(some)) > 75


def _raises(path: Path) -> None:
    raise IndexError("a reader that trusts its file")


def _writes(path: Path) -> None:
    (path.parent / "left over").touch()


def _silent(path: Path) -> None:
    raise FormatError("")


def _hangs(path: Path) -> None:
    try:
        time.sleep(60)
    except Exception:
        pass


def _grows(path: Path) -> None:
    bytearray(2 << 30)


@pytest.mark.parametrize(
    ("accept", "cause"),
    [
        (_raises, "IndexError: a reader that trusts its file"),
        (_writes, "the folder changed"),
        (_silent, "an error without a message"),
        (_hangs, "took more than"),
        (_grows, "MemoryError"),
    ],
)
def test_broken_promises_are_seen(
    tmp_path: Path, accept: Callable[[Path], None], cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "SECONDS_PER_INPUT", 0.1)
    target = Target("bad", lambda: [b"x"], lambda base, rng: base[0], accept)
    outcome = run_range(target, 1, 0, 1, tmp_path, lambda index: None)
    ((index, what),) = outcome.failures
    assert index == 0
    assert cause in what


def _dies_at_3(sender: Connection, current: Any, name: str, seed: int, begin: int, end: int) -> None:
    if begin <= 3 < end:
        current.value = 3
        os.kill(os.getpid(), signal.SIGSEGV)
    _work(sender, current, name, seed, begin, end)


def test_a_crash_is_a_verdict_and_the_run_goes_on() -> None:
    outcome = run_batch("config.json", 1, 0, 6, _dies_at_3)
    assert outcome.failures == [(3, f"the process ended with status -{signal.SIGSEGV.value}")]
    assert outcome.inputs == 6


def test_the_command_prints_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--inputs", "9", "--seed", "5", "--target", "gguf", "--target", "torch", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["inputs"], report["seed"], report["failures"]) == (9, 5, 0)
    assert [part["inputs"] for part in report["targets"].values()] == [4, 5]
    assert main(["--inputs", "2", "--target", "gguf"]) == 0
    assert "2 inputs, seed 1" in capsys.readouterr().out
    assert main(["--reproduce", "gguf:7"]) == 0
