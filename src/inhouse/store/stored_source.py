"""The reader of our own checkpoints (`stored_model` says what they hold): their canonical weights, one tensor each.

Everything that the files say of sizes is checked when a checkpoint is opened, before any of it is read; contents are
checked when a matrix is. Knows nothing of Programs or families.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, NotFoundError, UnsupportedError, UsageError
from inhouse.core.tensors import TensorInfo
from inhouse.runtime.cores import MAX_TABLES, core_name, outer_names, stack_of, train_ranks
from inhouse.runtime.form import Form, columns_dtype
from inhouse.runtime.packed import FORMATS, Packed, pack_float
from inhouse.runtime.packed_stored import SHARED, STORED_VERSION, StoredPart, check_stored_parts, from_stored
from inhouse.store.mapping import MappedSource
from inhouse.store.mapping import Mapping as FileMapping
from inhouse.store.stored_model import COLUMNS, FORMAT, TABLE, side_branch
from inhouse.store.strict_json import read_json
from inhouse.store.values import check_finite

MAX_SIDE = 1 << 24  # rows or columns of a matrix; ten times what the largest published model has
_FLOATS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_KEYS = {"format", "shape", "parts", "columns", "shared"}


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the table. `parts`: part -> tensor of the file."""

    format: str
    shape: tuple[int, ...]
    parts: Mapping[str, TensorInfo]
    columns: TensorInfo | None

    @property
    def is_plain(self) -> bool:
        """Whether it is one tensor of plain floats."""
        return self.format in _FLOATS

    @property
    def nbytes(self) -> int:
        """Bytes of all of its parts."""
        return sum(info.nbytes for info in self.parts.values()) + (self.columns.nbytes if self.columns else 0)


def is_stored(source: MappedSource) -> bool:
    """Whether an open safetensors file says that it is one of ours."""
    return source.format == "safetensors" and source.metadata.get("format") == FORMAT


def open_stored(base: MappedSource, folder: Path) -> "StoredSource":
    """A checkpoint of ours, `base` being its open model.safetensors; closed after an error.

    Raises FormatError where table and tensors do not fit each other, UnsupportedError for a later version or an
    unknown format, NotFoundError without inhouse.json.
    """
    try:
        document = read_json(folder / TABLE)
        if document.get("format") != FORMAT or type(document.get("version")) is not int:
            raise FormatError(f"{TABLE} does not say that it is of the format {FORMAT!r}")
        if document["version"] > STORED_VERSION:
            raise UnsupportedError(
                f"{TABLE} is of version {document['version']}, read are up to {STORED_VERSION}",
                remedy="Use a later version of inhouse.",
            )
        return StoredSource(base, document)
    except BaseException:
        base.close()
        raise


@dataclass(frozen=True, slots=True)
class Train:
    """A table that is stored as a tensor train: the tables' shapes, widths, and rows of the whole."""

    tables: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    rows: int


