"""A model's files as runs of bytes that a delta treats alike: each tensor one run, what lies between them another.

Knows where safetensors and GGUF files keep their tensors; any other file is one run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from inhouse.core.errors import InhouseError
from inhouse.store.dtypes import PLAIN_BYTES
from inhouse.store.gguf import open_gguf
from inhouse.store.mapping import MappedSource
from inhouse.store.safetensors import open_safetensors


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes [begin, end) of a file. `tensor` is "" for what is none."""

    begin: int
    end: int
    tensor: str = ""
    dtype: str = "U8"
    shape: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return self.end - self.begin

    @property
    def width(self) -> int:
        """Bytes an element; 1 for blocks of codes."""
        width = PLAIN_BYTES.get(self.dtype, 1)
        return width if self.size % width == 0 else 1


def runs_of(path: Path, name: str) -> list[Run]:
    """The runs of a file, in order, without holes. `name` is the file's name inside its model (contents in the store
    have no ending)."""
    size = path.stat().st_size
    source = _tensors(path, name)
    if source is None:
        return [Run(0, size)] if size else []
    try:
        found = []
        for tensor in source:
            info, (file, offset) = source.info(tensor), source.place(tensor)
            if file == path and info.nbytes:
                found.append(Run(offset, offset + info.nbytes, tensor, info.dtype, info.shape))
    finally:
        source.close()
    out: list[Run] = []
    reach = 0
    for run in sorted(found, key=lambda run: run.begin):
        if run.begin > reach:
            out.append(Run(reach, run.begin))
        out.append(run)
        reach = run.end
    if reach < size:
        out.append(Run(reach, size))
    return out


def _tensors(path: Path, name: str) -> MappedSource | None:
    """The file's tensors; None for a file that has none, or that its reader refuses: it is then plain bytes."""
    try:
        if name.endswith(".safetensors"):
            return open_safetensors(path)
        if name.endswith(".gguf"):
            return open_gguf(path)
    except InhouseError:
        return None
    return None


def tensor_places(files: Mapping[str, Path]) -> dict[tuple[str, str, tuple[int, ...]], tuple[str, Run]]:
    """(tensor, dtype, shape) -> (file's name inside the model, run), over all files of a model."""
    return {
        (run.tensor, run.dtype, run.shape): (name, run)
        for name, path in files.items()
        for run in runs_of(path, name)
        if run.tensor
    }
