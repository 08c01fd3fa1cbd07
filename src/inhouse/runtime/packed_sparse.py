"""Making sparse and vector-coded matrices, and choosing among their formats: the door to what packed_expand describes.

Every one of them stands for a plain packed matrix, so that whoever prunes first packs plainly and then drops the
zeros: `to_sparse(packed, "s8_g32")`, exactly; `Packed.plain()` is the way back. Knows bytes, not how zeros are chosen.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UsageError
from inhouse.runtime.packed_expand import codebooks, mask_count, split_quads, tiles_of
from inhouse.runtime.packed_formats import FORMATS, Format, format_of
from inhouse.runtime.packed_layout import F32, I8, TILE_ROWS, U8, Packed
from inhouse.runtime.packed_pack import narrow_bf16
from inhouse.runtime.packed_plan import ALIGN, BOOK, VECTOR, Layout, aligned_empty, head_nbytes, layout, padded

Mask = npt.NDArray[np.bool_]
# Shares of weights kept below which a format is faster than the one before it (choose_sparse_format).
MASK_SHARE = {8: 0.8, 4: 0.55}  # bitmask rather than all codes
PAIRS_SHARE = 0.45  # of a 2:4 matrix: below, the bitmask has fewer bytes
COLUMNS_SHARE = 0.045  # columns rather than a bitmask of 8 bits
COLUMNS_FLOAT_SHARE = 0.2  # columns rather than bf16


def sparse_formats(base: str) -> tuple[str, ...]:
    """The sparse formats that a plain one can be turned into: bitmask, 2:4, columns."""
    return tuple(name for name, fmt in FORMATS.items() if fmt.base == base and fmt.coding != "vectors")


def to_sparse(packed: Packed, name: str) -> Packed:
    """The same values without their zeros, in a sparse format whose base is the matrix's own.

    Raises UsageError where the format is no sparse one of that base, or, for `p8_*` and `p4_*`, where more than two of
    four inputs in line are not zero.
    """
    fmt = format_of(name)
    if fmt.base != packed.format or fmt.coding == "vectors":
        known = ", ".join(sparse_formats(packed.format)) or "none"
        raise UsageError(f"format {name} is not a sparse form of {packed.format}", remedy=f"Those are: {known}")
    plain = layout(FORMATS[fmt.base], packed.shape[1])
    plan = layout(fmt, packed.shape[1])
    tiles = packed.data.reshape(-1, plain.tile_bytes)
    make = _columns_tile if fmt.coding == "columns" else _mask_tile
    return _join(fmt, packed.shape, [make(fmt, plan, plain, tile) for tile in tiles])


def pack_vectors(name: str, index: U8, books: I8, scales: F32, inputs: int | None = None) -> Packed:
    """A vector-coded matrix [out, in] out of uint8 indices [books, out, in / 8 rounded up], int8 codebooks
    [books, 256, 8] and scales [out, groups], exact in f16: value = scale * the sum of the entries.

    inputs: where `in` is no multiple of 8; what the last entries say beyond it meets inputs that are 0.

    Raises UsageError where a shape does not fit, or where a scale is not exact; FormatError where a sum of entries
    leaves int8.
    """
    fmt = format_of(name)
    if fmt.coding != "vectors" or index.ndim != 3 or index.shape[0] != fmt.books:
        raise UsageError(f"{list(index.shape)} indices do not fit format {name}")
    out, inputs = index.shape[1], index.shape[2] * VECTOR if inputs is None else inputs
    if -(-inputs // VECTOR) != index.shape[2]:
        raise UsageError(f"{index.shape[2]} indices a row are not those of {inputs} inputs")
    plan = layout(fmt, inputs)
    if books.shape != (fmt.books, BOOK, VECTOR) or books.dtype != np.int8 or scales.shape != (out, plan.groups):
        raise UsageError(
            f"format {name} of {out} x {inputs} takes codebooks [{fmt.books}, {BOOK}, {VECTOR}] of int8 and scales "
            f"[{out}, {plan.groups}], got {list(books.shape)} and {list(scales.shape)}"
        )
    if not np.array_equal(scales.astype(np.float16).astype(np.float32), scales):
        raise UsageError(f"a scale is not exact in f16, which format {name} keeps")
    rows = -(-out // TILE_ROWS) * TILE_ROWS
    padded_index = np.zeros((fmt.books, rows, plan.width // VECTOR), np.uint8)
    padded_index[:, :out, : index.shape[2]] = index
    padded_scales = np.zeros((rows, plan.groups), np.float16)
    padded_scales[:out] = scales
    data = aligned_empty(head_nbytes(fmt, (out, inputs)) + rows // TILE_ROWS * plan.tile_bytes)
    data[:] = 0
    data[: books.size] = books.reshape(-1).view(np.uint8)
    tiles = data[head_nbytes(fmt, (out, inputs)) :].reshape(-1, plan.tile_bytes)
    lanes = padded_scales.reshape(-1, TILE_ROWS, plan.groups).transpose(0, 2, 1)
    _put(tiles, plan, "scale", np.ascontiguousarray(lanes))
    entries = padded_index.reshape(fmt.books, -1, TILE_ROWS, plan.width // VECTOR).transpose(1, 3, 0, 2)
    _put(tiles, plan, "index", np.ascontiguousarray(entries))
    return Packed(name, (out, inputs), data)


def vector_parts(packed: Packed) -> tuple[U8, I8, F32]:
    """Indices [books, out, in / 8 rounded up], codebooks and scales of a vector-coded matrix: the reverse of
    `pack_vectors`."""
    fmt = format_of(packed.format)
    if fmt.coding != "vectors":
        raise UsageError(f"format {packed.format} has no codebooks")
    plan = layout(fmt, packed.shape[1])
    tiles = packed.data[head_nbytes(fmt, packed.shape) :].reshape(-1, plan.tile_bytes)
    section, out = plan.sections["index"], packed.shape[0]
    entries = tiles[:, section.offset : section.offset + section.nbytes].reshape(len(tiles), -1, fmt.books, TILE_ROWS)
    index = entries.transpose(2, 0, 3, 1).reshape(fmt.books, -1, plan.width // VECTOR)
    section = plan.sections["scale"]
    scales = np.ascontiguousarray(tiles[:, section.offset : section.offset + section.nbytes]).view(np.float16)
    rows = scales.reshape(len(tiles), plan.groups, TILE_ROWS).transpose(0, 2, 1).reshape(-1, plan.groups)
    kept = np.ascontiguousarray(index[:, :out, : -(-packed.shape[1] // VECTOR)])
    return kept, codebooks(fmt, packed.data).copy(), rows[:out].astype(np.float32)


def is_pairs(mask: Mask) -> bool:
    """Whether at most two of every four inputs in line are kept; mask [out, in], true: kept."""
    fours = -(-mask.shape[1] // 4) * 4
    whole = np.zeros((mask.shape[0], fours), bool)
    whole[:, : mask.shape[1]] = mask
    return not whole.size or int(whole.reshape(mask.shape[0], -1, 4).sum(axis=2).max()) <= 2


def choose_sparse_format(mask: Mask, bits: int, group: str = "g32") -> str:
    """The format in which a pruned matrix is multiplied fastest at one row: the plain one, a bitmask, 2:4 or columns.

    Args:
        mask: bool [out, in], true: kept.
        bits: of a value: 4, 8, or 16 for bf16.
        group: the end of the name of a format of codes: g32, g64, g128 or row.

    The shares are measured break-evens of AVX-512 (`python -m bench.compress.sparse_speed zeros`,
    docs/performance-log.md). At lower levels, which expand a mask by table, a bitmask saves bytes and no time. Columns
    have one scale a row, so that they stand in for codes of 8 bits in any group only by packing anew.

    Raises UsageError for other bits or groups.
    """
    if bits not in (4, 8, 16) or group not in ("g32", "g64", "g128", "row"):
        raise UsageError(f"{bits} bits in groups {group!r} have no sparse formats", remedy="4, 8 or 16; g32 ... row")
    kept = float(mask.mean()) if mask.size else 1.0
    if bits == 16:
        return "csr_bf16" if kept < COLUMNS_FLOAT_SHARE else "bf16"
    if bits == 8 and group == "row" and kept < COLUMNS_SHARE:
        return "csr_i8"
    if kept > MASK_SHARE[bits]:
        return f"i{bits}_{group}"
    return f"{'p' if kept > PAIRS_SHARE and is_pairs(mask) else 's'}{bits}_{group}"


def _put(tiles: U8, plan: Layout, name: str, values: npt.NDArray[np.generic]) -> None:
    section = plan.sections[name]
    tiles[:, section.offset : section.offset + section.nbytes] = values.reshape(len(tiles), -1).view(np.uint8)


def _filled(parts: Sequence[U8]) -> U8:
    """Sections one after the other, each padded with zeros."""
    out = np.zeros(sum(padded(part.nbytes) for part in parts), np.uint8)
    at = 0
    for part in parts:
        out[at : at + part.nbytes] = part
        at += padded(part.nbytes)
    return out


def _join(fmt: Format, shape: tuple[int, int], tiles: list[U8]) -> Packed:
    starts = np.cumsum([head_nbytes(fmt, shape), *(tile.nbytes for tile in tiles)], dtype=np.int64)
    data = aligned_empty(int(starts[-1]) + (ALIGN if fmt.variable else 0))
    data[: starts[0]] = 0
    data[starts[-1] :] = 0
    if fmt.variable:
        data[: starts.nbytes] = starts.astype("<i8").view(np.uint8)
    for start, tile in zip(starts[:-1], tiles, strict=True):
        data[start : start + tile.nbytes] = tile
    return Packed(fmt.name, shape, data)


def _mask_tile(fmt: Format, plan: Layout, plain: Layout, tile: U8) -> U8:
    low, scale = plain.sections["low"], plan.sections["scale"]
    quads = split_quads(tile[low.offset : low.offset + low.nbytes], fmt.low)
    kept = quads != np.uint8(fmt.zero)
    if fmt.coding == "pairs":
        kept = _two_of_four(fmt, kept)
    if fmt.low == 8:
        values = quads[kept]
    else:
        first, second = (quads[:, half][kept[:, half]] for half in (slice(0, 4), slice(4, 8)))
        values = np.zeros(max(first.size, second.size), np.uint8)
        values[: first.size] = first
        values[: second.size] |= second << np.uint8(4)
    return _filled([tile[: scale.nbytes], np.packbits(kept.reshape(-1), bitorder="little"), values])


def _two_of_four(fmt: Format, kept: Mask) -> Mask:
    """Exactly two of every four: where fewer are not zero, the first zeros are kept as well."""
    fours = kept.reshape(-1, 4)
    if fours.size and int(fours.sum(axis=1).max()) > 2:
        raise UsageError(
            f"format {fmt.name} keeps two of every four inputs, the matrix has more that are not zero",
            remedy="Prune it to 2:4 first, or take a bitmask",
        )
    order = np.argsort(~fours, axis=1, kind="stable")[:, :2]
    two = np.zeros_like(fours)
    np.put_along_axis(two, order, True, axis=1)
    return two.reshape(kept.shape)


def _columns_tile(fmt: Format, plan: Layout, plain: Layout, tile: U8) -> U8:
    if fmt.low:
        low = plain.sections["low"]
        quads = tile[low.offset : low.offset + low.nbytes].reshape(-1, 8, TILE_ROWS, 4)
        dense = quads.transpose(2, 0, 1, 3).reshape(TILE_ROWS, -1)
        kept = dense != np.uint8(fmt.zero)
        values = (dense[kept] ^ np.uint8(128)).reshape(-1)
        head = [tile[: 2 * TILE_ROWS]]
    else:
        floats = tile[: plain.sections["weights"].nbytes].view("<u2").reshape(-1, TILE_ROWS).T
        kept = (floats & np.uint16(0x7FFF)) != 0
        values = np.ascontiguousarray(floats[kept]).view(np.uint8)
        head = []
    starts = np.zeros(TILE_ROWS + 1, "<u4")
    np.cumsum(kept.sum(axis=1), out=starts[1:])
    columns = np.nonzero(kept)[1].astype("<u2")
    return _filled([*head, starts.view(np.uint8), columns.view(np.uint8), values])


def pack_columns(array: F32) -> Packed:
    """Floats [out, in] as `csr_bf16`: those that are not zero, rounded to bf16 (nearest, ties to even)."""
    bits = narrow_bf16(array)
    out, inputs = array.shape
    fmt = FORMATS["csr_bf16"]
    plan, plain = layout(fmt, inputs), layout(FORMATS["bf16"], inputs)
    tiles = []
    for start in range(0, out, TILE_ROWS):
        tile = np.zeros((inputs, TILE_ROWS), "<u2")
        part = bits[start : start + TILE_ROWS]
        tile[:, : len(part)] = part.T
        tiles.append(_columns_tile(fmt, plan, plain, tile.reshape(-1).view(np.uint8)))
    return _join(fmt, (out, inputs), tiles)


def kept_share(packed: Packed) -> float:
    """Share of the weights that a sparse matrix keeps a value for, padding not counted."""
    fmt = format_of(packed.format)
    if fmt.coding not in ("mask", "pairs", "columns") or not packed.shape[0]:
        raise UsageError(f"format {packed.format} is not sparse")
    found = tiles_of(fmt, packed.shape, packed.data)
    count = 0
    for tile in range(len(found.starts) - 1):
        raw = packed.data[found.starts[tile] : found.starts[tile + 1]]
        if fmt.coding == "columns":
            at = padded(2 * TILE_ROWS) if fmt.low else 0
            count += int(raw[at + 4 * TILE_ROWS : at + 4 * TILE_ROWS + 4].view("<u4")[0])
        else:
            count += mask_count(found.plan, raw)
    return count / (packed.shape[0] * packed.shape[1])
