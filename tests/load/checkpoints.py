"""Small checkpoints for the tests of load: copies of the real ones, and changed ones."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

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
