"""Packed matrices as files keep them: plain rows without the padding of tiles, codes packed at their own bits, and the
exact way back.

    float formats   weights      [out, in] F32, F16 or BF16
    code formats    codes        U8 [out, bytes]   code i of a row at bits i * bits, least significant first; the
                                                   inputs padded to what the format's layout pads them to
                    scale        [out, groups or supers] in the format's own type; e8m0 as U8
                    minimum      the same
                    zeros, sub_scale, sub_minimum  integers of the groups, bit-packed like codes over the whole matrix;
                                                   I8 (e4m3: U8) [out, groups] where a value needs it
    vector codes    index        U8 [books, out, in / 8 rounded up]
                    scale        F16 [out, groups]
                    books        I8 [books, 256, 8]; matrices with the same codebooks may share one tensor of them
    AS_PACKED       packed       U8: the bytes of the packed layout themselves

`stored_nbytes` counts what a writer writes, header and names of the file not counted. Knows no files.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError
from inhouse.runtime.packed_formats import FORMATS, Format, format_of, widen_bf16
from inhouse.runtime.packed_layout import (
    TILE_ROWS,
    U8,
    Layout,
    Packed,
    aligned_empty,
    layout,
    packed_nbytes,
    spread_plane,
)
from inhouse.runtime.packed_pack import CodeRows, Packer, runs
from inhouse.runtime.packed_plan import BOOK, VECTOR
from inhouse.runtime.packed_sparse import pack_vectors, vector_parts

Array = npt.NDArray[Any]

STORED_VERSION = 1  # raise it when any stored byte changes its meaning
# Formats that are stored as they are packed: their tiles differ in length or have tables of their own.
AS_PACKED = frozenset(name for name, fmt in FORMATS.items() if fmt.coding not in ("", "vectors"))
SHARED = "books"  # the part that several matrices may share
# Bits of the integers of a two-level format and what code 0 means, as GGUF's blocks keep them; others take 8 bits.
_SUB_BITS: Mapping[str, tuple[int, int]] = {
    "q2_k": (4, 0),
    "q3_k": (6, -32),
    "q4_k": (6, 0),
    "q5_k": (6, 0),
    "iq4_xs": (6, -32),
}
_FILE_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "e8m0": "U8"}
_NUMPY: Mapping[str, npt.DTypeLike] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U8": np.uint8,
    "I8": np.int8,
}


class StoredPart(NamedTuple):
    """One array of a stored matrix: a file type (F32, F16, BF16 as uint16, U8, I8) and a shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * np.dtype(_NUMPY[self.dtype]).itemsize

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy type of its elements."""
        return np.dtype(_NUMPY[self.dtype])


class _Plan(NamedTuple):
    """The parts of a stored matrix, and of the integer ones [out, groups] how they may be narrowed."""

    parts: dict[str, StoredPart]
    narrow: dict[str, tuple[int, int]]  # part -> (bits, what code 0 means)


def stored_parts(name: str, shape: tuple[int, int]) -> dict[str, StoredPart]:
    """The parts of a matrix [out, in], its integers at their usual bits. Raises UnsupportedError if it does not fit."""
    return _plan(format_of(name), shape).parts


def stored_nbytes(name: str, shape: tuple[int, int]) -> int:
    """Bytes of a matrix [out, in] as stored, its integers at their usual bits (`Form.nbytes` looks at the values)."""
    return sum(part.nbytes for part in stored_parts(name, shape).values())


def stored_nbytes_of(packed: Packed) -> int:
    """Bytes that this very matrix takes as stored."""
    plan = _plan(packed_format(packed), packed.shape, packed.nbytes)
    fits = {part: _fits(_lanes(packed, part), *how) for part, how in plan.narrow.items()}
    groups = packed.shape[0] * layout(packed_format(packed), packed.shape[1]).groups if fits else 0
    return sum(part.nbytes if fits.get(name, True) else groups for name, part in plan.parts.items())


def packed_format(packed: Packed) -> Format:
    """The row of a packed matrix's format."""
    return format_of(packed.format)


