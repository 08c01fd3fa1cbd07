"""Damaged models at the import's door: an error of ours or a version, nothing else; a refusal leaves no trace."""

import json
import shutil
import time
from pathlib import Path
from random import Random

import pytest

from inhouse.core.errors import InhouseError
from inhouse.load.importer import import_model
from inhouse.store.store import Store
from tests.fuzz.mutate import damage, damage_json
from tests.load.checkpoints import copy_hf
from tests.store.tables import dump

pytestmark = [pytest.mark.null, pytest.mark.realdata]
SECONDS = 10.0  # one import of this small model, on a busy machine
VICTIMS = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "generation_config.json",
    "tokenizer_config.json",
    "gguf",
)


def state(store: Store) -> tuple[list[str], str]:
    files = sorted(path.name for folder in (store.home.blobs, store.home.tmp) for path in folder.iterdir())
    return files, dump(store)


def mutant(data: bytes, name: str, rng: Random) -> bytes:
    if name.endswith(".json") and rng.random() < 0.7:
        return damage_json(json.loads(data), rng)
    return damage(data, rng, [data])


def attempt(path: Path, store: Store) -> InhouseError | None:
    try:
        import_model(path, "maybe", store=store)
    except InhouseError as error:
        return error
    return None


@pytest.mark.parametrize("count", [120, pytest.param(20_000, marks=[pytest.mark.soak, pytest.mark.timeout(7200)])])
def test_damaged_models(stories: Path, tmp_path: Path, count: int) -> None:
    folder = copy_hf(stories, tmp_path / "m")
    gguf = tmp_path / "m.gguf"
    shutil.copyfile(stories / "stories260K-Q5_1.gguf", gguf)
    refused = taken = 0
    with Store() as store:
        import_model(folder, "good", store=store)
        for index in range(count):
            rng = Random(f"import/{index}")
            victim = VICTIMS[index % len(VICTIMS)]
            path = gguf if victim == "gguf" else folder / victim
            whole = path.read_bytes()
            path.write_bytes(mutant(whole, path.name, rng))
            before, began = state(store), time.monotonic()
            error = attempt(path if victim == "gguf" else folder, store)
            if error is None:
                taken += 1
            else:
                refused += 1
                assert error.message, f"input {index} was refused without a word"
                assert state(store) == before, f"input {index} was refused and left a trace"
            assert time.monotonic() - began < SECONDS, f"input {index} took too long"
            path.write_bytes(whole)
        assert store.check(deep=True) == []
    assert refused > count // 3
    assert taken > 0, "a change of a weight's bits alone is a model still"
