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
        **surroundings(), "threads": torch.get_num_threads(), "chunk": chunk, "activations": activations,
    }  # fmt: skip


def surroundings() -> dict[str, str]:
    """What decides results beside what was asked for: code, libraries, instruction set."""
    return {
        "code": code_digest(), "torch": torch.__version__, "numpy": np.__version__,
        "isa": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }  # fmt: skip


def code_digest() -> str:
    """sha256 over the sources of ROOMS."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for room in ROOMS:
        for file in sorted((root / room).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def details(recipe: Recipe, model: str, calibration: Calibration | None = None) -> dict[str, Any]:
    """What stands behind the hashes of a fingerprint, so that a difference can be named."""
    texts = calibration.texts if calibration is not None else ()
    return {
        "recipe": recipe.canonical(), "model": model,
        "texts": [{key: text[key] for key in ("source", "sha256", "characters")} for text in texts],
    }  # fmt: skip


def difference(
    old: Mapping[str, Any], new: Mapping[str, Any], behind_old: Mapping[str, Any], behind_new: Mapping[str, Any]
) -> Iterator[str]:
    """What differs between two fingerprints, one sentence each, with the key of the recipe or the text where `details`
    tell which."""
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) == new.get(key):
            continue
        said: list[str] = []
        if key == "recipe" and "recipe" in behind_old:
            said = list(_keys(behind_old["recipe"], behind_new["recipe"]))
        elif key == "calibration" and "texts" in behind_old:
            said = list(_texts(behind_old["texts"], behind_new["texts"]))
        elif key == "model" and behind_old.get("model") != behind_new.get("model"):
            said = [f"the model was {behind_old.get('model')}, is {behind_new.get('model')}"]
        yield from said or [f"{WORDS.get(key, key)} was {_short(old.get(key))}, is {_short(new.get(key))}"]


def _keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Which keys of two canonical recipes differ."""
    before, after = (dict(_leaves(recipe, "")) for recipe in (old, new))
    for path in dict.fromkeys([*before, *after]):
        if path not in after:
            yield f"the recipe's {path} was {before[path]!r}, is not there"
        elif path not in before:
            yield f"the recipe's {path} was not there, is {after[path]!r}"
        elif before[path] != after[path]:
            yield f"the recipe's {path} was {before[path]!r}, is {after[path]!r}"


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path as a recipe has it, plain value or list of plain values)."""
    if isinstance(value, Mapping) and value:
        inner = f"{path}.{value['kind']}" if "kind" in value and "method" in value else path
        for key, one in value.items():
            word = str({"": {"gate": "gates"}, "calibration": {"files": "texts"}}.get(path, {}).get(key, key))
            if key != "kind" or inner == path:
                yield from _leaves(one, inner if key == "options" else f"{inner}.{word}" if inner else word)
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        for at, one in enumerate(value):
            yield from _leaves(one, f"{path}[{at}]")
    else:
        yield path, value


def _texts(old: list[Mapping[str, Any]], new: list[Mapping[str, Any]]) -> Iterator[str]:
    """Which calibration texts differ: by source where the same one has other contents."""
    before, after = ({(text["source"], text["sha256"]) for text in texts} for texts in (old, new))
    gone, come = ({source: sha for source, sha in sorted(one)} for one in (before - after, after - before))
    for source in dict.fromkeys([*gone, *come]):
        if source in gone and source in come:
            yield f"the calibration text {source} was {_short(gone[source])}, is {_short(come[source])}"
        elif source in gone:
            yield f"the calibration text {source} was used, is not there"
        else:
            yield f"the calibration text {source} was not used, is there now"


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}.." if len(text) == 64 else text
