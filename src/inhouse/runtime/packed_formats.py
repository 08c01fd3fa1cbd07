"""The table of packed formats and what their codes and scales mean as numbers. Knows no bytes of a tile."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnsupportedError

F32 = npt.NDArray[np.float32]

BLOCK = 32  # inputs of a code block, and elements of an activation row that share a scale
WHOLE_ROW = -1  # an activation row has one scale
MOST_PAIR_INPUTS = 16384  # as kMostPairInputs of native/src/kernels.h
POWERS_BITS, POWERS_WIDTH = 6, 768  # weights of at most so many bits and at least so many inputs: activation_powers


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
    table: str = ""  # a key of TABLES, or e4m3 or e5m2: what a code means
    zeros: bool = False  # an int8 zero point for each group, taken off the code
    per_token: bool = False  # activations have one scale a row
    coding: str = ""  # how the codes are kept: "" all of them; mask, pairs, vectors, columns (packed_expand)
    base: str = ""  # of a coding: the plain format that holds the same values
    books: int = 0  # of vectors: codebooks whose entries add up

    @property
    def variable(self) -> bool:
        """Whether the bytes of a matrix depend on what it holds."""
        return self.coding in ("mask", "columns")

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


def _family(first: int, stem: str, low: int, high: int = 0, **fields: object) -> list[Format]:
    """Twelve formats that differ in group and scale: `u4_g32`, `u4_g32_bf16`, `u4_g32_f32` ... `u4_row_f32`."""
    return [
        _codes(f"{stem}_{at}{end}", first + 3 * i + j, low, high, group=group, scale=scale, **fields)
        for i, (at, group) in enumerate((("g32", 32), ("g64", 64), ("g128", 128), ("row", 0)))
        for j, (end, scale) in enumerate((("", "f16"), ("_bf16", "bf16"), ("_f32", "f32")))
    ]


def _coded(first: int, stem: str, base: str, coding: str, books: int = 0) -> list[Format]:
    """Four formats that differ in group, with the values of `base`_g32, _g64, _g128, _row and f16 scales."""
    bits = int(base[1:])
    return [
        Format(f"{stem}_{at}", first + i, bits, zero=1 << (bits - 1), group=group, coding=coding, base=f"{base}_{at}",
               books=books)
        for i, (at, group) in enumerate((("g32", 32), ("g64", 64), ("g128", 128), ("row", 0)))
    ]  # fmt: skip


# Names are those of the GGUF block types whose numbers they keep. `i<bits>_g<group>` are symmetric, `u<bits>_g<group>`
# have an int8 zero point for each group: GPTQ, AWQ and compressed-tensors at their own bits. `i8_token` are int8 rows
# made for activations with one scale a token, `f8_*` floats of one byte.
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
    _codes("f8_e4m3_g32", 13, 8, group=32, scale="f32", table="e4m3"),
    _codes("f8_e4m3_g128", 14, 8, group=128, scale="f32", table="e4m3"),
    _codes("f8_e4m3_row", 15, 8, scale="f32", table="e4m3"),
    _codes("f8_e5m2_g128", 16, 8, group=128, scale="f32", table="e5m2"),
    _codes("f8_e5m2_row", 17, 8, scale="f32", table="e5m2"),
    _codes("i8_token", 18, 8, zero=128, per_token=True),
    _codes("i8_token_bf16", 19, 8, zero=128, scale="bf16", per_token=True),
    _codes("i8_token_f32", 20, 8, zero=128, scale="f32", per_token=True),
    _codes("iq4_nl", 21, 4, zero=128, group=32, table="iq4"),
    _codes("iq4_xs", 22, 4, zero=128, group=32, two_level=True, table="iq4"),
    _codes("mxfp4", 23, 4, zero=12, group=32, scale="e8m0", table="e2m1"),
    _codes("nvfp4", 24, 4, zero=12, group=16, scale="f32", two_level=True, table="e2m1"),
    _codes("tq2_0", 25, 2, zero=1, group=256),
    _codes("nf4_g64", 26, 4, group=64, scale="f32", table="nf4"),
    _codes("fp4_g64", 27, 4, group=64, scale="f32", table="fp4"),
    _codes("q6_0", 28, 4, 2, zero=32, group=32),  # ours: what q4 makes of embedding and head
    *_family(29, "i4", 4, zero=8),
    *_family(41, "i8", 8, zero=128),
    *_family(53, "u2", 2, zeros=True),
    *_family(65, "u3", 2, 1, zeros=True),
    *_family(77, "u4", 4, zeros=True),
    *_family(89, "u8", 8, zero=128, zeros=True),
    _codes("log4_g32", 101, 4, zero=128, group=32, table="log4"),
    *_coded(102, "s8", "i8", "mask"),  # sparse: a bit for each weight and the codes that are not zero
    *_coded(106, "s4", "i4", "mask"),
    *_coded(110, "p8", "i8", "pairs"),  # 2:4: two codes of every four inputs
    *_coded(114, "p4", "i4", "pairs"),
    *_coded(118, "vq1", "i8", "vectors", 1),  # sums of entries of 1, 2 or 3 codebooks of 256 vectors of 8
    *_coded(122, "vq2", "i8", "vectors", 2),
    *_coded(126, "vq3", "i8", "vectors", 3),
    _codes("csr_i8", 130, 8, zero=128, coding="columns", base="i8_row"),  # columns and values, row by row
    Format("csr_bf16", 131, 0, scale="bf16", coding="columns", base="bf16"),
)
FORMATS = {row.name: row for row in _TABLE}
SCALAR_BYTES = {"f32": 4, "f16": 2, "bf16": 2, "e8m0": 1}
# What the 16 codes of a table format mean. `iq4`: ggml's levels of IQ4_NL; `e2m1`: twice the values of the OCP
# microscaling FP4 (the scales are halves); `log4`: powers of two (LogNet, Miyashita et al. 2016, arXiv 1603.01025);
# `nf4`, `fp4`: bitsandbytes (Dettmers et al. 2023, arXiv 2305.14314).
TABLES: dict[str, tuple[float, ...]] = {
    "iq4": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "e2m1": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
    "log4": (0, 1, 2, 4, 8, 16, 32, 64, 0, -1, -2, -4, -8, -16, -32, -64),
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
FLOAT_TABLES = ("nf4", "fp4", "e4m3", "e5m2")  # their levels are no integers: activations stay floats


def format_of(name: str) -> Format:
    """The row of that name; raises UnsupportedError if there is none."""
    if name not in FORMATS:
        raise UnsupportedError(f"unknown weight format {name!r}", remedy=f"Known: {', '.join(FORMATS)}")
    return FORMATS[name]


def is_float(name: str) -> bool:
    """Whether the weights are floats, which take float activations."""
    return format_of(name).low == 0


def activation_group(name: str) -> int:
    """Elements of an activation row that share a scale in front of a linear of this format: WHOLE_ROW for all of them,
    0 where activations stay floats."""
    fmt = format_of(name)
    if fmt.low == 0 or fmt.table in FLOAT_TABLES or fmt.coding == "columns":
        return 0
    return WHOLE_ROW if fmt.per_token else BLOCK


def activation_powers(name: str, width: int) -> bool:
    """Whether activations in front of a linear of this format and `width` inputs take scales that are powers of two.

    They cost up to one of the 8 bits of a code, which disappears beside weights of at most 6 bits, and make products
    of scales sums of exponents (docs/decisions/012). Narrow models, whose time goes elsewhere, keep fine scales.
    """
    fmt = format_of(name)
    return activation_group(name) == BLOCK and fmt.low + fmt.high <= POWERS_BITS and width >= POWERS_WIDTH


def narrow_inputs(name: str, width: int) -> bool:
    """Whether the floats in front of a linear of this format and `width` inputs are rounded to bf16: of bf16 weights,
    so that products are those of pairs (`vdpbf16ps`), where rows are wide."""
    return name == "bf16" and width >= POWERS_WIDTH and width % 4 == 0 and width <= MOST_PAIR_INPUTS


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


def widen_e5m2(raw: npt.NDArray[np.generic]) -> F32:
    """Bytes 0..127 as e5m2 numbers; infinity and NaN, 124 and more, read as 2^16 and more."""
    bits = raw.astype(np.uint32)
    normal = ((bits << np.uint32(21)) + np.uint32(112 << 23)).view(np.float32)
    return np.where(bits < 4, bits.astype(np.float32) * np.float32(2**-16), normal)


def table_values(fmt: Format) -> F32:
    """The meaning of each code of a table format, f32 [16], or [256] of floats of one byte."""
    if fmt.table in TABLES:
        return np.array(TABLES[fmt.table], np.float32)
    widen = widen_e4m3 if fmt.table == "e4m3" else widen_e5m2
    magnitudes = widen(np.arange(128, dtype=np.uint8))
    return np.concatenate([magnitudes, -magnitudes])
