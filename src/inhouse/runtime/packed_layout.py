"""The one packed weight layout: where each byte of a matrix lies, and the exact way back.

A matrix [out, in] is cut into tiles of 16 output rows (the last one padded with zero rows). A tile is a run of
sections, each padded to 64 bytes, and tiles follow one another, so a kernel sweeps memory forward:

    float formats   weights [in][16]
    code formats    scale | d     [groups or supers][16]   f16, bf16, f32 or e8m0
                    zero points   [groups][16] i8          formats with zero points only
                    minimum | dmin[groups or supers][16]   f16 or f32, absent in formats without a minimum
                    sub-scale     [groups][16] i8          two-level formats only
                    sub-minimum   [groups][16] i8          two-level formats with a minimum only
                    low plane     [blocks of 32 k][low vectors of 64 bytes]
                    high plane    [blocks of 32 k][high vectors of 64 bytes]

Codes go in blocks of 32 inputs, a block in 8 quads of 4 inputs, a quad is the 64-byte vector [16 rows][4 inputs]
that one u8 x s8 dot instruction takes. Planes hold the quads of a block bit-packed, byte by byte:

    8 bits   vector q             = quad q
    4 bits   vector v (0..3)      = quad v in the low nibble, quad v + 4 in the high nibble
    2 bits   vector h (0..1)      = quad 4h + i at bits 2i
    1 bit    one vector           = quad q at bit q

Inputs are padded to whole blocks with codes that mean 0; the last group of a row may have fewer blocks than the others.
A value is `scale * (code - zero - zero point)` or `scale * code + minimum`, each operation rounded to f32, where a
two-level format has scale = d * sub-scale and minimum = -(dmin * sub-minimum). Formats with a table look the code up
first: `scale * table[code]`. A two-level format whose d is f32 keeps one d a row and unsigned e4m3 bytes as sub-scales
(NVFP4). An e8m0 scale is a byte e that means 2^(e - 128). Knows nothing of files or kernels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, UsageError
from inhouse.runtime.packed_expand import check_coded, expand_tiles
from inhouse.runtime.packed_formats import BLOCK as BLOCK
from inhouse.runtime.packed_formats import FLOAT_TABLES as FLOAT_TABLES
from inhouse.runtime.packed_formats import FORMATS as FORMATS
from inhouse.runtime.packed_formats import SCALAR_BYTES as SCALAR_BYTES
from inhouse.runtime.packed_formats import TABLES as TABLES
from inhouse.runtime.packed_formats import Format as Format
from inhouse.runtime.packed_formats import activation_group as activation_group
from inhouse.runtime.packed_formats import activation_powers as activation_powers
from inhouse.runtime.packed_formats import format_of as format_of
from inhouse.runtime.packed_formats import is_float as is_float
from inhouse.runtime.packed_formats import narrow_inputs as narrow_inputs
from inhouse.runtime.packed_formats import table_values as table_values
from inhouse.runtime.packed_formats import widen_bf16 as widen_bf16
from inhouse.runtime.packed_formats import widen_e4m3 as widen_e4m3
from inhouse.runtime.packed_formats import widen_e8m0 as widen_e8m0
from inhouse.runtime.packed_plan import ALIGN as ALIGN
from inhouse.runtime.packed_plan import CHUNK_ELEMENTS as CHUNK_ELEMENTS
from inhouse.runtime.packed_plan import LAYOUT_VERSION as LAYOUT_VERSION
from inhouse.runtime.packed_plan import MAX_GROUPS as MAX_GROUPS
from inhouse.runtime.packed_plan import SUPER as SUPER
from inhouse.runtime.packed_plan import TILE_ROWS as TILE_ROWS
from inhouse.runtime.packed_plan import U8 as U8
from inhouse.runtime.packed_plan import Layout as Layout
from inhouse.runtime.packed_plan import Section as Section
from inhouse.runtime.packed_plan import aligned_empty as aligned_empty
from inhouse.runtime.packed_plan import bits_per_weight as bits_per_weight
from inhouse.runtime.packed_plan import layout as layout
from inhouse.runtime.packed_plan import packed_nbytes as packed_nbytes

I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]


class Codes(NamedTuple):
    """A code matrix taken apart: value = scales * codes (+ minimums), group by group along the inputs."""

    codes: I32  # [out, in], zero point removed
    scales: F32  # [out, groups]
    minimums: F32 | None  # [out, groups]
    group: int  # inputs a group; the last group may be short


class _Parts(NamedTuple):
    """Codes of some rows before the zero point is removed."""

    codes: U8  # [n, width]
    scales: F32  # [n, groups]
    minimums: F32 | None
    zeros: F32 | None = None  # [n, groups], beyond the format's own zero


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix in packed form.

    Args:
        format: a key of FORMATS.
        shape: [out, in].
        data: uint8, one-dimensional, 64-byte aligned, possibly a read-only file mapping.

    Raises:
        UnsupportedError: unknown format, or inputs that do not fit it.
        FormatError: `data` has the wrong size, type or alignment.
    """

    format: str
    shape: tuple[int, int]
    data: U8

    def __post_init__(self) -> None:
        fmt = format_of(self.format)
        needed = packed_nbytes(self.format, self.shape)
        if fmt.variable and self.data.ndim == 1:
            needed = min(needed, self.data.nbytes)
        if self.data.dtype != np.uint8 or self.data.ndim != 1 or self.data.nbytes != needed:
            raise FormatError(
                f"a packed {self.format} matrix {self.shape} takes {needed} bytes, got {self.data.nbytes}",
                remedy="The cache file is damaged or of another version; delete it and load again",
            )
        if needed and (self.data.ctypes.data % ALIGN or not self.data.flags.c_contiguous):
            raise FormatError(f"a packed matrix must start at a multiple of {ALIGN} bytes and be contiguous")
        if fmt.coding:
            check_coded(fmt, self.shape, self.data)

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    def plain(self, tiles: npt.NDArray[np.int64] | None = None) -> "Packed":
        """The same values in the plain format that a sparse or vector-coded one stands for, `self` in a plain format.

        tiles: the tiles of 16 rows to take, ascending; None: all.
        """
        fmt = FORMATS[self.format]
        whole = tiles is None
        index = np.arange(-(-self.shape[0] // TILE_ROWS)) if tiles is None else tiles
        if fmt.coding:
            data = expand_tiles(fmt, self.shape, self.data, index)
        elif whole:
            return self
        else:
            data = aligned_empty(index.size * layout(fmt, self.shape[1]).tile_bytes)
            data.reshape(index.size, -1)[:] = self.data.reshape(-1, data.nbytes // max(index.size, 1))[index]
        return Packed(fmt.base or fmt.name, (self.shape[0] if whole else index.size * TILE_ROWS, self.shape[1]), data)

    @property
    def group(self) -> int:
        """Inputs that share a scale; 0 for float formats."""
        fmt = FORMATS[self.format]
        return 0 if fmt.low == 0 else fmt.group or layout(fmt, self.shape[1]).width

    def dequantize(self) -> F32:
        """Every value as f32 [out, in]; for GGUF types bit-identical to the values that the file means."""
        out = np.empty(self.shape, np.float32)
        for start, ids in self._runs():
            out[start : start + ids.size] = self.rows(ids)
        return out

    def rows(self, ids: npt.ArrayLike) -> F32:
        """Rows `ids` (integers [n]) as f32 [n, in]; raises UsageError for an id outside the matrix."""
        index = self._checked(ids)
        fmt = FORMATS[self.format]
        if fmt.coding:
            tiles = np.unique(index // TILE_ROWS)
            return self.plain(tiles).rows(np.searchsorted(tiles, index // TILE_ROWS) * TILE_ROWS + index % TILE_ROWS)
        if fmt.low == 0:
            return self._float_rows(fmt, index)
        with np.errstate(invalid="ignore", over="ignore"):  # a hostile file may hold infinite scales; they stay so
            return self._values(fmt, self._parts(fmt, index))

    def _values(self, fmt: Format, parts: _Parts) -> F32:
        count = len(parts.codes)
        short = parts.scales.shape[1] * self.group - parts.codes.shape[1]  # of the last group
        whole = np.pad(parts.codes, ((0, 0), (0, short))) if short else parts.codes
        codes = whole.reshape(count, parts.scales.shape[1], -1)
        grouped = table_values(fmt)[codes] if fmt.table else codes.astype(np.float32)
        if parts.minimums is None and not fmt.table:
            grouped -= np.float32(fmt.zero)
        if parts.zeros is not None:
            grouped -= parts.zeros[:, :, None]
        grouped *= parts.scales[:, :, None]
        if parts.minimums is not None:
            grouped += parts.minimums[:, :, None]
        return np.ascontiguousarray(grouped.reshape(count, -1)[:, : self.shape[1]])

    def codes(self) -> Codes:
        """The matrix as integers and expanded f32 scales (exact); raises UsageError where codes are no integers."""
        fmt = FORMATS[self.format]
        if fmt.low == 0 or fmt.table in FLOAT_TABLES:
            raise UsageError(f"format {self.format} holds floats, not codes")
        if fmt.coding:
            return self.plain().codes()
        runs = [self._parts(fmt, ids) for _, ids in self._runs()]
        codes = np.empty(self.shape, np.int32)
        row = 0
        for run in runs:
            part = run.codes[:, : self.shape[1]]
            values = table_values(fmt)[part].astype(np.int32) if fmt.table else part.astype(np.int32) - fmt.zero
            if run.zeros is not None:
                values -= np.repeat(run.zeros.astype(np.int32), self.group, 1)[:, : self.shape[1]]
            codes[row : row + len(part)] = values
            row += len(part)
        minimums = np.concatenate([r.minimums for r in runs if r.minimums is not None]) if fmt.minimum else None
        return Codes(codes, np.concatenate([r.scales for r in runs]), minimums, self.group)

    def _runs(self) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        step = max(1, CHUNK_ELEMENTS // max(self.shape[1], 1))
        for start in range(0, max(self.shape[0], 1), step):
            yield start, np.arange(start, min(start + step, self.shape[0]), dtype=np.int64)

    def _checked(self, ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        index = np.asarray(ids, np.int64)
        if index.ndim != 1 or (index.size and not 0 <= index.min() <= index.max() < self.shape[0]):
            raise UsageError(f"row ids must be a list within 0..{self.shape[0] - 1}")
        return index

    def _section(self, plan: Layout, name: str, dtype: npt.DTypeLike, *axes: int) -> npt.NDArray[np.generic]:
        """A section of all tiles as an array [tiles, *axes] of dtype."""
        section = plan.sections[name]
        tiles = self.data.reshape(-1, plan.tile_bytes)
        return tiles[:, section.offset : section.offset + section.nbytes].view(dtype).reshape(-1, *axes)

    def _lanes(self, plan: Layout, name: str, kind: str, count: int, index: npt.NDArray[np.int64]) -> F32:
        """Parameters [count][16] of a section, as f32 [n, count] of the rows asked for."""
        dtype = _STORED[kind]
        values = self._section(plan, name, dtype, count, TILE_ROWS)[index // TILE_ROWS, :, index % TILE_ROWS]
        if kind in _WIDEN:
            return _WIDEN[kind](values)
        return values.astype(np.float32)

    def _float_rows(self, fmt: Format, index: npt.NDArray[np.int64]) -> F32:
        plan = layout(fmt, self.shape[1])
        return self._lanes(plan, "weights", fmt.scale, self.shape[1], index)

    def _parts(self, fmt: Format, index: npt.NDArray[np.int64]) -> _Parts:
        plan = layout(fmt, self.shape[1])
        scales = self._lanes(plan, "scale", fmt.scale, plan.supers, index)
        minimums = self._lanes(plan, "minimum", fmt.scale, plan.supers, index) if fmt.minimum else None
        if fmt.two_level:
            times = plan.groups // plan.supers
            kind = "e4m3" if fmt.float_subs else "i8"
            scales = np.repeat(scales, times, 1) * self._lanes(plan, "sub_scale", kind, plan.groups, index)
            if minimums is not None:
                sub = self._lanes(plan, "sub_minimum", "i8", plan.groups, index)
                minimums = np.negative(np.repeat(minimums, times, 1) * sub)
        blocks, tile, lane = plan.width // BLOCK, index // TILE_ROWS, index % TILE_ROWS
        low = self._section(plan, "low", np.uint8, blocks, fmt.low, TILE_ROWS, 4)[tile, :, :, lane]
        quads = spread_plane(low.view(np.uint8), fmt.low)
        if fmt.high:
            high = self._section(plan, "high", np.uint8, blocks, fmt.high, TILE_ROWS, 4)[tile, :, :, lane]
            quads |= spread_plane(high.view(np.uint8), fmt.high) << np.uint8(fmt.low)
        zeros = self._lanes(plan, "zeros", "i8", plan.groups, index) if fmt.zeros else None
        return _Parts(quads.reshape(index.size, plan.width), scales, minimums, zeros)


def spread_plane(plane: U8, bits: int) -> U8:
    """A plane [..., bits, x] (vectors of a block) as codes [..., 8, x] (its quads)."""
    quads = np.empty((*plane.shape[:-2], 8, plane.shape[-1]), np.uint8)
    per = 8 // bits
    mask = np.uint8((1 << bits) - 1)
    for quad in range(8):
        vector, slot = _place(quad, bits, per)
        quads[..., quad, :] = (plane[..., vector, :] >> np.uint8(slot * bits)) & mask
    return quads


def gather_plane(quads: U8, bits: int) -> U8:
    """The reverse of `spread_plane`: codes [..., 8, x] of at most `bits` bits as vectors [..., bits, x]."""
    plane = np.zeros((*quads.shape[:-2], bits, quads.shape[-1]), np.uint8)
    per = 8 // bits
    for quad in range(8):
        vector, slot = _place(quad, bits, per)
        plane[..., vector, :] |= quads[..., quad, :] << np.uint8(slot * bits)
    return plane


def _place(quad: int, bits: int, per: int) -> tuple[int, int]:
    """(vector, slot in its bytes) of a quad. Nibbles pair quad v with v + 4, as the 4-bit GGUF types do."""
    return (quad % 4, quad // 4) if bits == 4 else (quad // per, quad % per)


_STORED: dict[str, npt.DTypeLike] = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,
    "e8m0": np.uint8,
    "e4m3": np.uint8,
    "i8": np.int8,
}
_WIDEN = {"bf16": widen_bf16, "e8m0": widen_e8m0, "e4m3": widen_e4m3}
