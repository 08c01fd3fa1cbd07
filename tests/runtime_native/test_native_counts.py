"""Linears, attention, norms and quantisation execute no more instructions than the committed baseline (valgrind, level
AVX2)."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import count_instructions

pytestmark = pytest.mark.native

TOOL = Path(__file__).resolve().parents[2] / "tools" / "count_instructions.py"


def test_a_change_beyond_the_tolerance_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    before = {"q4_0 1": 1000, "q8_0 8": 1000, "rms_norm 8": 1000}
    assert count_instructions.compare({"q4_0 1": 1029, "q8_0 8": 971}, before)
    capsys.readouterr()
    assert not count_instructions.compare({"q4_0 1": 1000, "q8_0 8": 1040, "bf16 1": 7}, before)
    bad = [line for line in capsys.readouterr().out.splitlines() if "outside" in line]
    assert [line.split("  ")[0] for line in bad] == ["q8_0 8", "bf16 1"]


def test_kernels_execute_what_they_did() -> None:
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
