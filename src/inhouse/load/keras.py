"""Keras checkpoints on their way in: a folder whose weights are `tf_model.h5` becomes one with model.safetensors."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inhouse.core.errors import UnavailableError
from inhouse.core.progress import Progress, silent
from inhouse.store.safetensors import write_safetensors
from inhouse.store.source import side_files
from inhouse.store.writing import from_array

FILE = "tf_model.h5"
_OTHERS = ("*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth")


def is_keras(path: Path) -> bool:
    """Whether a folder, or a file, has its weights as Keras .h5 and nothing that is read as it is."""
    if path.is_file():
        return path.suffix == ".h5"
    return (path / FILE).is_file() and not any(any(path.glob(pattern)) for pattern in _OTHERS)


@contextmanager
def converted(path: Path, progress: Progress = silent) -> Iterator[Path]:
    """A folder beside the original's name, for as long as the block runs: its weights as safetensors, its side files.

    Raises UnavailableError without h5py, and as `store.keras.read_keras`.
    """
    try:
        from inhouse.store.keras import read_keras
    except ModuleNotFoundError:
        raise UnavailableError(
            f"{path.name} is a Keras checkpoint, and h5py is not installed", remedy="pip install 'inhouse[h5]'"
        ) from None
    file = path if path.is_file() else path / FILE
    folder = file.parent
    with tempfile.TemporaryDirectory(prefix="inhouse-keras-") as made:
        target = Path(made) / folder.name
        target.mkdir()
        tensors = [from_array(name, array) for name, array in read_keras(file)]
        total = sum(tensor.info.nbytes for tensor in tensors)
        write_safetensors(target / "model.safetensors", tensors)
        progress("convert Keras weights", total, total)
        for side in side_files(folder):
            copy = target / side.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(side, copy)
        yield target
