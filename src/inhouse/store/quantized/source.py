"""A quantised checkpoint as one tensor a linear: the parts (codes, scales, zero points) are hidden behind its name.

Knows how to show them; each scheme's bit positions are in a file of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, NotFoundError, UsageError
from inhouse.core.tensors import CodedRows, Coding, TensorInfo, TensorSource
from inhouse.store.mapping import MappedSource
from inhouse.store.mapping import Mapping as FileMapping
from inhouse.store.values import check_finite

Index = npt.NDArray[np.int64]
_FLOATS = ("F16", "BF16", "F32")


class CodedLinear(Protocol):
    """One quantised matrix."""

    @property
    def label(self) -> str:
        """Scheme and bits for messages, upper case: `GPTQ-4`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in], or [experts, out, in] where one tensor has the matrices of all experts."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors of the file that it is made of."""

    def coding(self) -> Coding:
        """See CodedSource.coding."""

    def rows(self, index: Index) -> CodedRows:
        """See CodedSource.coded_rows."""

    def columns(self) -> Index | None:
        """See CodedSource.columns."""


class QuantizedSource:
    """Implements core.tensors.CodedSource over another source.

    Args:
        base: the tensors of the file.
        linears: logical name (`...weight`) -> what it is made of.
        unused: tensors of the file that carry nothing of use (say so in `notes` where that matters).
        notes: what the reader leaves out of account.

    Raises FormatError where a logical name is a plain tensor of the file, too.
    """

    def __init__(
        self,
        base: TensorSource,
        linears: Mapping[str, CodedLinear],
        unused: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self._base, self._linears, self._notes = base, dict(linears), tuple(notes)
        parts = {part: name for name, linear in linears.items() for part in linear.parts}
        for name in linears:
            if name in base and parts.get(name) != name:
                raise FormatError(f"the checkpoint has {name!r} twice: quantised, and as a plain tensor", param=name)
        hidden = set(unused)
        shown = [parts.get(name, name) for name in base if name not in hidden]
        self._names = tuple(dict.fromkeys(shown))
        self._infos = {name: self._info(name, linear) for name, linear in linears.items()}

    def _info(self, name: str, linear: CodedLinear) -> TensorInfo:
        nbytes = sum(self._base.info(part).nbytes for part in linear.parts)
        return TensorInfo(name, linear.label, linear.shape, nbytes)

    @property
    def format(self) -> str:
        """The container's: `safetensors` or `torch`."""
        return self._base.format

    @property
    def metadata(self) -> Mapping[str, Any]:
        """See TensorSource."""
        return self._base.metadata

    @property
    def mappings(self) -> Sequence[FileMapping]:
        """The files behind the tensors."""
        return self._base.mappings if isinstance(self._base, MappedSource) else ()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._infos or (name in self._base and name in self._names)

    def __len__(self) -> int:
        return len(self._names)

    def info(self, name: str) -> TensorInfo:
        """See TensorSource; a quantised linear's dtype names scheme and bits, its nbytes are those of all parts."""
        if name in self._infos:
            return self._infos[name]
        if name not in self:
            raise NotFoundError(f"the checkpoint has no tensor {name!r}", param=name)
        return self._base.info(name)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """See TensorSource; a quantised linear has no bytes of its own (UsageError)."""
        if name in self._infos:
            raise UsageError(f"tensor {name!r} is {self._infos[name].dtype}: it is read by rows", param=name)
        return self._base.raw(name)

    def close(self) -> None:
        """See TensorSource."""
        self._base.close()

    def coding(self, name: str) -> Coding | None:
        """See CodedSource."""
        return self._linears[name].coding() if name in self._linears else None

    def coded_rows(self, name: str, rows: Index) -> CodedRows:
        """See CodedSource."""
        return self._linears[name].rows(rows)

    def columns(self, name: str) -> Index | None:
        """See CodedSource."""
        return self._linears[name].columns() if name in self._linears else None

    def notes(self) -> tuple[str, ...]:
        """See CodedSource."""
        return self._notes

    def check(self, name: str) -> None:
        """Refuses NaN and infinity in a quantised linear's scales and codes."""
        for part in self._linears[name].parts:
            check_finite(self._base, part)


class Part:
    """Access to the parts of one module, with the checks that every scheme needs."""

    def __init__(self, source: TensorSource, prefix: str) -> None:
        self.source, self.prefix = source, prefix

    def name(self, suffix: str) -> str:
        return f"{self.prefix}.{suffix}"

    def has(self, suffix: str) -> bool:
        return self.name(suffix) in self.source

    def info(self, suffix: str, dtypes: Sequence[str], rank: int | None = None) -> TensorInfo:
        """Raises FormatError where the tensor is missing, of another type or rank."""
        name = self.name(suffix)
        if name not in self.source:
            raise FormatError(f"the quantised module {self.prefix} has no {suffix}", param=name)
        info = self.source.info(name)
        if info.dtype not in dtypes or (rank is not None and len(info.shape) != rank):
            wanted = f"{' or '.join(dtypes)}{'' if rank is None else f' with {rank} axes'}"
            raise FormatError(f"tensor {name!r} is {info.dtype} {list(info.shape)}, expected {wanted}", param=name)
        return info

    def scale_type(self, suffix: str, rank: int | None = None) -> str:
        """The type of a float part."""
        return self.info(suffix, _FLOATS, rank).dtype

    def array(self, suffix: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A view of the part's bytes in its own shape."""
        name = self.name(suffix)
        return self.source.raw(name).view(dtype).reshape(self.source.info(name).shape)

    def words(self, suffix: str) -> npt.NDArray[np.uint32]:
        return self.array(suffix, "<u4")

    def floats(self, suffix: str) -> npt.NDArray[Any]:
        """A view of a float part; bf16 as its bit patterns (`widen` makes numbers of a piece of it)."""
        dtype = self.source.info(self.name(suffix)).dtype
        return self.array(suffix, {"F16": "<f2", "BF16": "<u2", "F32": "<f4"}[dtype])

    def fault(self, what: str) -> FormatError:
        return FormatError(f"the quantised module {self.prefix}: {what}", param=self.prefix)


def widen(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """f16, bf16 bit patterns (uint16) or f32 as contiguous f32, exactly."""
    if values.dtype == np.uint16:
        return np.ascontiguousarray(values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.ascontiguousarray(values, np.float32)


def column_order(groups: npt.NDArray[np.int32], group: int, count: int, part: Part) -> Index | None:
    """The order of columns that puts groups one behind another; None where they are so already.

    Args:
        groups: [in], the group of each input (`g_idx`).
        group: inputs of a group. count: groups there are.

    Raises FormatError for a group that does not exist, or groups of unequal size.
    """
    if groups.size and not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise part.fault(f"g_idx goes from {groups.min()} to {groups.max()}, there are {count} groups")
    wanted = np.arange(groups.size) // group
    if np.array_equal(groups, wanted):
        return None
    order = np.argsort(groups, kind="stable")
    if not np.array_equal(groups[order], wanted):
        raise part.fault(f"g_idx does not give every group {group} inputs")
    return order.astype(np.int64)
