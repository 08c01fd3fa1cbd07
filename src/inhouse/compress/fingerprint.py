"""What decides every byte of a run's result: a run is only ever resumed under the same. Knows no run folders."""

import hashlib
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inhouse.compress.calibrate import Calibration
from inhouse.compress.recipe import Recipe
from inhouse.compress.work import Work

ROOMS = ("compress", "train", "runtime", "load", "model")  # whose code decides what is computed
WORDS = {
    "recipe": "the recipe", "model": "the model", "calibration": "the calibration tokens", "code": "Inhouse's code",
    "torch": "torch", "numpy": "numpy", "isa": "the instruction set", "threads": "the number of threads",
    "chunk": "sequences a chunk (by --ram)", "activations": "the type of activations on disk",
}  # fmt: skip


def fingerprint(
    recipe: Recipe, work: Work, calibration: Calibration | None, chunk: int, activations: str
) -> dict[str, Any]:
    """Everything that the result is a function of."""
    return {
        "recipe": recipe.hash, "model": work.digest, "calibration": calibration.hash if calibration else "",
        "code": code_digest(), "torch": torch.__version__, "numpy": np.__version__,
        "isa": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}", "threads": torch.get_num_threads(),
        "chunk": chunk, "activations": activations,
    }  # fmt: skip


def code_digest() -> str:
    """sha256 over the sources of ROOMS."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for room in ROOMS:
        for file in sorted((root / room).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """What differs, one sentence each."""
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key):
            yield f"{WORDS.get(key, key)} was {_short(old.get(key))}, is {_short(new.get(key))}"


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}.." if len(text) == 64 else text
