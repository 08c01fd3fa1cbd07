"""One canonical weight out of one tensor of a file: rows taken, put in order, packed.

Knows how a Derive and a file type become a packed format; does not know which weights a model has, nor caches.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.core.tensors import CodedSource, Coding, TensorInfo, TensorSource
from inhouse.load.packing_coded import coded_format, pack_coded
from inhouse.model.families.family import Derive
from inhouse.model.moe import FLOAT_WEIGHTS
from inhouse.runtime.executor import Weight
from inhouse.runtime.packed import QUANTIZED_FORMAT, Packed, gguf_format, gguf_types, pack_float, pack_gguf, quantize
from inhouse.runtime.program import WeightSpec
from inhouse.store.source import materialise
from inhouse.store.stored_source import StoredSource

QUANTIZE = tuple(QUANTIZED_FORMAT)  # what float matrices can be packed as, by wish
# File type -> (packed format, numpy type of its elements; bf16 as bit patterns).
PLAIN: dict[str, tuple[str, npt.DTypeLike]] = {
    "F32": ("f32", np.dtype("<f4")),
    "F16": ("f16", np.dtype("<f2")),
    "BF16": ("bf16", np.dtype("<u2")),
}
RUN_ELEMENTS = 1 << 21  # elements of a run of rows while quantising: 8 MiB of f32


@dataclass(frozen=True, slots=True)
class Part:
    """What one canonical weight will be: decided before a byte is read."""

    spec: WeightSpec
    derive: Derive
    info: TensorInfo
    format: str  # a key of FORMATS; "vector" for vectors
    quantize: str = ""  # "" | "q8" | "q6" | "q4"
    coding: Coding | None = None  # of a quantised linear of a CodedSource
    stored: bool = False  # a matrix that the checkpoint keeps in this very format


def plan_part(
    spec: WeightSpec, derive: Derive, info: TensorInfo, wish: str, coding: Coding | None = None, stored: str = ""
) -> Part:
    """Decides the format of one weight; `wish` is "", "q8", "q6" or "q4", `coding` that of a quantised linear, which is
    [out, in] whatever way the float tensor of its family lies; `stored`: the packed format that a checkpoint of our own
    keeps it in.

    Raises FormatError where the file's shape is not what the family says, UnsupportedError for a file type that has
    no packed form.
    """
    turned = coding is not None and derive.transpose and derive.part is None
    expected = derive.source_shape[::-1] if turned else derive.source_shape
    if info.shape != expected or derive.shape != spec.shape:
        raise FormatError(
            f"tensor {info.name!r} has the shape {list(info.shape)}, {list(expected)} was expected for {spec.name}",
            remedy="The weights do not belong to this config; fetch the model again.",
            param=info.name,
        )
    if spec.kind == "vector":
        if info.dtype not in (*PLAIN, "F64"):
            raise UnsupportedError(f"tensor {info.name!r} is {info.dtype}, a vector must be a float", param=info.name)
        return Part(spec, derive, info, "vector")
    if stored:
        if spec.kind == "table" or derive.transpose:
            what = "a table that stays floats" if spec.kind == "table" else "read transposed"
            raise UnsupportedError(f"tensor {info.name!r} is {stored} and is {what}", param=info.name)
        return Part(spec, derive, info, stored, stored=True)
    if coding is not None:
        if turned:
            derive = replace(derive, transpose=False, source_shape=expected)
        return Part(spec, derive, info, coded_format(coding, spec.shape[1]), coding=coding)
    if info.dtype in PLAIN:
        kind = wish_for(spec, wish) if wish else ""
        if kind:
            return Part(spec, derive, info, QUANTIZED_FORMAT[kind], kind)
        return Part(spec, derive, info, PLAIN[info.dtype][0])
    if info.dtype not in gguf_types():
        raise UnsupportedError(
            f"tensor {info.name!r} is {info.dtype}, which has no packed form",
            remedy=f"Convert it to one of {', '.join(gguf_types())}.",
            param=info.name,
        )
    if derive.unit_rows or (derive.transpose and not derive.heads):
        done = "normalised" if derive.unit_rows else "transposed"
        raise UnsupportedError(f"tensor {info.name!r} is {info.dtype} and would have to be {done}", param=info.name)
    if derive.transpose:  # a small part of a model, and codes have no transpose: its very values, as floats
        return Part(spec, derive, info, "f32")
    return Part(spec, derive, info, gguf_format(info.dtype))


def wish_for(spec: WeightSpec, wish: str) -> str:
    """What `--quantize` makes of a weight: embeddings and the head keep 6 bits where the rest gets 4, because every
    token passes through them and they lose most (docs/benchmarks.md has the divergences); "" for tables, and for what
    chooses experts, which stay floats."""
    if spec.kind == "table" or spec.name.endswith(FLOAT_WEIGHTS):
        return ""
    head = spec.kind == "embedding" or spec.name == "head.weight"
    return "q6" if wish == "q4" and head else wish


def make_weight(part: Part, source: TensorSource) -> Weight:
    """The weight itself; reads the tensor. Raises FormatError (a value that the format cannot hold)."""
    if part.format == "vector":
        return _vector(part, source)
    if part.quantize:
        runs = _float_runs(part, source)
        shape = (part.spec.shape[0], part.spec.shape[1])
        return quantize(runs, part.quantize, shape=shape)  # type: ignore[arg-type]
    derive = part.derive
    if part.stored:
        assert isinstance(source, StoredSource)
        return source.packed(part.info.name)
    if part.coding is not None:
        assert isinstance(source, CodedSource)
        index = derive.index()
        every = np.arange(math.prod(part.info.shape[:-1]), dtype=np.int64) if index is None else index
        return pack_coded(source, part.info.name, part.format, every, (part.spec.shape[0], part.spec.shape[1]))
    if part.info.dtype in PLAIN:
        return pack_float(_taken(part, source), part.format)
    shape = (math.prod(part.info.shape[:-1]), part.info.shape[-1])
    if derive.transpose:
        whole = pack_gguf(source.raw(part.info.name), part.info.dtype, shape, None)
        return pack_float(derive.take(whole.dequantize()), part.format)
    return pack_gguf(source.raw(part.info.name), part.info.dtype, shape, derive.index())


def _vector(part: Part, source: TensorSource) -> npt.NDArray[np.float32]:
    if part.info.dtype not in PLAIN:
        return np.ascontiguousarray(part.derive.take(materialise(source, part.info.name)), np.float32)
    values = part.derive.take(_plain(part, source))  # what is taken may be one expert's of many: only that is widened
    return _widened(values, part.info.dtype)


def _plain(part: Part, source: TensorSource) -> npt.NDArray[Any]:
    return source.raw(part.info.name).view(PLAIN[part.info.dtype][1]).reshape(part.info.shape)


def _taken(part: Part, source: TensorSource) -> npt.NDArray[Any]:
    """The canonical matrix in the file's own type, bf16 as bit patterns."""
    rows = part.derive.take(_plain(part, source))
    if not part.derive.unit_rows:
        return rows
    wide = _widened(rows, part.info.dtype)
    wide = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.float32(1e-12))
    if part.info.dtype == "BF16":
        bits = wide.view(np.uint32)
        wide = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # half to even
    return np.asarray(wide.astype(rows.dtype))