def to_stored(packed: Packed) -> dict[str, tuple[StoredPart, Array]]:
    """The parts of a matrix; `from_stored` of them is the same matrix, bit by bit."""
    fmt = packed_format(packed)
    plan = _plan(fmt, packed.shape, packed.nbytes)
    if fmt.name in AS_PACKED:
        return {"packed": (plan.parts["packed"], packed.data)}
    if fmt.coding == "vectors":
        index, books, scales = vector_parts(packed)
        arrays = {"index": index, "scale": scales.astype("<f2"), SHARED: books}
        return {name: (part, arrays[name]) for name, part in plan.parts.items()}
    found: dict[str, tuple[StoredPart, Array]] = {}
    for name, part in plan.parts.items():
        if name == "codes":
            found[name] = part, _dense_codes(packed, part)
        elif name in plan.narrow:
            found[name] = _integers(_lanes(packed, name), part, *plan.narrow[name])
        else:
            found[name] = part, np.ascontiguousarray(_lanes(packed, name)).view(part.numpy)
    return found


def from_stored(name: str, shape: tuple[int, int], parts: Mapping[str, tuple[StoredPart, U8]]) -> Packed:
    """The packed matrix of stored parts, each given with its raw bytes (uint8, one-dimensional).

    Raises FormatError where a part is missing, left over, of another type or size, or holds what the format does not
    allow (a scale that is not finite).
    """
    fmt = format_of(name)
    if fmt.name in AS_PACKED:
        return _as_packed(fmt, shape, parts)
    check_stored_parts(name, shape, {part: given for part, (given, _) in parts.items()})
    plan = _plan(fmt, shape)
    for part in plan.parts:
        given, raw = parts[part]
        if raw.nbytes != given.nbytes:
            raise FormatError(f"the part {part} of a {name} matrix {shape} has {raw.nbytes} bytes, not {given.nbytes}")
    if fmt.coding == "vectors":
        return _vectors(fmt, shape, parts)
    arrays: dict[str, Array] = {}
    for part in plan.parts:
        given, raw = parts[part]
        arrays[part] = _read(part, given, raw, plan, _wide(fmt, part, shape))
    _check(fmt, arrays)
    return _packed(fmt, shape, arrays)


def check_stored_parts(name: str, shape: tuple[int, int], parts: Mapping[str, StoredPart]) -> None:
    """Raises FormatError where a part is missing, left over, or of another type or shape than a matrix [out, in] of
    that format has; contents are not looked at."""
    fmt = format_of(name)
    if fmt.name in AS_PACKED:
        only = parts.get("packed")
        if set(parts) != {"packed"} or only is None or only.dtype != "U8" or len(only.shape) != 1:
            raise FormatError(f"a stored {name} matrix has the part packed alone, got {sorted(parts)}")
        return
    plan = _plan(fmt, shape)
    if set(parts) != set(plan.parts):
        raise FormatError(f"a stored {name} matrix has the parts {sorted(plan.parts)}, got {sorted(parts)}")
    for part, wanted in plan.parts.items():
        if parts[part] not in ((wanted, _wide(fmt, part, shape)) if part in plan.narrow else (wanted,)):
            raise FormatError(
                f"the part {part} of a {name} matrix {list(shape)} is {parts[part].dtype} {list(parts[part].shape)}, "
                f"expected {wanted.dtype} {list(wanted.shape)}"
            )


