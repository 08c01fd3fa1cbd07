"""A run of bytes as what must be added to an older run: integer differences, exclusive or, or nothing older at all.

Knows elements and planes of bytes; does not know files. Differences of neighbouring versions of a tensor are small
integers once floats are read as ordered integers; folded to unsigned and split into planes of equal bytes they
compress to a fraction of what a general binary difference reaches (compare ZipNN, arXiv 2411.05239). Those of floats
of two bytes are coded one by one (`delta_entropy`), under the exponent of the base.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from inhouse.core.errors import FormatError
from inhouse.store import delta_entropy as entropy

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
Unsigned = npt.NDArray[Any]  # of unsigned integers of any width
LEVEL = 9
SAMPLE = 1 << 18  # bytes of a piece on which the ways are tried
PIECE = 1 << 24  # bytes that are worked on at once

SAME, DIFFERENCE, XOR, SPARSE, PLAIN, CODED = "same", "diff", "xor", "sparse", "plain", "coded"
NARROW = {"BF16": 7, "F16": 10}  # floats of two bytes, whose differences are coded: bits of the mantissa
SPARSE_SHARE = 0.1  # of the elements: where more have changed, planes of zeros compress as well as gaps
CONTEXTS = 16
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_UNSIGNED: Mapping[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def encode(new: U8, base: U8 | None, width: int, dtype: str) -> tuple[str, bytes]:
    """The shortest of the ways to say `new`, and its compressed bytes.

    Args:
        new, base: uint8 [n] of equal length, n a multiple of `width`; base None: there is no older run.
        width: bytes an element, 1, 2, 4 or 8.
        dtype: F64, F32, F16 and BF16 are ordered as floats; others as unsigned integers.
    """
    if base is not None and np.array_equal(new, base):
        return SAME, b""
    ways = [PLAIN]
    if base is not None:
        changed = np.count_nonzero(new.view(_UNSIGNED[width]) != base.view(_UNSIGNED[width])) * width
        ways = [DIFFERENCE, XOR, *((SPARSE,) if changed <= SPARSE_SHARE * new.size else ()), PLAIN]
        ways += [CODED] if dtype in NARROW and width == 2 else []
    if len(ways) > 1 and new.size > SAMPLE:
        middle = new.size // 2 // width * width
        part = slice(middle - SAMPLE // 2, middle + SAMPLE // 2)
        ways = sorted(ways, key=lambda way: len(_encode(way, new[part], _part(base, part), width, dtype)))[:1]
    made = [(way, _encode(way, new, base, width, dtype)) for way in ways]
    return min(made, key=lambda entry: len(entry[1]))


def decode(way: str, payload: bytes, size: int, base: U8 | None, width: int, dtype: str) -> U8:
    """The run of `size` bytes again. Raises FormatError for a payload that is none."""
    if way == SAME:
        if base is None:
            raise FormatError("the delta copies from nothing")
        return base
    if way == SPARSE:
        if base is None or base.size != size:
            raise FormatError("the delta changes a run that the base does not have")
        return _decode_sparse(payload, base, width, dtype)
    if way == CODED:
        if base is None or base.size != size or width != 2 or dtype not in NARROW:
            raise FormatError("the delta codes differences of what are no floats of two bytes")
        bits = base.view(np.uint16)
        change = entropy.decode(payload, _contexts(bits, dtype))
        return _unordered(_ordered(bits, dtype) + _unfold(change), dtype).view(np.uint8)
    planes = _decompress(payload, size)
    folded = np.ascontiguousarray(planes.reshape(width, -1).T).reshape(-1)
    if way == PLAIN:
        return folded
    if base is None or base.size != size:
        raise FormatError("the delta changes a run that the base does not have")
    if way == XOR:
        return folded ^ base
    if way == DIFFERENCE:
        kind = _UNSIGNED[width]
        return _unordered(_ordered(base.view(kind), dtype) + _unfold(folded.view(kind)), dtype).view(np.uint8)
    raise FormatError(f"the delta has a step of an unknown kind {way[:20]!r}")


def compress(data: bytes) -> bytes:
    """zstd, with its content size in the frame."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(data)


def _part(base: U8 | None, part: slice) -> U8 | None:
    return None if base is None else base[part]


def _encode(way: str, new: U8, base: U8 | None, width: int, dtype: str) -> bytes:
    kind = _UNSIGNED[width]
    if way == SPARSE:
        assert base is not None
        return _encode_sparse(new.view(kind), base.view(kind), width, dtype)
    if way in (DIFFERENCE, CODED):
        assert base is not None
        change = _ordered(new.view(kind), dtype) - _ordered(base.view(kind), dtype)
        if way == CODED:
            return entropy.encode(_fold(change), _contexts(base.view(np.uint16), dtype))
        new = _fold(change).view(np.uint8)
    elif way == XOR:
        assert base is not None
        new = new ^ base
    return compress(np.ascontiguousarray(new.reshape(-1, width).T).tobytes())


