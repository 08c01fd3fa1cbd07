"""Where the parts of a tile lie and how long a matrix is, for each packed format. The bytes themselves are described in
packed_layout, those of sparse and vector-coded formats in packed_expand. Knows no values."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnsupportedError
from inhouse.runtime.packed_formats import BLOCK, SCALAR_BYTES, Format, format_of

U8 = npt.NDArray[np.uint8]

LAYOUT_VERSION = 2  # part of every cache key; raise it when any byte moves
TILE_ROWS = 16
SUPER = 256  # inputs of a two-level super-block
MAX_GROUPS = 4096  # blocks (or groups of 16) in a row: what a native kernel prepares on its stack
ALIGN = 64
VECTOR = 8  # inputs of an entry of a codebook
BOOK = 256  # entries of a codebook
CODED_INPUTS = 61440  # of a coded matrix: a tile of its base is then within what a native kernel unpacks at once
CHUNK_ELEMENTS = 1 << 22  # rows are unpacked and packed in runs of about this many elements


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
    if fmt.coding:
        return _coded_layout(fmt, inputs)
    if fmt.low == 0:
        count = inputs
        return _layout(inputs, count, count, {"weights": inputs * TILE_ROWS * SCALAR_BYTES[fmt.scale]})
    width, groups, supers = _groups(fmt, inputs)
    per = supers * TILE_ROWS * SCALAR_BYTES[fmt.scale]
    sizes = {"scale": per}
    if fmt.zeros:
        sizes["zeros"] = groups * TILE_ROWS
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
    return _layout(width, groups, supers, sizes)


def _groups(fmt: Format, inputs: int) -> tuple[int, int, int]:
    """Inputs padded to whole blocks, groups and supers of a row; the last group of a row may have fewer blocks than
    the others."""
    width = -(-inputs // BLOCK) * BLOCK
    supers_of = fmt.two_level and not fmt.float_subs
    if supers_of and width % SUPER:
        raise UnsupportedError(f"format {fmt.name} needs inputs in multiples of {SUPER}, got {inputs}")
    if width // min(fmt.group or BLOCK, BLOCK) > MAX_GROUPS:
        raise UnsupportedError(f"format {fmt.name} takes at most {MAX_GROUPS} groups in a row, got {inputs} inputs")
    groups = -(-width // fmt.group) if fmt.group else 1
    return width, groups, 1 if fmt.float_subs else width // SUPER if supers_of else groups


def _coded_layout(fmt: Format, inputs: int) -> Layout:
    """Sections of a tile; those of a variable format as long as they can be (`values` is then cut to what there is)."""
    if inputs > CODED_INPUTS:
        raise UnsupportedError(f"format {fmt.name} takes at most {CODED_INPUTS} inputs, got {inputs}")
    if fmt.coding == "columns":
        item = 1 if fmt.low else 2
        sizes = {"scale": 2 * TILE_ROWS} if fmt.low else {}
        sizes |= {"starts": 4 * (TILE_ROWS + 1), "columns": 2 * inputs * TILE_ROWS, "values": item * inputs * TILE_ROWS}
        return _layout(inputs, 1, 1, sizes)
    width, groups, supers = _groups(fmt, inputs)
    blocks = width // BLOCK
    sizes = {"scale": groups * TILE_ROWS * SCALAR_BYTES[fmt.scale]}
    if fmt.coding == "vectors":
        sizes["index"] = width // VECTOR * fmt.books * TILE_ROWS
    else:
        sizes["mask"] = blocks * ALIGN
        sizes["values"] = blocks * fmt.low * (ALIGN // 2 if fmt.coding == "pairs" else ALIGN)
    return _layout(width, groups, supers, sizes)


def _layout(width: int, groups: int, supers: int, sizes: dict[str, int]) -> Layout:
    offset, sections = 0, {}
    for name, size in sizes.items():
        sections[name] = Section(offset, size)
        offset += padded(size)
    return Layout(width, groups, supers, sections, offset)


def padded(nbytes: int) -> int:
    """The next multiple of ALIGN."""
    return -(-nbytes // ALIGN) * ALIGN


def head_nbytes(fmt: Format, shape: tuple[int, int]) -> int:
    """Bytes of a matrix in front of its tiles: codebooks, or the table of where variable tiles begin."""
    if fmt.variable:
        return padded(8 * (-(-shape[0] // TILE_ROWS) + 1))
    return fmt.books * BOOK * VECTOR


def packed_nbytes(name: str, shape: tuple[int, int]) -> int:
    """Bytes that a matrix [out, in] takes in this format, of a variable format at most; raises UnsupportedError if it
    does not fit."""
    fmt = format_of(name)
    tiles = -(-shape[0] // TILE_ROWS) * layout(fmt, shape[1]).tile_bytes
    return head_nbytes(fmt, shape) + tiles + (ALIGN if fmt.variable else 0)


def bits_per_weight(name: str, inputs: int = 4096) -> float:
    """Bits a weight, scales included, for that many inputs (padding counts only where there is some)."""
    return layout(format_of(name), inputs).tile_bytes * 8 / (TILE_ROWS * inputs)


def aligned_empty(nbytes: int) -> U8:
    """Uninitialised bytes that start on a 64-byte boundary."""
    buffer = np.empty(nbytes + ALIGN, np.uint8)
    start = -buffer.ctypes.data % ALIGN
    return buffer[start : start + nbytes]
