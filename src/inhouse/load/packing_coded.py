"""A quantised linear of a checkpoint to the packed format that keeps its own codes and scales.

Knows which format holds which coding; does not know file formats (`store.quantized`) nor bytes (`runtime.packed`).
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.core.tensors import CodedRows, CodedSource, Coding
from inhouse.runtime.packed import FORMATS, CodeRows, Packed, pack_float, pack_rows, runs

_GROUPS = (128, 64, 32)
_SUFFIX = {"F16": "", "BF16": "_bf16", "F32": "_f32"}
_TABLES = {"nf4": ("nf4_g64", 64), "fp4": ("fp4_g64", 64), "nvfp4": ("nvfp4", 16), "mxfp4": ("mxfp4", 32)}
# Codes of one-byte floats that are NaN or infinite: from this magnitude on.
_NOT_FINITE = {"f8_e4m3": 0x7F, "f8_e5m2": 0x7C}
FALLBACK = "f32"  # for groups that no packed format has: exact, and large


def coded_format(coding: Coding, inputs: int) -> str:
    """The packed format that keeps a coding without loss; FALLBACK where none does at its own size.

    Raises UnsupportedError for a kind that is not known.
    """
    if coding.kind in _TABLES:
        name, group = _TABLES[coding.kind]
        return name if coding.group % group == 0 and inputs % group == 0 else FALLBACK
    if coding.kind in _NOT_FINITE:
        found = _span(coding, inputs, (128, 32) if coding.kind == "f8_e4m3" else (128,))
        return FALLBACK if found is None else f"{coding.kind}_{found}"
    if coding.kind != "int":
        raise UnsupportedError(f"codes of kind {coding.kind!r} have no packed form")
    if coding.per_token:
        return f"i8_token{_SUFFIX[coding.scale]}"
    found = _span(coding, inputs, _GROUPS)
    if found is None:
        return FALLBACK
    bits = coding.bits if coding.bits in (2, 3, 4) else 8
    own_zeros = coding.zeros or bits < 4  # the families of 2 and 3 bits always keep zero points
    return f"{'u' if own_zeros else 'i'}{bits}_{found}{_SUFFIX[coding.scale]}"


def _span(coding: Coding, inputs: int, groups: tuple[int, ...]) -> str | None:
    """`row`, `g128` ..: the longest group that divides the coding's own; None if there is none."""
    if coding.group == 0 or coding.group >= inputs:
        return "row"
    width = -(-inputs // 32) * 32
    return next((f"g{g}" for g in groups if coding.group % g == 0 and width % g == 0), None)


def format_note(coding: Coding, fmt: str) -> str:
    """What the user should know of matrices that are kept at more bits than the file's; "" if nothing."""
    if fmt == FALLBACK:
        return f"in groups of {coding.group} have no packed form and were unpacked to f32, exactly"
    if coding.kind == "int" and coding.bits in (5, 6, 7):
        return "are kept in 8 bits, exactly"
    return ""


def pack_coded(
    source: CodedSource, name: str, fmt: str, index: npt.NDArray[np.int64], shape: tuple[int, int]
) -> Packed:
    """Rows `index` of a quantised tensor in that format, values unchanged.

    Raises FormatError for a code or scale that is not finite or does not fit.
    """
    coding = source.coding(name)
    assert coding is not None
    if fmt == FALLBACK:
        return pack_float(_values(source, name, coding, index, shape[1]), "f32")
    return pack_rows(fmt, shape, _pieces(source, name, coding, fmt, index, shape))


def _pieces(
    source: CodedSource, name: str, coding: Coding, fmt: str, index: npt.NDArray[np.int64], shape: tuple[int, int]
) -> Iterator[CodeRows]:
    span = runs(shape)
    for start in span:
        part = source.coded_rows(name, index[start : start + span.step])
        _check(name, coding, part)
        yield _ready(name, coding, fmt, part, shape[1])


def _check(name: str, coding: Coding, part: CodedRows) -> None:
    if not np.isfinite(part.scales).all():
        raise FormatError(f"tensor {name!r} has a scale that is NaN or infinite", param=name)
    limit = _NOT_FINITE.get(coding.kind)
    if limit is not None and bool(((part.codes & np.uint8(0x7F)) >= limit).any()):
        raise FormatError(f"tensor {name!r} holds NaN or infinity", param=name)
    if part.sub_scales is not None:
        # e4m3 has one NaN, 0x7F, and its sign is not kept; e8m0 has one, 0xFF
        if bool((part.sub_scales >= (0x7F if coding.kind == "nvfp4" else 0xFF)).any()):
            raise FormatError(f"tensor {name!r} has a scale that is negative or NaN", param=name)


def _ready(name: str, coding: Coding, fmt: str, part: CodedRows, inputs: int) -> CodeRows:
    row = FORMATS[fmt]
    codes = part.codes
    if coding.kind == "nvfp4":  # the table holds twice the values
        return CodeRows(codes, part.scales * np.float32(0.5), sub_scales=part.sub_scales)
    if coding.kind == "mxfp4":
        assert part.sub_scales is not None
        return CodeRows(codes, part.sub_scales)
    spread = _spread(coding, row.group, inputs, part.scales.shape[1])
    scales = part.scales[:, spread]
    if coding.kind != "int":
        return CodeRows(codes, scales)
    middle = 1 << (coding.bits - 1)
    # 5, 6 and 7 bits in 8: codes and zero points move together
    shift = 128 - middle if row.bits == 8 else 0
    codes = codes + np.uint8(shift)
    zeros = part.zeros
    if not row.zeros:
        if zeros is not None and not (zeros == middle).all():
            raise FormatError(f"tensor {name!r} has zero points, its config says that it is symmetric", param=name)
        return CodeRows(codes, scales)
    if zeros is None:
        zeros = np.full(part.scales.shape, middle, np.uint8)
    points = (zeros.astype(np.int16) + shift - row.zero).astype(np.int8)
    return CodeRows(codes, scales, zeros=points[:, spread])


def _spread(coding: Coding, group: int, inputs: int, count: int) -> npt.NDArray[np.int64]:
    """For each group of the packed format the group of the file that it lies in."""
    if group == 0 or coding.group == 0:
        width = 1 if group == 0 else -(-inputs // group)
        return np.zeros(width, np.int64)
    starts = np.arange(-(-(-(-inputs // 32) * 32) // group), dtype=np.int64) * group
    return np.minimum(starts // coding.group, count - 1)


def _values(
    source: CodedSource, name: str, coding: Coding, index: npt.NDArray[np.int64], inputs: int
) -> npt.NDArray[np.float32]:
    """Every value as f32 [rows, in], in packed column order."""
    if coding.kind != "int":
        raise UnsupportedError(
            f"tensor {name!r}: groups of {coding.group} in {inputs} inputs of {coding.kind} have no packed form",
            param=name,
        )
    part = source.coded_rows(name, index)
    _check(name, coding, part)
    group = np.minimum(np.arange(inputs) // (coding.group or inputs), part.scales.shape[1] - 1)
    middle = np.float32(1 << (coding.bits - 1))
    zeros = middle if part.zeros is None else part.zeros.astype(np.float32)[:, group]
    values: npt.NDArray[np.float32] = part.scales[:, group] * (part.codes.astype(np.float32) - zeros)
    return values
