"""kill -9 at any point, then the same command: the same bytes as a run that nobody disturbed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.realdata]

ROOT = Path(__file__).resolve().parents[2]
TEXT = (
    "Once upon a time there was a little girl who liked to play in the park with her dog. One day the dog ran away. "
    "She looked for it behind the big tree, and there it was, asleep in the sun. They went home and were happy. "
)
# Prune and quantise two layers: blobs of values, masks and forms, a pass over the calibration in both stages.
STAGES = """
calibration: {{texts: [{text}], samples: 4, length: 64}}
stages:
  - quantize: {{method: gptq, format: q4_0, include: ["re:layers.[01].*"], overrides: {{"mlp.down": {{format: q6_0}}}}}}
gates: {{text: {gate}, protocol: "window:32"}}
"""


def _recipe(folder: Path) -> Path:
    text = folder / "calibration.txt"
    text.write_text(TEXT * 3)
    (folder / "gate.txt").write_text("The sun was hot and the boy was thirsty. He asked his mom for some water. ")
    recipe = folder / "recipe.yaml"
    recipe.write_text(STAGES.format(text=text, gate=folder / "gate.txt"))
    return recipe


def _killed(stories: Path, folder: Path, *points: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.compress.killing", str(stories / "hf"), str(_recipe(folder)), str(folder)]
    done = subprocess.run(
        [*command, *points],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}/src"},
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert all(one["rest"] == 0 for one in found.values()), (found, done.stderr[-3000:])
    return found


def test_killed_and_resumed_gives_the_same_bytes(stories: Path, tmp_path: Path) -> None:
    found = _killed(stories, tmp_path, "none", "line:1", "line:4", "tear:7", "blob:9", "line:15")
    assert not found["none"]["killed"]
    assert all(one["killed"] for point, one in found.items() if point != "none"), found
    assert {one["digest"] for one in found.values()} == {found["none"]["digest"]}


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_killed_at_every_unit_and_at_random_times(stories: Path, tmp_path: Path) -> None:
    lines = 1 + 14 + 1
    rng = random.Random(5)
    times = [f"time:{rng.uniform(0.05, 4.0):.3f}" for _ in range(30)]
    points = ["none", *(f"{kind}:{n}" for n in range(1, lines + 1) for kind in ("line", "tear")),
              *(f"blob:{n}" for n in range(1, 15)), *times]  # fmt: skip
    found = _killed(stories, tmp_path, *points)
    assert {one["digest"] for one in found.values()} == {found["none"]["digest"]}
    assert sum(one["killed"] for one in found.values()) >= 2 * lines + 14
