"""Small checkpoints for the tests of load, copied and changed, and greedy answers of what was opened."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from inhouse.load.model import LoadedModel
from inhouse.runtime.step import BLOCK_SIZE, Step
from inhouse.store.safetensors import write_safetensors
from inhouse.store.source import materialise, open_source
from inhouse.store.writing import from_array

Arrays = dict[str, npt.NDArray[np.float32]]


def copy_hf(stories: Path, target: Path) -> Path:
    """The stories260K folder, writable."""
    target.mkdir(parents=True)
    for file in (stories / "hf").iterdir():
        shutil.copyfile(file, target / file.name)
    return target


def read_arrays(folder: Path) -> Arrays:
    """All tensors of a folder as float32."""
    source = open_source(folder)
    arrays = {name: materialise(source, name) for name in source}
    source.close()
    return arrays


def change(folder: Path, edit: Callable[[Arrays], None]) -> Path:
    """Rewrites the folder's model.safetensors after an edit of its arrays."""
    arrays = read_arrays(folder)
    edit(arrays)
    write_safetensors(folder / "model.safetensors", [from_array(name, value) for name, value in arrays.items()])
    return folder


def greedy(model: LoadedModel, prompt: list[int], count: int) -> list[int]:
    """Greedy ids, one sequence, one step at a time."""
    blocks = -(-(len(prompt) + count) // BLOCK_SIZE)
    group = model.programs.groups[0].name
    model.executor.allocate({group: blocks})
    table = {group: np.arange(blocks, dtype=np.int32)[None, :]}
    ids, fresh = list(prompt), list(prompt)
    out: list[int] = []
    while len(out) < count:
        rows = len(fresh)
        step = Step(
            tokens=np.array(fresh, np.int32),
            positions=np.arange(len(ids) - rows, len(ids), dtype=np.int32),
            sequences=np.zeros(rows, np.int32),
            lengths=np.array([len(ids)], np.int32),
            tables=table,
            sampled=np.array([rows - 1], np.int32),
            adapters=np.zeros(1, np.int32),
        )
        best = int(model.executor.run("step", step)["logits"][0].argmax())
        out.append(best)
        ids, fresh = [*ids, best], [best]
    return out