class StoredSource:
    """Implements core.tensors.TensorSource: canonical weights, those of side branches among them.

    Attributes: `manifest` (a mapping), `ranks` (weight with a side branch -> rank), `alone` (weights that are a side
    branch and nothing else: they have no tensor of their own).
    """

    def __init__(self, base: MappedSource, document: Mapping[str, Any]) -> None:
        self._base = base
        keys = ("tensors", "low_rank", "manifest", "cores")
        tensors, low_rank, manifest, cores = (document.get(key, {}) for key in keys)
        if not all(isinstance(part, dict) for part in (tensors, low_rank, manifest, cores)):
            raise FormatError(f"{TABLE}: {', '.join(keys)} must be objects")
        self.manifest: Mapping[str, Any] = manifest
        self._entries = {name: _entry(base, name, fields) for name, fields in tensors.items()}
        self._check_whole()
        self.ranks = {name: self._rank(name, fields) for name, fields in low_rank.items()}
        self.alone = frozenset(name for name in self.ranks if name not in self._entries)
        self.trains: dict[str, Train] = {}
        self.stacks: dict[str, tuple[int, int]] = {}
        for name, fields in cores.items():
            self._cores(name, fields)

    @property
    def format(self) -> str:
        """`inhouse`."""
        return FORMAT

    @property
    def hints(self) -> set[str]:
        """What a family may know of the tensors while it reads config.json: that there is a head of its own, and a bias
        of the head, under the names that Hugging Face has for them."""
        names = set(self._entries) | self.alone | set(self.trains)
        heads = {"lm_head.weight"} if "head.weight" in names else set()
        return names | heads | ({"final_logits_bias"} if "head.bias" in names else set())

    @property
    def metadata(self) -> Mapping[str, Any]:
        """See TensorSource."""
        return self._base.metadata

    @property
    def mappings(self) -> Sequence[FileMapping]:
        """The files behind the tensors."""
        return self._base.mappings

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def info(self, name: str) -> TensorInfo:
        """See TensorSource; dtype is the packed format in upper case, nbytes are those of all parts."""
        entry = self._entry(name)
        return TensorInfo(name, entry.format.upper(), entry.shape, entry.nbytes)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """See TensorSource; a coded matrix has no bytes of its own (UsageError)."""
        entry = self._entry(name)
        if not entry.is_plain:
            raise UsageError(f"tensor {name!r} is {entry.format}: it is read by `packed`", param=name)
        return self._base.raw(entry.parts[""].name)

    def close(self) -> None:
        """See TensorSource."""
        self._base.close()

    def coded(self, name: str) -> str:
        """The packed format of a coded matrix; "" of plain floats."""
        entry = self._entry(name)
        return "" if entry.is_plain else entry.format

    def packed(self, name: str) -> Packed:
        """A matrix in its own format. Raises FormatError for contents that the format does not allow."""
        entry = self._entry(name)
        shape = _matrix_shape(name, entry.shape)
        if entry.is_plain:
            dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry.parts[""].dtype]
            return pack_float(np.frombuffer(self.raw(name).tobytes(), dtype).reshape(shape), entry.format)
        parts = {
            part: (StoredPart(info.dtype, info.shape), self._base.raw(info.name)) for part, info in entry.parts.items()
        }
        try:
            return from_stored(entry.format, shape, parts)
        except FormatError as error:
            raise FormatError(f"tensor {name!r}: {error.message}", remedy=error.remedy, param=name) from None

    def columns(self, name: str) -> npt.NDArray[np.int64] | None:
        """int64 [in]: packed column j is input columns[j]; None where they are in order. Raises FormatError unless each
        input is named once."""
        entry = self._entry(name)
        if entry.columns is None:
            return None
        raw = np.frombuffer(self._base.raw(entry.columns.name).tobytes(), columns_dtype(entry.shape[1]))
        order = raw.astype(np.int64)
        if not np.array_equal(np.sort(order), np.arange(entry.shape[1])):
            raise FormatError(f"the order of the columns of {name!r} is no order of {entry.shape[1]}", param=name)
        return order

    def form(self, name: str) -> Form:
        """The matrix `X.weight` with its side branch."""
        if name in self.trains:
            train = self.trains[name]
            tables = tuple(self.packed(core_name(name, at)) for at in range(len(train.tables)))
            return Form(None, train=tables, widths=train.widths, rows=train.rows)
        if stack_of(name) in self.stacks:
            left, right = outer_names(stack_of(name))
            return Form(self.packed(name), outer=(self.packed(left), self.packed(right)))
        a, b = side_branch(name)
        low_rank = (self.packed(a), self.packed(b)) if name in self.ranks else None
        if name in self.alone:
            return Form(None, low_rank)
        return Form(self.packed(name), low_rank, self.columns(name))

    def check(self, name: str) -> None:
        """Refuses values that are not finite, codes that mean none, orders that are none."""
        entry = self._entry(name)
        if entry.is_plain:
            check_finite(self._base, entry.parts[""].name)
        else:
            self.packed(name)
        self.columns(name)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise NotFoundError(f"the checkpoint has no tensor {name!r}", param=name)
        return self._entries[name]

    def _check_whole(self) -> None:
        """Each tensor of the file belongs to one row of the table."""
        used: set[str] = set()
        for name, entry in self._entries.items():
            infos = [*entry.parts.values(), *((entry.columns,) if entry.columns else ())]
            for info in infos:
                if info.name in used and not info.name.endswith(f".{SHARED}"):
                    raise FormatError(f"{TABLE} uses the tensor {info.name!r} twice", param=name)
                used.add(info.name)
        left = [name for name in self._base if name not in used]
        if left:
            raise FormatError(f"{len(left)} tensors are not in {TABLE}: {', '.join(sorted(left)[:5])}", param=left[0])

    def _cores(self, name: str, fields: Any) -> None:
        """A train, or one matrix of a stack, checked against the tensors that it takes."""
        kind = fields.get("kind") if isinstance(fields, dict) else None
        if kind == "train" and set(fields) == {"kind", "tables", "widths", "rows"}:
            self.trains[name] = self._train(name, fields)
        elif kind == "tucker" and set(fields) == {"kind", "stack"} and fields["stack"] == stack_of(name) != "":
            self.stacks[stack_of(name)] = self._stack(name, stack_of(name))
        else:
            raise FormatError(f"{TABLE}: the cores of {name[:80]!r} are neither a train nor of a stack", param=name)

    def _train(self, name: str, fields: Mapping[str, Any]) -> "Train":
        count, widths, rows = fields["tables"], fields["widths"], fields["rows"]
        numbers = [count, rows, *widths] if isinstance(widths, list) else [None]
        if not all(type(n) is int and 1 <= n <= MAX_SIDE for n in numbers) or count > MAX_TABLES:
            raise FormatError(f"{TABLE}: the train of {name!r} is not tables, widths and rows", param=name)
        shapes = [_matrix_shape(name, self._entry(core_name(name, at)).shape) for at in range(count)]
        try:
            train_ranks(shapes, widths, rows)
        except UsageError as error:
            raise FormatError(f"the train of {name!r}: {error.message}", param=name) from None
        return Train(tuple(shapes), tuple(widths), rows)

    def _stack(self, name: str, stack: str) -> tuple[int, int]:
        core, (left, right) = self._entry(name).shape, (self._entry(n).shape for n in outer_names(stack))
        fits = len(core) == len(left) == len(right) == 2 and (left[1], right[0]) == core
        if not fits or self.stacks.get(stack, core) != core:
            raise FormatError(f"the core {list(core)} of {name!r} does not fit its stack", param=name)
        return core[0], core[1]

    def _rank(self, name: str, fields: Any) -> int:
        a, b = side_branch(name)
        if not isinstance(fields, dict) or set(fields) != {"rank", "alone"} or type(fields["rank"]) is not int:
            raise FormatError(f"{TABLE}: the side branch of {name!r} is not rank and alone", param=name)
        if type(fields["alone"]) is not bool or fields["alone"] == (name in self._entries):
            raise FormatError(f"{TABLE}: {name!r} is its side branch alone, or it is not", param=name)
        if not name.endswith(".weight") or a not in self._entries or b not in self._entries:
            raise FormatError(f"the side branch of {name!r} is missing", param=name)
        first, second, rank = self._entries[a].shape, self._entries[b].shape, fields["rank"]
        main = self._entries[name].shape if name in self._entries else (*second[:1], *first[1:])
        fits = len(first) == len(second) == 2 and first[0] == second[1] == rank and main == (second[0], first[1])
        if not fits:
            raise FormatError(
                f"the side branch of {name!r} is {list(second)} by {list(first)} beside {list(main)}", param=name
            )
        return rank