def _contexts(bits: U16, dtype: str) -> U8:
    """What the base says of how far its elements will have moved, counted in their last bits: their exponents, from the
    largest down. A step of an optimiser is about as large for small weights as for large ones."""
    exponents = (bits & 0x7FFF) >> NARROW[dtype]
    counts = np.cumsum(np.bincount(exponents))
    top = int(np.searchsorted(counts, counts[-1] - counts[-1] // 1000))  # a few outliers would take all contexts
    return np.clip(top + 1 - exponents.astype(np.int64), 0, CONTEXTS - 1).astype(np.uint8)


def _encode_sparse(new: Unsigned, base: Unsigned, width: int, dtype: str) -> bytes:
    """How many elements changed (u64), the gaps between them in bytes (255: 255 more, and go on), their folded
    differences as planes."""
    at = np.flatnonzero(new != base)
    gaps = np.diff(at, prepend=-1) - 1
    each = gaps // 255 + 1
    steps = np.full(int(each.sum()), 255, np.uint8)
    steps[np.cumsum(each) - 1] = gaps % 255
    change = _fold(_ordered(new[at], dtype) - _ordered(base[at], dtype)).view(np.uint8)
    planes = np.ascontiguousarray(change.reshape(-1, width).T)
    return compress(
        len(at).to_bytes(8, "little") + len(steps).to_bytes(8, "little") + steps.tobytes() + planes.tobytes()
    )


def _decode_sparse(payload: bytes, base: U8, width: int, dtype: str) -> U8:
    kind = _UNSIGNED[width]
    raw = _decompress(payload, None, 24 + base.size * 2)
    if raw.size < 16:
        raise FormatError("a part of the delta is cut short")
    count, steps = (int.from_bytes(raw[i : i + 8].tobytes(), "little") for i in (0, 8))
    if count > base.size // width or steps > base.size or raw.size != 16 + steps + count * width:
        raise FormatError("a part of the delta does not hold what it announces")
    gaps, ends = raw[16 : 16 + steps], raw[16 : 16 + steps] != 255
    places = np.cumsum(gaps.astype(np.int64))[ends] + np.arange(int(ends.sum()))
    if len(places) != count or (count and int(places[-1]) >= base.size // width):
        raise FormatError("a part of the delta changes elements beyond the run")
    change = np.ascontiguousarray(raw[16 + steps :].reshape(width, -1).T).reshape(-1).view(kind)
    out = base.view(kind).copy()
    out[places] = _unordered(_ordered(out[places], dtype) + _unfold(change), dtype)
    return out.view(np.uint8)


def _decompress(payload: bytes, size: int | None, most: int = 0) -> U8:
    """The content, of that size, or of at most `most` bytes."""
    try:
        found = zstandard.frame_content_size(payload)
        if found != size and (size is not None or not 0 <= found <= most):
            raise FormatError(f"a part of the delta holds {found} bytes, {size or most} were expected")
        size = found
        return np.frombuffer(zstandard.ZstdDecompressor().decompress(payload, max_output_size=size), np.uint8)
    except zstandard.ZstdError as error:
        raise FormatError(f"a part of the delta does not decompress: {error}") from None


def _ordered(bits: Unsigned, dtype: str) -> Unsigned:
    """Bit patterns of floats as integers in the order of the floats; others as they are."""
    if dtype not in _FLOATS:
        return bits
    top = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    return np.where(bits & top, ~bits, bits | top)


def _unordered(values: Unsigned, dtype: str) -> Unsigned:
    if dtype not in _FLOATS:
        return values
    top = values.dtype.type(1 << (8 * values.itemsize - 1))
    return np.where(values & top, values ^ top, ~values)


def _fold(change: Unsigned) -> Unsigned:
    """Signed differences, as they stand in unsigned integers, to 0, -1, 1, -2, ... -> 0, 1, 2, 3, ..."""
    one = change.dtype.type(1)
    negative = change >> change.dtype.type(8 * change.itemsize - 1)
    folded: Unsigned = (change << one) ^ (change.dtype.type(0) - negative)
    return folded


def _unfold(folded: Unsigned) -> Unsigned:
    one = folded.dtype.type(1)
    change: Unsigned = (folded >> one) ^ (folded.dtype.type(0) - (folded & one))
    return change
