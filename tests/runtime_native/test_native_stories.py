"""Trained weights: the golden text of stories260K at every level, with every KV type and batch in one."""

import json
from pathlib import Path

import numpy as np
import pytest

from inhouse.load.model import LoadedModel, open_model
from inhouse.runtime.native import NativeExecutor
from inhouse.runtime.packed import Packed
from tests.runtime_native.making import LEVELS, steps

pytestmark = [pytest.mark.native, pytest.mark.realdata]

TOKENS = 80  # of each golden text


@pytest.fixture(scope="module")
def model(realdata: Path) -> LoadedModel:
    return open_model(str(realdata / "models" / "stories260k" / "hf"), cache=False)


def greedy(executor: NativeExecutor, prompts: list[list[int]]) -> list[list[int]]:
    """The likeliest TOKENS tokens after each prompt, all prompts in one batch."""
    executor.allocate({group.name: 20 * len(prompts) for group in executor.programs.groups})
    chunks, firsts = list(prompts), [0] * len(prompts)
    outputs: list[list[int]] = [[] for _ in prompts]
    for _ in range(TOKENS):
        step = steps(executor.programs, list(zip(chunks, firsts, strict=True)))
        logits = executor.run("step", step)["logits"]
        ends = np.cumsum([len(chunk) for chunk in chunks]) - 1
        for n, end in enumerate(ends):
            firsts[n] += len(chunks[n])
            chunks[n] = [int(logits[end].argmax())]
            outputs[n] += chunks[n]
    return outputs


@pytest.mark.parametrize("kv_dtype", ["f32", "f16"])
@pytest.mark.parametrize("level", LEVELS)
def test_greedy_text_is_the_golden_one(model: LoadedModel, stories: Path, level: str, kv_dtype: str) -> None:
    golden = json.loads((stories / "golden.json").read_text())["greedy"]
    executor = NativeExecutor(model.programs, model.weights, isa=level, kv_dtype=kv_dtype)
    found = greedy(executor, [entry["prompt_ids"] for entry in golden])
    for entry, ids in zip(golden, found, strict=True):
        wanted = entry["output_ids"][:TOKENS]
        assert ids[: len(wanted)] == wanted


def test_its_weights_are_packed(model: LoadedModel) -> None:
    """Every matrix reaches the library packed, every vector plain."""
    assert all(isinstance(w, Packed) == (len(w.shape) == 2) for w in model.weights.values())
