"""Sparse and vector-coded matrices: where their bytes lie, and the plain tiles that hold the same values.

A coded format stands for a plain one, its base (`s8_g32` for `i8_g32`): the same scales, and codes that a kernel gets
out of fewer bytes. Tiles are of 16 rows, codes in quads [16 rows][4 inputs], as in packed_layout.

    mask      scale | mask [blocks][8 quads] of 64 bits, bit 4 * row + input: the code is not zero | values
              values, 8 bits: those codes, quad after quad, in the order of the bits
              values, 4 bits: two streams that share bytes, quads 0..3 of all blocks in the low nibbles, quads 4..7 in
              the high ones
    pairs     the same with two bits set in every four inputs of a row, so that quad q of a block begins at 32 q
    vectors   codebooks i8 [books][256][8] before the tiles | scale | index u8 [width / 8][books][16]
              codes 8 j .. 8 j + 7 of a row are the sum of the entries that its indices j name, within int8
    columns   scale f16 [16] (csr_i8) | starts u32 [17] | columns u16 | values (int8 or bf16): entries starts[r] ..
              starts[r + 1] are those of row r, columns ascending

`mask` and `columns` tiles differ in length: u64 [tiles + 1] in front of them says where each begins and the last one
ends, from the start of the matrix; 64 bytes follow, so that a kernel may load a whole vector at the end. Sections,
tiles and the table are padded to 64 bytes. Knows bytes, no kernels.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError
from inhouse.runtime.packed_formats import BLOCK, FORMATS, Format
from inhouse.runtime.packed_plan import (
    ALIGN,
    BOOK,
    TILE_ROWS,
    U8,
    VECTOR,
    Layout,
    aligned_empty,
    head_nbytes,
    layout,
    padded,
)

Index = npt.NDArray[np.int64]
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)  # bits set in a byte


class Tiles(NamedTuple):
    """Where the tiles of a coded matrix lie."""

    starts: Index  # [tiles + 1], from the start of the matrix
    plan: Layout


def tiles_of(fmt: Format, shape: tuple[int, int], data: U8) -> Tiles:
    """Raises FormatError where the table of a variable format leads out of the matrix."""
    plan = layout(fmt, shape[1])
    count, head = -(-shape[0] // TILE_ROWS), head_nbytes(fmt, shape)
    if not fmt.variable:
        return Tiles(head + np.arange(count + 1) * plan.tile_bytes, plan)
    if data.nbytes < head + ALIGN:
        raise FormatError(f"a {fmt.name} matrix of {count} tiles takes {head + ALIGN} bytes at least")
    starts = data[: 8 * (count + 1)].view("<i8")
    steps = np.diff(starts)
    fits = starts[0] == head and starts[-1] == data.nbytes - ALIGN and not np.any(starts % ALIGN)
    if not fits or np.any(steps < 0) or np.any(steps > plan.tile_bytes):
        raise FormatError(f"the table of tiles of a {fmt.name} matrix leads out of it")
    return Tiles(starts, plan)


def check_coded(fmt: Format, shape: tuple[int, int], data: U8) -> None:
    """Raises FormatError for a coded matrix whose parts do not fit one another; reads masks and columns."""
    found = tiles_of(fmt, shape, data)
    for tile in range(len(found.starts) - 1):
        raw = data[found.starts[tile] : found.starts[tile + 1]]
        if fmt.coding == "columns":
            _check_columns(fmt, shape[1], raw)
        elif fmt.coding != "vectors":
            _check_mask(fmt, found.plan, raw)
    if fmt.coding == "vectors":
        _check_sums(fmt, shape, data)


def _damaged(fmt: Format, what: str) -> FormatError:
    return FormatError(f"a packed {fmt.name} matrix has {what}", remedy="Make it again; a cache file may be deleted")


def _check_mask(fmt: Format, plan: Layout, raw: U8) -> None:
    section = plan.sections["mask"]
    if len(raw) < padded(section.offset + section.nbytes):
        raise _damaged(fmt, "a tile without its mask")
    bits = _ONES[raw[section.offset : section.offset + section.nbytes]]
    if fmt.coding == "pairs":
        mask = raw[section.offset : section.offset + section.nbytes]
        if np.any(bits != 4) or np.any(_ONES[mask & np.uint8(15)] != 2):
            raise _damaged(fmt, "four inputs of which not two are kept")
        return
    halves = bits.reshape(-1, 2, 32).sum(axis=(0, 2), dtype=np.int64)
    count = int(halves.sum() if fmt.low == 8 else halves.max(initial=0))
    if len(raw) != plan.sections["values"].offset + padded(count):
        raise _damaged(fmt, "a mask that does not fit its values")


def _check_columns(fmt: Format, inputs: int, raw: U8) -> None:
    head = padded(2 * TILE_ROWS) if fmt.low else 0
    at = head + padded(4 * (TILE_ROWS + 1))
    if len(raw) < at:
        raise _damaged(fmt, "a tile without its rows")
    starts = raw[head : head + 4 * (TILE_ROWS + 1)].view("<u4").astype(np.int64)
    count = int(starts[-1])
    if starts[0] != 0 or np.any(np.diff(starts) < 0):
        raise _damaged(fmt, "rows that do not follow one another")
    if len(raw) != at + padded(2 * count) + padded(count * (1 if fmt.low else 2)):
        raise _damaged(fmt, "columns that do not fit its values")
    columns = raw[at : at + 2 * count].view("<u2").astype(np.int64)
    rows = np.repeat(np.arange(TILE_ROWS), np.diff(starts))
    if columns.size and (columns.max() >= inputs or np.any(np.diff(rows * (1 << 17) + columns) <= 0)):
        raise _damaged(fmt, "columns that do not ascend within the matrix")


def _check_sums(fmt: Format, shape: tuple[int, int], data: U8) -> None:
    """Sums of codebook entries wrap where they leave int8; what wraps was not meant."""
    books = codebooks(fmt, data).astype(np.int16)
    most, least = books.max(axis=1).sum(axis=0), books.min(axis=1).sum(axis=0)
    if most.max(initial=0) <= 127 and least.min(initial=0) >= -128:
        return
    found = tiles_of(fmt, shape, data)
    for tile in range(len(found.starts) - 1):
        sums = _vector_sums(fmt, found.plan, books, data[found.starts[tile] : found.starts[tile + 1]])
        if sums.size and (sums.max() > 127 or sums.min() < -128):
            raise _damaged(fmt, "entries of codebooks whose sum is beyond int8")


def mask_count(plan: Layout, raw: U8) -> int:
    """Codes that a tile of a masked matrix keeps."""
    section = plan.sections["mask"]
    return int(_ONES[raw[section.offset : section.offset + section.nbytes]].sum(dtype=np.int64))


def codebooks(fmt: Format, data: U8) -> npt.NDArray[np.int8]:
    """The codebooks of a vector-coded matrix, int8 [books, 256, 8]."""
    return data[: fmt.books * BOOK * VECTOR].view(np.int8).reshape(fmt.books, BOOK, VECTOR)


def expand_tiles(fmt: Format, shape: tuple[int, int], data: U8, tiles: Index) -> U8:
    """The plain tiles (of format `fmt.base`) of some tiles, one after the other, 64-byte aligned."""
    found, base = tiles_of(fmt, shape, data), FORMATS[fmt.base]
    plain = layout(base, shape[1])
    out = aligned_empty(tiles.size * plain.tile_bytes)
    out[:] = 0
    rows = out.reshape(tiles.size, plain.tile_bytes)
    books = codebooks(fmt, data).astype(np.int16)
    for target, tile in zip(rows, tiles, strict=True):
        raw = data[found.starts[tile] : found.starts[tile + 1]]
        if fmt.coding == "columns":
            _expand_columns(fmt, shape[1], raw, target, plain)
            continue
        scale = found.plan.sections["scale"]
        target[: scale.nbytes] = raw[: scale.nbytes]
        if fmt.coding == "vectors":
            quads = _vector_quads(_vector_sums(fmt, found.plan, books, raw))
        else:
            quads = _masked_quads(fmt, found.plan, raw)
        low = plain.sections["low"]
        target[low.offset : low.offset + low.nbytes] = join_quads(quads, fmt.low)
    return out


def join_quads(quads: U8, bits: int) -> U8:
    """Quads [blocks, 8, 64] of 8- or 4-bit codes as the bytes of a low plane."""
    if bits == 8:
        return quads.reshape(-1)
    return (quads[:, :4] | (quads[:, 4:] << np.uint8(4))).reshape(-1)


def split_quads(low: U8, bits: int) -> U8:
    """The reverse of `join_quads`."""
    if bits == 8:
        return low.reshape(-1, 8, 64)
    four = low.reshape(-1, 4, 64)
    return np.concatenate([four & np.uint8(15), four >> np.uint8(4)], axis=1)


def _masked_quads(fmt: Format, plan: Layout, raw: U8) -> U8:
    section, values = plan.sections["mask"], raw[plan.sections["values"].offset :]
    bits = np.unpackbits(raw[section.offset : section.offset + section.nbytes], bitorder="little")
    kept = bits.reshape(-1, 8, 64).astype(bool)
    quads = np.full(kept.shape, fmt.zero, np.uint8)
    if fmt.low == 8:
        quads[kept] = values[: np.count_nonzero(kept)]
        return quads
    for half, stream in ((slice(0, 4), values & np.uint8(15)), (slice(4, 8), values >> np.uint8(4))):
        part = quads[:, half]
        part[kept[:, half]] = stream[: np.count_nonzero(kept[:, half])]
    return quads


def _vector_sums(fmt: Format, plan: Layout, books: npt.NDArray[np.int16], raw: U8) -> npt.NDArray[np.int16]:
    """Codes without the zero point, [width / 8, 16, 8]."""
    section = plan.sections["index"]
    index = raw[section.offset : section.offset + section.nbytes].reshape(-1, fmt.books, TILE_ROWS)
    sums = np.zeros((len(index), TILE_ROWS, VECTOR), np.int16)
    for book in range(fmt.books):
        sums += books[book][index[:, book]]
    return sums


def _vector_quads(sums: npt.NDArray[np.int16]) -> U8:
    codes = (sums + 128).astype(np.uint8).reshape(-1, TILE_ROWS, 2, 4).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(codes).reshape(-1, 8, 64)


def _expand_columns(fmt: Format, inputs: int, raw: U8, target: U8, plain: Layout) -> None:
    head = padded(2 * TILE_ROWS) if fmt.low else 0
    starts = raw[head : head + 4 * (TILE_ROWS + 1)].view("<u4").astype(np.int64)
    at, count = head + padded(4 * (TILE_ROWS + 1)), int(starts[-1])
    columns = raw[at : at + 2 * count].view("<u2").astype(np.int64)
    rows = np.repeat(np.arange(TILE_ROWS), np.diff(starts))
    at += padded(2 * count)
    if not fmt.low:
        floats = target[: plain.sections["weights"].nbytes].view("<u2").reshape(inputs, TILE_ROWS)
        floats[columns, rows] = raw[at : at + 2 * count].view("<u2")
        return
    target[: 2 * TILE_ROWS] = raw[: 2 * TILE_ROWS]
    codes = np.full((TILE_ROWS, plain.width), fmt.zero, np.uint8)
    codes[rows, columns] = raw[at : at + count] ^ np.uint8(128)
    low = plain.sections["low"]
    quads = codes.reshape(TILE_ROWS, plain.width // BLOCK, 8, 4).transpose(1, 2, 0, 3)
    target[low.offset : low.offset + low.nbytes] = np.ascontiguousarray(quads).reshape(-1)
