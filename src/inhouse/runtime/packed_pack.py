"""Writing the packed layout: from floats and from codes. The numpy here is the definition; it is also fast enough.

Knows where bytes go (packed_layout), nothing of GGUF (packed_gguf) or of choosing codes (packed_quantize).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, UsageError
from inhouse.runtime.packed_layout import (
    BLOCK,
    CHUNK_ELEMENTS,
    F32,
    I8,
    TILE_ROWS,
    U8,
    Format,
    Layout,
    Packed,
    aligned_empty,
    format_of,
    gather_plane,
    layout,
    packed_nbytes,
    widen_bf16,
)

Array = npt.NDArray[Any]


class CodeRows(NamedTuple):
    """Some rows of a code matrix, ready to be packed."""

    codes: U8  # [n, in] unsigned, zero point included
    scales: Array  # [n, groups or supers], exactly representable in the format's scale dtype
    minimums: Array | None = None  # the same; dmin of a two-level format
    sub_scales: I8 | U8 | None = None  # [n, groups]; e4m3 bytes where the format has them
    sub_minimums: I8 | None = None
    zeros: I8 | None = None  # [n, groups], the format's own zero taken off


class Packer:
    """Fills a packed matrix run by run of rows; each run but the last is whole tiles."""

    def __init__(self, name: str, shape: tuple[int, int]) -> None:
        self.format: Format = format_of(name)
        if self.format.coding:
            raise UsageError(f"format {name} is made of a packed matrix (packed_sparse), not of rows")
        self.shape = shape
        self.layout: Layout = layout(self.format, shape[1])
        self.data = aligned_empty(packed_nbytes(name, shape))
        self.rows = 0
        self._tiles = self.data.reshape(-1, self.layout.tile_bytes)

    def add(self, rows: CodeRows) -> None:
        """Packs the next rows; raises UsageError unless the runs before it were whole tiles."""
        fmt, plan = self.format, self.layout
        first, count = self._take(rows.codes.shape)
        n = -(-count // TILE_ROWS) * TILE_ROWS
        codes = np.ascontiguousarray(rows.codes)
        if codes.shape != (n, plan.width):
            zero = 0 if fmt.table else fmt.zero
            codes = np.full((n, plan.width), zero, np.uint8)  # a padded input then adds exactly 0
            codes[:count, : self.shape[1]] = rows.codes
        # [tiles, 16, blocks, 8 quads] of 4 inputs each -> [tiles, blocks, 8, 16]
        quads = codes.view(np.uint32).reshape(-1, TILE_ROWS, plan.width // BLOCK, 8).transpose(0, 2, 3, 1)
        quads8 = np.ascontiguousarray(quads).view(np.uint8)
        low = quads8 if fmt.low == 8 else gather_plane(quads8 & np.uint8((1 << fmt.low) - 1), fmt.low)
        self._write(first, "low", low)
        if fmt.high:
            self._write(first, "high", gather_plane(quads8 >> np.uint8(fmt.low), fmt.high))
        dtype = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "e8m0": np.uint8}[fmt.scale]
        self._lanes(first, "scale", narrow_bf16(rows.scales) if fmt.scale == "bf16" else rows.scales, dtype)
        if fmt.zeros:
            self._lanes(first, "zeros", rows.zeros, np.int8)
        if fmt.minimum:
            self._lanes(first, "minimum", rows.minimums, dtype)
        if fmt.two_level:
            self._lanes(first, "sub_scale", rows.sub_scales, np.uint8 if fmt.float_subs else np.int8)
            if fmt.minimum:
                self._lanes(first, "sub_minimum", rows.sub_minimums, np.int8)

    def next_tiles(self, count: int) -> U8:
        """The bytes of the tiles of the next `count` rows, for a caller who fills them and then says so."""
        first = self.rows // TILE_ROWS
        return self._tiles[first : first + -(-count // TILE_ROWS)].reshape(-1)

    def filled(self, count: int) -> None:
        """The next `count` rows have been written into `next_tiles(count)`."""
        self._take((count, self.shape[1]))

    def add_floats(self, rows: Array) -> None:
        """Packs the next rows of a float format, given in that dtype (bf16 as uint16)."""
        first, _ = self._take(rows.shape)
        self._lanes(first, "weights", rows, rows.dtype)

    def finish(self) -> Packed:
        """The matrix; raises UsageError if rows are missing."""
        if self.rows != self.shape[0]:
            raise UsageError(f"a matrix of {self.shape[0]} rows was given {self.rows}")
        return Packed(self.format.name, self.shape, self.data)

    def _take(self, shape: tuple[int, ...]) -> tuple[int, int]:
        if self.rows % TILE_ROWS or self.rows + shape[0] > self.shape[0] or shape[1] != self.shape[1]:
            raise UsageError(f"rows {shape} do not follow row {self.rows} of a matrix {self.shape}")
        first = self.rows // TILE_ROWS
        self.rows += shape[0]
        return first, shape[0]

    def _write(self, first: int, name: str, values: Array) -> None:
        """Writes [tiles, ...] into a section of the tiles from `first` on, and zeros into its padding."""
        section = self.layout.sections[name]
        flat = values.reshape(values.shape[0], -1).view(np.uint8)
        end = min((s.offset for s in self.layout.sections.values() if s.offset > section.offset), default=None)
        target = self._tiles[first : first + len(flat), section.offset : end]
        target[:, : section.nbytes] = flat
        target[:, section.nbytes :] = 0

    def _lanes(self, first: int, name: str, rows: Array | None, dtype: npt.DTypeLike) -> None:
        """Writes parameters [n, count] as [tiles, count][16], rows that do not exist as zeros."""
        if rows is None:
            raise UsageError(f"format {self.format.name} needs {name}")
        n = -(-len(rows) // TILE_ROWS) * TILE_ROWS
        padded = np.zeros((n, rows.shape[1]), dtype)
        padded[: len(rows)] = rows
        lanes = padded.reshape(-1, TILE_ROWS, rows.shape[1]).transpose(0, 2, 1)
        self._write(first, name, np.ascontiguousarray(lanes))


def runs(shape: tuple[int, int]) -> range:
    """Starts of runs of whole tiles, of about CHUNK_ELEMENTS elements; `range.step` is the length."""
    step = max(1, CHUNK_ELEMENTS // max(shape[1], 1) // TILE_ROWS) * TILE_ROWS
    return range(0, shape[0], step)


def pack_float(array: Array, name: str) -> Packed:
    """Packs floats [out, in] (float32, float16, or bf16 as uint16) as `f32`, `f16` or `bf16`.

    Narrowing rounds to nearest, ties to even. Raises UsageError for another dtype or format, FormatError for a
    finite value that f16 cannot hold.
    """
    fmt = format_of(name)
    if fmt.low or array.ndim != 2 or array.dtype not in (np.float32, np.float16, np.uint16):
        raise UsageError(f"cannot pack a {array.ndim}-dimensional {array.dtype} array as {name}")
    packer = Packer(name, (array.shape[0], array.shape[1]))
    span = runs(packer.shape)
    for start in span:
        packer.add_floats(_convert(array[start : start + span.step], name))
    return packer.finish()


def _convert(rows: Array, name: str) -> Array:
    source = {"float32": "f32", "float16": "f16", "uint16": "bf16"}[rows.dtype.name]
    if source == name:
        return rows
    wide: F32 = widen_bf16(rows) if source == "bf16" else rows.astype(np.float32)
    if name == "f32":
        return wide
    if name == "bf16":
        return narrow_bf16(wide)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    if np.any(np.isinf(narrow) & np.isfinite(wide)):
        raise FormatError(f"a weight of {float(np.abs(wide).max()):g} is beyond f16", remedy="Load it as bf16 or f32")
    return narrow


def narrow_bf16(values: F32) -> npt.NDArray[np.uint16]:
    """f32 rounded to the nearest bf16 bit pattern, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), (bits >> np.uint32(16)) | np.uint32(64), rounded).astype(np.uint16)