def _widened(rows: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    wide: npt.NDArray[np.float32] = rows.astype(np.float32)
    if dtype == "BF16":
        wide = (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide


def _float_runs(part: Part, source: TensorSource) -> Iterator[npt.NDArray[np.float32]]:
    """The canonical rows as float32, in runs of bounded size."""
    rows = _taken(part, source)
    step = max(1, RUN_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield _widened(rows[start : start + step], part.info.dtype)


def floats(part: Part, source: TensorSource, ids: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float32]:
    """The weight as float32 of its canonical shape, or of its rows `ids`, its own copy: the very values that
    `make_weight` would decode to, in the packed order of the columns. Raises FormatError as `make_weight` does."""
    if part.format == "vector" or part.info.dtype not in PLAIN or part.coding is not None:
        weight = make_weight(part, source)
        if isinstance(weight, Packed):
            return weight.dequantize() if ids is None else weight.rows(ids)
        return np.array(weight if ids is None else weight[ids], np.float32)
    rows = _taken(part, source)
    if ids is not None:
        rows = rows[ids]
    out = np.empty(rows.shape, np.float32)
    step = max(1, RUN_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        out[start : start + step] = _widened(rows[start : start + step], part.info.dtype)
    return out


def nbytes(weight: Weight) -> int:
    """Bytes that a weight takes in memory."""
    return weight.data.nbytes if isinstance(weight, Packed) else weight.nbytes
