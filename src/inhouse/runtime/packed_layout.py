"""The one packed weight layout: the table of formats, where each byte of a matrix lies, and the exact way back.

A matrix [out, in] is cut into tiles of 16 output rows (the last one padded with zero rows). A tile is a run of
sections, each padded to 64 bytes, and tiles follow one another, so a kernel sweeps memory forward:

    float formats   weights [in][16]
    code formats    scale | d     [groups or supers][16]   f16 or f32
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

A value is `scale * (code - zero)` or `scale * code + minimum`, each operation rounded to f32, where a two-level
format has scale = d * sub-scale and minimum = -(dmin * sub-minimum). Formats with a table look the code up first:
`scale * table[code]`. A two-level format whose d is f32 keeps one d a row and unsigned e4m3 bytes as sub-scales
(NVFP4). An e8m0 scale is a byte e that means 2^(e - 128). Knows nothing of files or kernels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, UnsupportedError, UsageError

U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]

LAYOUT_VERSION = 1  # part of every cache key; raise it when any byte moves
TILE_ROWS = 16
BLOCK = 32  # inputs of a code block, and elements of an activation row that share a scale
SUPER = 256  # inputs of a two-level super-block
MAX_GROUPS = 4096  # blocks (or groups of 16) in a row: what a native kernel prepares on its stack
ALIGN = 64
CHUNK_ELEMENTS = 1 << 22  # rows are unpacked and packed in runs of about this many elements


@dataclass(frozen=True, slots=True)
class Format:
    """One row of the table. `id` is what native/src/formats.h calls it."""

    name: str
    id: int
    low: int  # bits in the low plane; 0: a float format
    high: int = 0  # bits in the high plane
    zero: int = 0  # code that means 0; 0 where there is a minimum
    group: int = 0  # inputs that share a scale; 0: the whole row
    scale: str = "f16"  # dtype of scale (d), or of the weights themselves in a float format
    minimum: bool = False
    two_level: bool = False
    table: str = ""  # a key of TABLES: what a code means

    @property
    def float_subs(self) -> bool:
        """One f32 d a row, e4m3 sub-scales."""
        return self.two_level and self.scale == "f32"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.low + self.high


def _codes(name: str, number: int, low: int, high: int = 0, **fields: object) -> Format:
    return Format(name, number, low, high, **fields)  # type: ignore[arg-type]


# Names are those of the GGUF block types whose numbers they keep; `u<bits>_g<group>` have f32 scale and minimum, into
# which f16 or bf16 scales with integer zero points go without loss (GPTQ, AWQ, compressed-tensors).
_TABLE = (
    Format("f32", 0, 0, scale="f32"),
    Format("f16", 1, 0, scale="f16"),
    Format("bf16", 2, 0, scale="bf16"),
    _codes("q8_0", 3, 8, zero=128, group=32),
    _codes("q4_0", 4, 4, zero=8, group=32),
    _codes("q4_1", 5, 4, group=32, minimum=True),
    _codes("q5_0", 6, 4, 1, zero=16, group=32),
    _codes("q5_1", 7, 4, 1, group=32, minimum=True),
    _codes("q2_k", 8, 2, group=16, minimum=True, two_level=True),
    _codes("q3_k", 9, 2, 1, zero=4, group=16, two_level=True),
    _codes("q4_k", 10, 4, group=32, minimum=True, two_level=True),
    _codes("q5_k", 11, 4, 1, group=32, minimum=True, two_level=True),
    _codes("q6_k", 12, 4, 2, zero=32, group=16, two_level=True),
    _codes("u4_g32", 13, 4, group=32, scale="f32", minimum=True),
    _codes("u4_g64", 14, 4, group=64, scale="f32", minimum=True),
    _codes("u4_g128", 15, 4, group=128, scale="f32", minimum=True),
    _codes("u4_row", 16, 4, group=0, scale="f32", minimum=True),
    _codes("u8_g32", 17, 8, group=32, scale="f32", minimum=True),
    _codes("u8_g64", 18, 8, group=64, scale="f32", minimum=True),
    _codes("u8_g128", 19, 8, group=128, scale="f32", minimum=True),
    _codes("u8_row", 20, 8, group=0, scale="f32", minimum=True),
    _codes("iq4_nl", 21, 4, zero=128, group=32, table="iq4"),
    _codes("iq4_xs", 22, 4, zero=128, group=32, two_level=True, table="iq4"),
    _codes("mxfp4", 23, 4, zero=12, group=32, scale="e8m0", table="e2m1"),
    _codes("nvfp4", 24, 4, zero=12, group=16, scale="f32", two_level=True, table="e2m1"),
    _codes("tq2_0", 25, 2, zero=1, group=256),
    _codes("nf4_g64", 26, 4, group=64, scale="f32", table="nf4"),
    _codes("fp4_g64", 27, 4, group=64, scale="f32", table="fp4"),
    _codes("q6_0", 28, 4, 2, zero=32, group=32),  # ours: what q4 makes of embedding and head
)
FORMATS = {row.name: row for row in _TABLE}
SCALAR_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "e8m0": 1}
# What the 16 codes of a table format mean. `iq4`: ggml's levels of IQ4_NL; `e2m1`: twice the values of the OCP
# microscaling FP4 (the scales are halves); `nf4`, `fp4`: bitsandbytes (Dettmers et al. 2023, arXiv 2305.14314).
TABLES: dict[str, tuple[float, ...]] = {
    "iq4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "e2m1": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25),
        *(-0.0, -0.005208333333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25),
    ),
}
FLOAT_TABLES = ("nf4", "fp4")  # their levels are no integers: activations stay floats


def format_of(name: str) -> Format:
    """The row of that name; raises UnsupportedError if there is none."""
    if name not in FORMATS:
        raise UnsupportedError(f"unknown weight format {name!r}", remedy=f"Known: {', '.join(FORMATS)}")
    return FORMATS[name]


def is_float(name: str) -> bool:
    """Whether the weights are floats, which take float activations."""
    return format_of(name).low == 0


def activation_group(name: str) -> int:
    """`group` that op quantize_rows must use in front of a linear of this format; 0 where activations stay floats."""
    return 0 if is_float(name) or FORMATS[name].table in FLOAT_TABLES else BLOCK


class Section(NamedTuple):
    """A run of bytes inside every tile."""

    offset: int
    nbytes: int  # without the padding


class Layout(NamedTuple):
    """Where the parts of a tile lie, for one format and one number of inputs."""

    width: int  # inputs, padded to whole blocks
    groups: int
    supers: int  # entries of scale (d): groups, or super-blocks of a two-level format
    sections: dict[str, Section]
    tile_bytes: int


def layout(fmt: Format, inputs: int) -> Layout:
    """Raises UnsupportedError if the number of inputs does not fit the format."""
    if fmt.low == 0:
        sizes = {"weights": inputs * TILE_ROWS * SCALAR_BYTES[fmt.scale]}
        width = groups = supers = inputs
    else:
        width = -(-inputs // BLOCK) * BLOCK
        supers_of = fmt.two_level and not fmt.float_subs
        unit = SUPER if supers_of else max(fmt.group, BLOCK)
        if width % unit:
            raise UnsupportedError(f"format {fmt.name} needs inputs in multiples of {unit}, got {inputs}")
        if width // min(fmt.group or BLOCK, BLOCK) > MAX_GROUPS:
            raise UnsupportedError(f"format {fmt.name} takes at most {MAX_GROUPS} groups in a row, got {inputs} inputs")
        groups = width // fmt.group if fmt.group else 1
        supers = 1 if fmt.float_subs else width // SUPER if supers_of else groups
        per = supers * TILE_ROWS * SCALAR_BYTES[fmt.scale]
        sizes = {"scale": per}
        if fmt.minimum:
            sizes["minimum"] = per
        if fmt.two_level:
            sizes["sub_scale"] = groups * TILE_ROWS
            if fmt.minimum:
                sizes["sub_minimum"] = groups * TILE_ROWS
        blocks = width // BLOCK
        sizes["low"] = blocks * fmt.low * ALIGN
        if fmt.high:
            sizes["high"] = blocks * fmt.high * ALIGN
    offset, sections = 0, {}
    for name, size in sizes.items():
        sections[name] = Section(offset, size)
        offset += -(-size // ALIGN) * ALIGN
    return Layout(width, groups, supers, sections, offset)


def packed_nbytes(name: str, shape: tuple[int, int]) -> int:
    """Bytes that a matrix [out, in] takes in this format; raises UnsupportedError if it does not fit."""
    return -(-shape[0] // TILE_ROWS) * layout(format_of(name), shape[1]).tile_bytes


def bits_per_weight(name: str, inputs: int = 4096) -> float:
    """Bits a weight, scales included, for that many inputs (padding counts only where there is some)."""
    return layout(format_of(name), inputs).tile_bytes * 8 / (TILE_ROWS * inputs)


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


def aligned_empty(nbytes: int) -> U8:
    """Uninitialised bytes that start on a 64-byte boundary."""
    buffer = np.empty(nbytes + ALIGN, np.uint8)
    start = -buffer.ctypes.data % ALIGN
    return buffer[start : start + nbytes]


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
        needed = packed_nbytes(self.format, self.shape)
        if self.data.dtype != np.uint8 or self.data.ndim != 1 or self.data.nbytes != needed:
            raise FormatError(
                f"a packed {self.format} matrix {self.shape} takes {needed} bytes, got {self.data.nbytes}",
                remedy="The cache file is damaged or of another version; delete it and load again",
            )
        if needed and (self.data.ctypes.data % ALIGN or not self.data.flags.c_contiguous):
            raise FormatError(f"a packed matrix must start at a multiple of {ALIGN} bytes and be contiguous")

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

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
        if fmt.low == 0:
            return self._float_rows(fmt, index)
        with np.errstate(invalid="ignore", over="ignore"):  # a hostile file may hold infinite scales; they stay so
            return self._values(fmt, self._parts(fmt, index))

    def _values(self, fmt: Format, parts: _Parts) -> F32:
        count = len(parts.codes)
        codes = parts.codes.reshape(count, parts.scales.shape[1], -1)
        grouped = table_values(fmt)[codes] if fmt.table else codes.astype(np.float32)
        if parts.minimums is None and not fmt.table:
            grouped -= np.float32(fmt.zero)
        grouped *= parts.scales[:, :, None]
        if parts.minimums is not None:
            grouped += parts.minimums[:, :, None]
        return np.ascontiguousarray(grouped.reshape(count, -1)[:, : self.shape[1]])

    def codes(self) -> Codes:
        """The matrix as integers and expanded f32 scales (exact); raises UsageError where codes are no integers."""
        fmt = FORMATS[self.format]
        if fmt.low == 0 or fmt.table in FLOAT_TABLES:
            raise UsageError(f"format {self.format} holds floats, not codes")
        runs = [self._parts(fmt, ids) for _, ids in self._runs()]
        codes = np.empty(self.shape, np.int32)
        row = 0
        for run in runs:
            part = run.codes[:, : self.shape[1]]
            values = table_values(fmt)[part].astype(np.int32) if fmt.table else part.astype(np.int32) - fmt.zero
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
        return _Parts(quads.reshape(index.size, plan.width), scales, minimums)


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


def widen_bf16(raw: npt.NDArray[np.generic]) -> F32:
    """bf16 bit patterns as f32, exactly."""
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def widen_e8m0(raw: npt.NDArray[np.generic]) -> F32:
    """Bytes e as 2^(e - 128); 255 is 2^127, as ggml reads it."""
    bits = raw.astype(np.uint32)
    return np.where(bits < 2, np.uint32(0x200000) << bits, (np.maximum(bits, 1) - np.uint32(1)) << np.uint32(23)).view(
        np.float32
    )


def widen_e4m3(raw: npt.NDArray[np.generic]) -> F32:
    """Bytes 0..127 as e4m3 numbers (OCP FP8, no infinity); 127, its NaN, reads as 480."""
    bits = raw.astype(np.uint32)
    normal = ((bits << np.uint32(20)) + np.uint32(120 << 23)).view(np.float32)
    return np.where(bits < 8, bits.astype(np.float32) * np.float32(2**-9), normal)


def table_values(fmt: Format) -> F32:
    """The meaning of each code of a table format, f32 [16]."""
    return np.array(TABLES[fmt.table], np.float32)


_STORED: dict[str, npt.DTypeLike] = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,
    "e8m0": np.uint8,
    "e4m3": np.uint8,
    "i8": np.int8,
}
_WIDEN = {"bf16": widen_bf16, "e8m0": widen_e8m0, "e4m3": widen_e4m3}