def pack_codes(
    name: str,
    codes: U8,
    scales: Array,
    minimums: F32 | None = None,
    sub_scales: U8 | None = None,
    zeros: U8 | None = None,
) -> Packed:
    """Packs unsigned codes [out, in] (zero point included) with scales, minimums and zero points [out, groups].

    For one-level formats and `nvfp4`. Scales and minimums must be exact in the format's dtype; those of `mxfp4` are
    e8m0 bytes (uint8). `nvfp4` takes the f32 factor of each row as `scales` [out, 1] (half the tensor's own, because
    the codes stand for twice their e2m1 values) and e4m3 bytes [out, in / 16] as `sub_scales`. Raises UsageError
    where a shape or a code does not fit, FormatError where a scale would change.
    """
    fmt = format_of(name)
    given = (minimums is not None, sub_scales is not None, zeros is not None)
    if fmt.low == 0 or fmt.two_level != fmt.float_subs or given != (fmt.minimum, fmt.float_subs, fmt.zeros):
        raise UsageError(f"format {name} is not made of codes and the parts given")
    packer = Packer(name, (codes.shape[0], codes.shape[1]))
    wanted, each = (codes.shape[0], packer.layout.supers), (codes.shape[0], packer.layout.groups)
    if scales.shape != wanted or any(v is not None and v.shape != wanted for v in (minimums, zeros)):
        raise UsageError(f"format {name} of {codes.shape} needs scales {wanted}, got {scales.shape}")
    if sub_scales is not None and sub_scales.shape != each:
        raise UsageError(f"format {name} of {codes.shape} does not take sub-scales {sub_scales.shape}")
    if codes.size and int(codes.max()) >> fmt.bits:
        raise UsageError(f"code {int(codes.max())} does not fit {fmt.bits} bits")
    if fmt.scale == "e8m0" and scales.dtype != np.uint8:
        raise UsageError(f"format {name} takes its scales as e8m0 bytes")
    for values in (scales, minimums):
        if values is not None and not _exact(values, fmt.scale):
            raise FormatError(f"a scale is not exact in {fmt.scale}, which format {name} keeps")
    points = None if zeros is None else (zeros.astype(np.int16) - fmt.zero).astype(np.int8)
    span = runs(packer.shape)
    for start in span:
        part = slice(start, start + span.step)
        rest = (None if array is None else array[part] for array in (minimums, sub_scales, None, points))
        packer.add(CodeRows(codes[part], scales[part], *rest))  # type: ignore[arg-type]
    return packer.finish()


def _exact(values: F32, scale: str) -> bool:
    if scale in ("f32", "e8m0"):
        return True
    if scale == "bf16":
        return np.array_equal(widen_bf16(narrow_bf16(values)), values)
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(np.float16).astype(np.float32), values)


def pack_rows(name: str, shape: tuple[int, int], pieces: Iterable[CodeRows]) -> Packed:
    """Packs a matrix from pieces of its rows, each of whole tiles but the last, made ready for that format."""
    packer = Packer(name, shape)
    for piece in pieces:
        packer.add(piece)
    return packer.finish()
