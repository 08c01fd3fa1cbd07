"""Activations on disk: each value of a Program is one file of rows, chunk after chunk, read back by mapping.

Knows files and dtypes; does not know Programs. Derived data: nothing is synced, and a run that starts again makes it
anew.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from inhouse.compress.journal import disk_room
from inhouse.core.errors import UsageError

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Spill:
    """Values of chunks by id, in a folder that is emptied first."""

    def __init__(self, folder: Path, dtype: str) -> None:
        if dtype not in DTYPES:
            raise UsageError(f"activations cannot be kept as {dtype}", remedy=f"Use {', '.join(DTYPES)}", param="dtype")
        self._folder, self._dtype = folder, DTYPES[dtype]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        self._places: dict[int, list[tuple[int, int, int]]] = {}  # id -> [(offset in elements, rows, width)] of chunks

    def __contains__(self, value: int) -> bool:
        return value in self._places

    def write(self, value: int, tensor: Tensor) -> Tensor:
        """The next chunk of a value, [rows, width]; gives what `read` will give. Raises CapacityError where the disk is
        full, UsageError where f16 overflows."""
        narrow = tensor.detach().to(self._dtype)
        if self._dtype is torch.float16 and not bool(torch.isfinite(narrow).all()):
            raise UsageError("an activation is beyond f16", remedy="Keep activations as bf16 or f32", param="dtype")
        places = self._places.setdefault(value, [])
        offset = places[-1][0] + places[-1][1] * places[-1][2] if places else 0
        path = self._path(value)
        with disk_room(path), open(path, "ab") as file:
            file.write(narrow.contiguous().view(torch.uint8).numpy().data)
        places.append((offset, narrow.shape[0], narrow.shape[1]))
        return narrow.float()

    def read(self, value: int, chunk: int) -> Tensor:
        """float32 [rows, width]; the caller's own."""
        offset, rows, width = self._places[value][chunk]
        size = self._dtype.itemsize
        raw = np.fromfile(self._path(value), np.uint8, rows * width * size, offset=offset * size)
        return torch.from_numpy(raw).view(self._dtype).reshape(rows, width).float()

    def drop(self, value: int) -> None:
        """Forgets a value and removes its file."""
        if self._places.pop(value, None) is not None:
            self._path(value).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes everything."""
        self._places = {}
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, value: int) -> Path:
        return self._folder / f"{value}.act"
