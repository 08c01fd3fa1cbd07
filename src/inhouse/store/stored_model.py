"""Inhouse's own checkpoint of a compressed model: what its folder holds, and the writer.

    config.json         that of Hugging Face, of the model as it is now, with quantization_config = QUANTIZATION
    model.safetensors   canonical names; `__metadata__` says {"format": "inhouse"}
    inhouse.json        {"format", "version", "tensors": {name: {"format", "shape", "parts", "columns"}},
                        "low_rank": {name: {"rank", "alone"}}, "manifest"}
    tokenizer, generation_config.json and whatever else the caller names

A plain float is the tensor NAME itself; a coded matrix is NAME.codes, NAME.scale .. (runtime.packed_stored); an order
of input columns is NAME.columns, U16 or U32; the side branch of X.weight is the matrices X.a.weight and X.b.weight.
Knows nothing of Programs or families; the reader is `stored_source`.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import CapacityError, ConflictError, FormatError, NotFoundError, UnavailableError, UsageError
from inhouse.core.tensors import TensorInfo
from inhouse.runtime.cores import core_name, outer_names, stack_of
from inhouse.runtime.form import Form, columns_dtype
from inhouse.runtime.packed import Packed
from inhouse.runtime.packed_stored import SHARED, STORED_VERSION, to_stored
from inhouse.store.safetensors import write_safetensors
from inhouse.store.store import check_inner_path
from inhouse.store.writing import TensorData, sync_folder

FORMAT = "inhouse"
TABLE = "inhouse.json"
WEIGHTS = "model.safetensors"
COLUMNS = "columns"  # the part with the order of input columns
QUANTIZATION: Mapping[str, Any] = {"quant_method": FORMAT, "version": STORED_VERSION}
RESERVED = ("config.json", TABLE, WEIGHTS)
_PLAIN_PARTS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_VECTORS = {"float32": "F32", "float16": "F16", "uint16": "BF16"}

Side = Path | bytes | str  # a file to copy, its contents, or its text
Vector = npt.NDArray[Any]  # float32, float16, or bf16 as uint16


@dataclass(frozen=True, slots=True)
class StoredModel:
    """What was written: `nbytes` of all tensors, and of each canonical matrix or vector its own and its format."""

    folder: Path
    nbytes: int
    sizes: Mapping[str, int]
    layouts: Mapping[str, str]


def side_branch(name: str) -> tuple[str, str]:
    """Names of a and b of the linear `X.weight`: X.a.weight, X.b.weight."""
    stem = name.removesuffix(".weight")
    return f"{stem}.a.weight", f"{stem}.b.weight"


def write_stored(
    folder: Path,
    config: Mapping[str, Any],
    forms: Iterable[tuple[str, Form]],
    vectors: Iterable[tuple[str, Vector]],
    manifest: Mapping[str, Any],
    side_files: Mapping[str, Side],
) -> StoredModel:
    """Writes a checkpoint: the folder appears whole, on disk to the last byte, or not at all.

    One matrix is held at a time; beside the folder, room for the tensors once more is needed while it is written.

    Args:
        folder: it must not exist.
        config: config.json; its quantization_config is replaced.
        forms: canonical name (`X.weight`) -> matrix. vectors: canonical name -> float32, float16 or bf16 (uint16) [n].
        manifest: anything that JSON holds, kept as it is.
        side_files: path inside the folder -> contents.

    Raises:
        ConflictError: the folder exists. UsageError: a name twice, a type that is not kept, a manifest that is no JSON.
        FormatError: a value that is not finite. CapacityError: the disk is full; nothing is left behind.
    """
    if folder.exists() or folder.is_symlink():
        raise ConflictError(f"{folder} exists", remedy="Name another place; nothing is overwritten.")
    if not folder.parent.is_dir():
        raise NotFoundError(f"there is no folder {folder.parent}", remedy="Make it first.")
    for name in side_files:
        check_inner_path(name)
        if name in RESERVED:
            raise UsageError(f"the file {name} is written anyway and cannot be brought", param=name)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        with _disk(folder):
            temporary.mkdir(mode=0o755)
            with open(temporary / "tensors.tmp", "xb") as file:
                spool = _Spool(file)
                for name, form in forms:
                    spool.form(name, form)
                for name, vector in vectors:
                    spool.vector(name, vector)
            spool.finish(temporary / "tensors.tmp", temporary / WEIGHTS)
            _write_side(temporary / TABLE, spool.document(manifest))
            _write_side(temporary / "config.json", _config(config))
            for name, side in side_files.items():
                _write_side(temporary / name, side)
            for inner in {path.parent for path in temporary.rglob("*")}:
                sync_folder(inner)
            os.rename(temporary, folder)
            sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    layouts = {name: str(entry["format"]) for name, entry in spool.table.items()}
    return StoredModel(folder, sum(spool.sizes.values()), spool.sizes, layouts)


@dataclass(slots=True)
class _Spool:
    """Tensors as they come, in a file of their own; the table of what they are."""

    file: BinaryIO
    sizes: dict[str, int] = field(default_factory=dict)
    table: dict[str, dict[str, Any]] = field(default_factory=dict)
    low_rank: dict[str, dict[str, Any]] = field(default_factory=dict)
    cores: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[str, tuple[TensorInfo, int]] = field(default_factory=dict)
    _outers: dict[str, str] = field(default_factory=dict)  # what a stack shares -> digest
    _reach: int = 0
    _shared: dict[str, str] = field(default_factory=dict)  # digest of a part that matrices share -> its tensor

    def form(self, name: str, form: Form) -> None:
        """A matrix and its side branch."""
        if not name.endswith(".weight"):
            raise UsageError(f"{name!r} is no name of a matrix: those end in .weight", param=name)
        a, b = side_branch(name)
        names = {"": name, "a": a, "b": b, **{f"core{at}": core_name(name, at) for at in range(len(form.train))}}
        if form.outer is not None:
            names["left"], names["right"] = outer_names(stack_of(name))
        for which, packed in form.matrices():
            if which not in ("left", "right") or not self._outer(names[which], packed):
                self._matrix(names[which], packed)
        if form.columns is not None:
            order = form.columns.astype(columns_dtype(form.columns.size))
            kind = "U16" if order.itemsize == 2 else "U32"
            self._part(name, COLUMNS, kind, order.shape, order)
            self.table[name]["columns"] = True
        if form.train:
            self.cores[name] = {
                "kind": "train",
                "tables": len(form.train),
                "widths": list(form.widths),
                "rows": form.rows,
            }
        if form.outer is not None:
            self.cores[name] = {"kind": "tucker", "stack": stack_of(name)}
        if form.low_rank is not None:
            self.low_rank[name] = {"rank": form.low_rank[0].shape[0], "alone": form.main is None}

    def _outer(self, name: str, packed: Packed) -> bool:
        """Whether another matrix of the stack brought the same left or right. Raises UsageError for another."""
        digest = hashlib.sha256(packed.data.tobytes()).hexdigest()
        if self._outers.setdefault(name, digest) != digest:
            raise UsageError(f"matrices of one stack bring different {name}", param=name)
        return name in self.table

    def vector(self, name: str, vector: Vector) -> None:
        """A vector or a bias."""
        kind = _VECTORS.get(vector.dtype.name)
        if kind is None or vector.ndim != 1:
            raise UsageError(
                f"{name!r} is a {vector.ndim}-dimensional {vector.dtype}, a float vector is kept", param=name
            )
        self._enter(name, kind.lower(), vector.shape, [""])
        self._part(name, "", kind, vector.shape, vector)

    def finish(self, spooled: Path, path: Path) -> None:
        """Puts the tensors in their order into the file that is kept; the one that they came into goes."""
        data = np.memmap(spooled, np.uint8, "r") if self._reach else np.zeros(0, np.uint8)
        tensors = [TensorData(info, _slice(data, at, info.nbytes)) for info, at in self.places.values()]
        write_safetensors(path, tensors, {"format": FORMAT, "version": str(STORED_VERSION)})
        spooled.unlink()

    def document(self, manifest: Mapping[str, Any]) -> str:
        """inhouse.json."""
        document = {
            "format": FORMAT, "version": STORED_VERSION, "tensors": self.table, "low_rank": self.low_rank,
            "cores": self.cores, "manifest": dict(manifest),
        }  # fmt: skip
        try:
            return json.dumps(document, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UsageError(f"the manifest is no JSON: {error}", param="manifest") from None

    def _matrix(self, name: str, packed: Packed) -> None:
        parts = to_stored(packed)
        plain = packed.format in _PLAIN_PARTS
        self._enter(name, packed.format, packed.shape, [""] if plain else list(parts))
        for part, (stored, array) in parts.items():
            if part != SHARED or not self._again(name, array):
                self._part(name, "" if plain else part, stored.dtype, stored.shape, array)

    def _again(self, name: str, array: Vector) -> bool:
        """Whether another matrix brought the same codebooks; the table then names theirs."""
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        first = self._shared.setdefault(digest, f"{name}.{SHARED}")
        if first != f"{name}.{SHARED}":
            self.table[name]["shared"] = first
            return True
        return False

    def _enter(self, name: str, kind: str, shape: tuple[int, ...], parts: list[str]) -> None:
        if not name or name in self.table or not name.isprintable():
            raise UsageError(f"the tensor name {name!r} is given twice, or is none", param=name)
        self.table[name] = {"format": kind, "shape": list(shape), "parts": parts}
        self.sizes[name] = 0

    def _part(self, name: str, part: str, dtype: str, shape: tuple[int, ...], array: Vector) -> None:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if part in ("", "scale", "minimum") and not _finite(raw, dtype):
            raise FormatError(f"{name!r} holds a value that is NaN or infinite; it is not stored", param=name)
        full = f"{name}.{part}" if part else name
        self.places[full] = TensorInfo(full, dtype, shape, raw.nbytes), self._reach
        self.file.write(raw.data)
        self._reach += raw.nbytes
        self.sizes[name] += raw.nbytes


def _slice(data: npt.NDArray[np.uint8], at: int, nbytes: int) -> Any:
    return lambda: data[at : at + nbytes]


def _finite(raw: npt.NDArray[np.uint8], dtype: str) -> bool:
    if dtype == "BF16":
        return not bool(((raw.view("<u2") & 0x7F80) == 0x7F80).any())
    if dtype in ("F32", "F16"):
        return bool(np.isfinite(raw.view("<f4" if dtype == "F32" else "<f2")).all())
    return True


def _config(config: Mapping[str, Any]) -> str:
    whole = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    try:
        return json.dumps(whole | {"quantization_config": dict(QUANTIZATION)}, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"config.json cannot be written: {error}", param="config") from None


def _write_side(path: Path, side: Side) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as file:
        if isinstance(side, Path):
            with open(side, "rb") as source:
                shutil.copyfileobj(source, file)
        else:
            file.write(side.encode() if isinstance(side, str) else side)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """What the disk says, in our own words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CapacityError(
                f"the disk of {folder.parent} is full; nothing was written",
                remedy="Free some space: the tensors need it twice while they are written.",
            ) from None
        raise UnavailableError(f"{folder} cannot be written: {error.strerror}") from None