def pack_bits(codes: U8, bits: int) -> U8:
    """Codes [..., n] of at most `bits` bits as bytes [..., ceil(n * bits / 8)], the first code in the lowest bits."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    n = codes.shape[-1]
    padded = -(-n // 8) * 8
    if padded != n:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], padded - n), np.uint8)], axis=-1)
    if bits == 4:
        pairs = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
        return np.ascontiguousarray(pairs[..., : -(-n // 2)])
    eights = codes.reshape(*codes.shape[:-1], padded // 8, 8)
    words = np.zeros(eights.shape[:-1], "<u8")
    for i in range(8):
        words |= eights[..., i].astype("<u8") << np.uint64(i * bits)
    raw = words[..., None].view(np.uint8)[..., :bits]
    return np.ascontiguousarray(raw.reshape(*codes.shape[:-1], padded // 8 * bits)[..., : -(-n * bits // 8)])


def unpack_bits(raw: U8, bits: int, count: int) -> U8:
    """The reverse of `pack_bits`: bytes [..., m] as codes [..., count]."""
    if bits == 8:
        return np.ascontiguousarray(raw[..., :count])
    if bits == 4:
        pairs = np.empty((*raw.shape[:-1], raw.shape[-1] * 2), np.uint8)
        pairs[..., 0::2], pairs[..., 1::2] = raw & np.uint8(15), raw >> np.uint8(4)
        return np.ascontiguousarray(pairs[..., :count])
    eights = -(-count // 8)
    padded = np.zeros((*raw.shape[:-1], eights * bits), np.uint8)
    padded[..., : raw.shape[-1]] = raw
    words = np.zeros((*raw.shape[:-1], eights, 8), np.uint8)
    words[..., :bits] = padded.reshape(*raw.shape[:-1], eights, bits)
    whole = words.view("<u8")[..., 0]
    codes = np.empty((*whole.shape, 8), np.uint8)
    for i in range(8):
        codes[..., i] = (whole >> np.uint64(i * bits)) & np.uint64((1 << bits) - 1)
    return np.ascontiguousarray(codes.reshape(*raw.shape[:-1], eights * 8)[..., :count])


def _plan(fmt: Format, shape: tuple[int, int], nbytes: int = 0) -> _Plan:
    out = shape[0]
    if fmt.name in AS_PACKED:
        return _Plan({"packed": StoredPart("U8", (nbytes or packed_nbytes(fmt.name, shape),))}, {})
    if fmt.coding == "vectors":
        entries, groups = -(-shape[1] // VECTOR), layout(fmt, shape[1]).groups
        return _Plan(
            {
                "index": StoredPart("U8", (fmt.books, out, entries)),
                "scale": StoredPart("F16", (out, groups)),
                SHARED: StoredPart("I8", (fmt.books, BOOK, VECTOR)),
            },
            {},
        )
    if fmt.low == 0:
        return _Plan({"weights": StoredPart(_FILE_TYPES[fmt.scale], shape)}, {})
    plan = layout(fmt, shape[1])
    parts = {"codes": StoredPart("U8", (out, plan.width * fmt.bits // 8))}
    narrow: dict[str, tuple[int, int]] = {}
    parts["scale"] = StoredPart(_FILE_TYPES[fmt.scale], (out, plan.supers))
    if fmt.minimum:
        parts["minimum"] = parts["scale"]
    for name in ("zeros", "sub_scale", "sub_minimum"):
        if name not in plan.sections:
            continue
        how = (fmt.bits, -fmt.zero) if name == "zeros" else _SUB_BITS.get(fmt.name, (8, 0))
        if how[0] == 8:
            parts[name] = _wide(fmt, name, shape)
        else:
            narrow[name] = how
            parts[name] = StoredPart("U8", (-(-out * plan.groups * how[0] // 8),))
    return _Plan(parts, narrow)


def _wide(fmt: Format, name: str, shape: tuple[int, int]) -> StoredPart:
    kind = "U8" if name == "sub_scale" and fmt.float_subs else "I8"
    return StoredPart(kind, (shape[0], layout(fmt, shape[1]).groups if fmt.low else 0))


def _tiles(packed: Packed, plan: Layout, name: str) -> U8:
    section = plan.sections[name]
    return packed.data.reshape(-1, plan.tile_bytes)[:, section.offset : section.offset + section.nbytes]


def _lanes(packed: Packed, name: str) -> Array:
    """A section of parameters, or of float weights, as [out, count] in the type that the layout keeps."""
    fmt = packed_format(packed)
    plan = layout(fmt, packed.shape[1])
    dtype: npt.DTypeLike = np.uint8 if name == "sub_scale" and fmt.float_subs else np.int8
    if name in ("scale", "minimum", "weights"):
        dtype = _NUMPY[_FILE_TYPES[fmt.scale]]
    lanes = _tiles(packed, plan, name).view(dtype)
    count = lanes.shape[1] // TILE_ROWS
    rows = lanes.reshape(-1, count, TILE_ROWS).transpose(0, 2, 1).reshape(-1, count)
    return rows[: packed.shape[0]]


def _dense_codes(packed: Packed, part: StoredPart) -> U8:
    fmt = packed_format(packed)
    plan = layout(fmt, packed.shape[1])
    low, high = _tiles(packed, plan, "low"), _tiles(packed, plan, "high") if fmt.high else None
    dense = np.empty(part.shape, np.uint8)
    span = runs((packed.shape[0], max(plan.width, 1)))
    for start in span:
        tiles = slice(start // TILE_ROWS, (start + span.step) // TILE_ROWS)
        quads = _quads(low[tiles], fmt.low)
        if high is not None:
            quads |= _quads(high[tiles], fmt.high) << np.uint8(fmt.low)
        rows = dense[start : start + span.step]
        rows[:] = pack_bits(quads[: len(rows)], fmt.bits)
    return dense


def _quads(plane: U8, bits: int) -> U8:
    """A plane of tiles as codes [rows, width]."""
    tiles = len(plane)
    vectors = plane.reshape(tiles, -1, bits, TILE_ROWS, 4).transpose(0, 3, 1, 2, 4)  # [tiles, 16, blocks, bits, 4]
    return spread_plane(vectors, bits).reshape(tiles * TILE_ROWS, -1)


def _fits(values: Array, bits: int, low: int) -> bool:
    return not values.size or (int(values.min()) >= low and int(values.max()) < low + (1 << bits))


def _integers(values: Array, part: StoredPart, bits: int, low: int) -> tuple[StoredPart, Array]:
    if not _fits(values, bits, low):
        return StoredPart("I8", values.shape), np.ascontiguousarray(values)
    codes = (values.astype(np.int16) - low).astype(np.uint8)
    return part, pack_bits(codes.reshape(-1), bits)


def _read(name: str, part: StoredPart, raw: U8, plan: _Plan, wide: StoredPart) -> Array:
    if name in plan.narrow and part != wide:
        bits, low = plan.narrow[name]
        codes = unpack_bits(raw, bits, math.prod(wide.shape))
        return (codes.astype(np.int16) + low).astype(np.int8).reshape(wide.shape)
    return np.frombuffer(raw.tobytes(), part.numpy).reshape(part.shape) if name != "codes" else raw.reshape(part.shape)


def _check(fmt: Format, arrays: Mapping[str, Array]) -> None:
    for name in ("scale", "minimum"):
        if name not in arrays:
            continue
        values = widen_bf16(arrays[name]) if fmt.scale == "bf16" else arrays[name]
        bad = bool((values == 0xFF).any()) if fmt.scale == "e8m0" else not np.isfinite(values).all()
        if bad:
            raise FormatError(f"a {fmt.name} matrix has a {name} that is NaN or infinite")
    if fmt.float_subs and bool((arrays["sub_scale"] >= 0x7F).any()):
        raise FormatError(f"a {fmt.name} matrix has a sub-scale that is negative or NaN")
    limit = {"e4m3": 0x7F, "e5m2": 0x7C}.get(fmt.table)
    if limit is not None and bool(((arrays["codes"] & np.uint8(0x7F)) >= limit).any()):
        raise FormatError(f"a {fmt.name} matrix holds NaN or infinity")


def _packed(fmt: Format, shape: tuple[int, int], arrays: Mapping[str, Array]) -> Packed:
    packer = Packer(fmt.name, shape)
    span = runs((shape[0], max(packer.layout.width, 1)))
    for start in span:
        rows = slice(start, start + span.step)
        if fmt.low == 0:
            packer.add_floats(arrays["weights"][rows])
            continue
        codes = unpack_bits(arrays["codes"][rows], fmt.bits, packer.layout.width)[:, : shape[1]]
        scale, minimum = (None if n not in arrays else arrays[n][rows] for n in ("scale", "minimum"))
        assert scale is not None
        rest = (None if name not in arrays else arrays[name][rows] for name in ("sub_scale", "sub_minimum", "zeros"))
        packer.add(CodeRows(codes, _as_given(fmt, scale), None if minimum is None else _as_given(fmt, minimum), *rest))
    return packer.finish()


def _as_given(fmt: Format, values: Array) -> Array:
    """Scales as `Packer` takes them: bf16 as f32."""
    return widen_bf16(values) if fmt.scale == "bf16" else values


def _vectors(fmt: Format, shape: tuple[int, int], parts: Mapping[str, tuple[StoredPart, U8]]) -> Packed:
    """Raises FormatError for a scale that is not finite or entries whose sum is none."""
    arrays = {name: np.frombuffer(raw.tobytes(), part.numpy).reshape(part.shape) for name, (part, raw) in parts.items()}
    scales = arrays["scale"].astype(np.float32)
    if not np.isfinite(scales).all():
        raise FormatError(f"a scale of a {fmt.name} matrix is not finite")
    return pack_vectors(fmt.name, arrays["index"], arrays[SHARED], scales, shape[1])


def _as_packed(fmt: Format, shape: tuple[int, int], parts: Mapping[str, tuple[StoredPart, U8]]) -> Packed:
    check_stored_parts(fmt.name, shape, {part: given for part, (given, _) in parts.items()})
    raw = aligned_empty(parts["packed"][1].nbytes)
    raw[:] = parts["packed"][1]
    packed = Packed(fmt.name, shape, raw)
    plain = packed.plain()
    base = packed_format(plain)
    _check(base, {"scale": _lanes(plain, "scale" if base.low else "weights")})
    return packed
