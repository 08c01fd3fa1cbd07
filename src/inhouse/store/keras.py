"""Keras weights (`tf_model.h5`) of Hugging Face models as arrays under the names of their PyTorch checkpoints.

Knows the HDF5 tree that Keras writes (layers, each with its list of weights) and the naming of TensorFlow's layers;
does not know families. Needs h5py, an extra, and so is imported where it is used. Links to other files are refused.
Sources: Keras' legacy HDF5 saving; the naming of Hugging Face transformers' TensorFlow models.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, UnsupportedError

FILE = "tf_model.h5"
MAGIC = b"\x89HDF\r\n\x1a\n"
_DTYPES = ("float32", "float16")
_TOP = "top_level_model_weights"
# Last part of a Keras name -> of a torch name.
_LAST = {"kernel": "weight", "gamma": "weight", "embeddings": "weight", "beta": "bias"}
_MAX_WEIGHTS = 1 << 16

Array = npt.NDArray[Any]


def read_keras(path: Path) -> Iterator[tuple[str, Array]]:
    """(PyTorch name, array) of every weight, one at a time.

    Raises FormatError: no HDF5 file of Keras, a weight twice or missing. UnsupportedError: another type than f32 and
    f16, a weight that lies in another file.
    """
    seen: set[str] = set()
    try:
        with h5py.File(path, "r") as file:
            for group, name in _weights(file, path.name):
                torch_name, transpose = torch_weight(name)
                if torch_name in seen:
                    raise FormatError(f"{path.name}: {torch_name} is there twice", param=torch_name)
                seen.add(torch_name)
                array = _array(group, name, path.name)
                yield torch_name, np.ascontiguousarray(array.T) if transpose and array.ndim == 2 else array
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # what h5py raises for a damaged file
        raise FormatError(f"{path.name} is not a whole HDF5 file of Keras: {error}") from None
    if not seen:
        raise FormatError(f"{path.name} holds no weights")


def torch_weight(name: str) -> tuple[str, bool]:
    """The PyTorch name of a Keras weight, and whether it must be transposed.

    `tf_bert_model/bert/encoder/layer_._0/attention/self/query/kernel:0` is
    `bert.encoder.layer.0.attention.self.query.weight`, transposed.
    """
    path = name.removesuffix(":0")
    path = re.sub(r"/[^/]*___([^/]*)/", r"/\1/", path)  # a scope of another model's, kept for compatibility
    parts = [part for part in path.replace("_._", "/").split("/") if part][1:]  # without the model's own name
    if len(parts) > 2 and parts[-2] == parts[-3]:  # shared/shared/weight
        parts.pop(-2)
    if not parts:
        raise FormatError(f"the Keras weight {name!r} has no name of its own", param=name)
    last = parts[-1]
    return ".".join([*parts[:-1], _LAST.get(last, last)]), last == "kernel"


def _weights(file: Any, where: str) -> Iterator[tuple[Any, str]]:
    """(group, name in it) of each weight, in the order of the layers."""
    count = 0
    for layer in [*_names(file, "layer_names", where), *([_TOP] if _TOP in file else [])]:
        group = _hard(file, layer, where)
        for name in _names(group, "weight_names", where):
            count += 1
            if count > _MAX_WEIGHTS:
                raise FormatError(f"{where} lists more than {_MAX_WEIGHTS} weights")
            yield group, name


def _names(group: Any, key: str, where: str) -> list[str]:
    """A list of names among the attributes; long ones are cut into key0, key1, ..."""
    chunks = [key] if key in group.attrs else []
    while not chunks or (chunks[0] != key and len(chunks) < 1000):
        if f"{key}{len(chunks)}" not in group.attrs:
            break
        chunks.append(f"{key}{len(chunks)}")
    if not chunks:
        raise FormatError(f"{where} has no {key}: Keras did not write it", remedy="Save the model's weights again.")
    names = [item for chunk in chunks for item in group.attrs[chunk]]
    return [item.decode() if isinstance(item, bytes) else str(item) for item in names]


def _hard(group: Any, name: str, where: str) -> Any:
    """An entry of a group, step by step, through links within the file alone."""
    for part in name.split("/"):
        if part and not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise UnsupportedError(f"{where}: {name!r} is missing, or a link", param=name)
        group = group[part] if part else group
    return group


def _array(group: Any, name: str, where: str) -> Array:
    found = _hard(group, name, where)
    if not isinstance(found, h5py.Dataset):
        raise FormatError(f"{where}: {name!r} is not an array", param=name)
    if found.external or found.is_virtual:
        raise UnsupportedError(f"{where}: {name!r} lies in another file", param=name)
    if found.dtype.name not in _DTYPES:
        raise UnsupportedError(f"{where}: {name!r} is {found.dtype}; read are {', '.join(_DTYPES)}", param=name)
    if found.size * found.dtype.itemsize > max(4096, 2000 * Path(found.file.filename).stat().st_size):
        raise FormatError(f"{where}: {name!r} has {found.size} elements, more than its file can hold", param=name)
    return np.asarray(found[()])