def _entry(base: MappedSource, name: str, fields: Any) -> Entry:
    """One row of the table, checked against the tensors that it names."""
    if not isinstance(fields, dict) or not {"format", "shape", "parts"} <= set(fields) <= _KEYS:
        raise FormatError(f"{TABLE}: the entry of {name[:80]!r} is not format, shape, parts", param=name)
    kind, shape, parts = fields["format"], fields["shape"], fields["parts"]
    if not isinstance(kind, str) or not isinstance(shape, list) or not isinstance(parts, list):
        raise FormatError(f"{TABLE}: the entry of {name!r} is not a format, a list, a list", param=name)
    if not (1 <= len(shape) <= 2 and all(type(n) is int and 1 <= n <= MAX_SIDE for n in shape)):
        raise FormatError(f"{TABLE}: the shape of {name!r} is not one or two sizes up to {MAX_SIDE}", param=name)
    if not all(isinstance(part, str) for part in parts) or len(set(parts)) != len(parts):
        raise FormatError(f"{TABLE}: the parts of {name!r} are not names", param=name)
    if "shared" in fields and SHARED not in parts:
        raise FormatError(f"{TABLE}: {name!r} has no codebooks to share", param=name)
    if kind not in FORMATS:
        raise UnsupportedError(f"{TABLE}: {name!r} is of the unknown format {kind[:40]!r}", param=name)
    infos = {part: _tensor(base, name, part, fields.get("shared") if part == SHARED else None) for part in parts}
    if kind in _FLOATS:
        found = {part: (info.dtype, info.shape) for part, info in infos.items()}
        if found != {"": (_FLOATS[kind], tuple(shape))}:
            raise FormatError(f"{name!r} is not one tensor of {kind} {shape}", param=name)
    else:
        stored = {part: StoredPart(info.dtype, info.shape) for part, info in infos.items()}
        try:
            check_stored_parts(kind, _matrix_shape(name, tuple(shape)), stored)
        except FormatError as error:
            raise FormatError(f"tensor {name!r}: {error.message}", param=name) from None
    return Entry(kind, tuple(shape), infos, _columns(base, name, fields, tuple(shape)))


def _tensor(base: MappedSource, name: str, part: str, shared: Any = None) -> TensorInfo:
    full = f"{name}.{part}" if part else name
    if shared is not None:
        if not isinstance(shared, str) or not shared.endswith(f".{SHARED}"):
            raise FormatError(f"{TABLE}: {name!r} shares what is no codebook", param=name)
        full = shared
    if full not in base:
        raise FormatError(f"the file lacks {full!r}, which {TABLE} names", param=name)
    return base.info(full)


def _columns(base: MappedSource, name: str, fields: Mapping[str, Any], shape: tuple[int, ...]) -> TensorInfo | None:
    said = fields.get("columns", False)
    if type(said) is not bool:
        raise FormatError(f"{TABLE}: columns of {name!r} is not true or false", param=name)
    if not said:
        return None
    info = _tensor(base, name, COLUMNS)
    kind = "U16" if columns_dtype(_matrix_shape(name, shape)[1]).itemsize == 2 else "U32"
    if (info.dtype, info.shape) != (kind, shape[1:]):
        raise FormatError(f"the order of the columns of {name!r} is {info.dtype} {list(info.shape)}", param=name)
    return info


def _matrix_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        raise FormatError(f"{name!r} is no matrix: its shape is {list(shape)}", param=name)
    return shape[0], shape[1]
