"""From GGUF blocks to the packed layout, without changing a value.

The bit positions of each block type are those of ggml's `ggml-common.h` and the `gguf` package, which the tests
take as oracle. A table row gives the block's size and the function that reads it; knows nothing of GGUF files.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, UnsupportedError, UsageError
from inhouse.runtime.packed_layout import I8, U8, Packed
from inhouse.runtime.packed_pack import CodeRows, Packer, pack_float, runs

Array = npt.NDArray[Any]


class _Block(NamedTuple):
    nbytes: int
    elements: int
    read: Callable[[U8], CodeRows]  # blocks [n, blocks a row, nbytes] -> rows


def _f16(part: U8) -> Array:
    """Two bytes a block -> f16 [n, blocks]."""
    return np.ascontiguousarray(part).view(np.float16)[..., 0]


def _halves(part: U8) -> U8:
    """Nibbles of [.., m] bytes -> [.., 2 m]: all low ones, then all high ones."""
    return np.concatenate([part & np.uint8(15), part >> np.uint8(4)], axis=-1)


def _bits(part: U8, count: int, bits: int) -> U8:
    """Bytes [.., m] -> [.., count, m]: field i of each byte is `bits` wide at position i * bits."""
    shifts = np.arange(0, count * bits, bits, dtype=np.uint8)
    return (part[..., None, :] >> shifts[:, None]) & np.uint8((1 << bits) - 1)


def _rows(codes: U8) -> U8:
    return np.ascontiguousarray(codes).reshape(len(codes), -1)


def _fifth(part: U8) -> U8:
    """Four bytes -> 32 bits in order, each worth 16."""
    return np.unpackbits(np.ascontiguousarray(part), axis=-1, bitorder="little") << np.uint8(4)


def _q4_0(b: U8) -> CodeRows:
    return CodeRows(_rows(_halves(b[..., 2:])), _f16(b[..., :2]))


def _q4_1(b: U8) -> CodeRows:
    return CodeRows(_rows(_halves(b[..., 4:])), _f16(b[..., :2]), _f16(b[..., 2:4]))


def _q5_0(b: U8) -> CodeRows:
    return CodeRows(_rows(_halves(b[..., 6:]) | _fifth(b[..., 2:6])), _f16(b[..., :2]))


def _q5_1(b: U8) -> CodeRows:
    codes = _rows(_halves(b[..., 8:]) | _fifth(b[..., 4:8]))
    return CodeRows(codes, _f16(b[..., :2]), _f16(b[..., 2:4]))


def _q8_0(b: U8) -> CodeRows:
    return CodeRows(_rows(b[..., 2:] ^ np.uint8(128)), _f16(b[..., :2]))


def _flat8(part: Array) -> I8:
    return np.ascontiguousarray(part).view(np.int8).reshape(len(part), -1)


def _q2_k(b: U8) -> CodeRows:
    codes = _bits(b[..., 16:80].reshape(*b.shape[:2], 2, 32), 4, 2)
    sub = b[..., :16]
    return CodeRows(
        _rows(codes), _f16(b[..., 80:82]), _f16(b[..., 82:84]), _flat8(sub & np.uint8(15)), _flat8(sub >> np.uint8(4))
    )


def _q3_k(b: U8) -> CodeRows:
    low = _bits(b[..., 32:96].reshape(*b.shape[:2], 2, 32), 4, 2)
    high = _bits(b[..., :32], 8, 1).reshape(low.shape) << np.uint8(2)  # a set bit means that no 4 is taken off
    s = b[..., 96:108]
    sub = _halves(s[..., :8]) | (_bits(s[..., 8:12], 4, 2).reshape(*b.shape[:2], 16) << np.uint8(4))
    return CodeRows(_rows(low | high), _f16(b[..., 108:110]), sub_scales=_flat8(sub.view(np.int8) - np.int8(32)))


def _sixes(s: U8) -> tuple[I8, I8]:
    """The 12 bytes of Q4_K and Q5_K -> 8 six-bit sub-scales and 8 sub-minimums."""
    d, m, both = s[..., :4], s[..., 4:8], s[..., 8:]
    six, two = np.uint8(63), np.uint8(0x30)
    scales = np.concatenate([d & six, (both & np.uint8(15)) | ((d >> np.uint8(2)) & two)], axis=-1)
    minimums = np.concatenate([m & six, (both >> np.uint8(4)) | ((m >> np.uint8(2)) & two)], axis=-1)
    return _flat8(scales), _flat8(minimums)


def _q4_k(b: U8) -> CodeRows:
    codes = _bits(b[..., 16:].reshape(*b.shape[:2], 4, 32), 2, 4)
    return CodeRows(_rows(codes), _f16(b[..., :2]), _f16(b[..., 2:4]), *_sixes(b[..., 4:16]))


def _q5_k(b: U8) -> CodeRows:
    low = _bits(b[..., 48:].reshape(*b.shape[:2], 4, 32), 2, 4)
    high = _bits(b[..., 16:48], 8, 1).reshape(low.shape) << np.uint8(4)
    return CodeRows(_rows(low | high), _f16(b[..., :2]), _f16(b[..., 2:4]), *_sixes(b[..., 4:16]))


def _q6_k(b: U8) -> CodeRows:
    low = _bits(b[..., :128].reshape(*b.shape[:2], 2, 64), 2, 4).reshape(*b.shape[:2], 2, 4, 32)
    high = _bits(b[..., 128:192].reshape(*b.shape[:2], 2, 32), 4, 2) << np.uint8(4)
    return CodeRows(_rows(low | high), _f16(b[..., 208:210]), sub_scales=_flat8(b[..., 192:208]))


def _iq4_nl(b: U8) -> CodeRows:
    return CodeRows(_rows(_halves(b[..., 2:])), _f16(b[..., :2]))


def _iq4_xs(b: U8) -> CodeRows:
    high = np.ascontiguousarray(b[..., 2:4]).view("<u2")[..., 0]
    low = _bits(b[..., 4:8], 2, 4).swapaxes(-1, -2).reshape(*b.shape[:2], 8)
    two = ((high[..., None] >> np.arange(0, 16, 2, dtype=np.uint16)) & 3).astype(np.uint8)
    codes = _halves(b[..., 8:].reshape(*b.shape[:2], 8, 16))
    return CodeRows(
        _rows(codes), _f16(b[..., :2]), sub_scales=_flat8((low | (two << np.uint8(4))).view(np.int8) - np.int8(32))
    )


def _mxfp4(b: U8) -> CodeRows:
    return CodeRows(_rows(_halves(b[..., 1:])), np.ascontiguousarray(b[..., 0]))


def _nvfp4(b: U8) -> CodeRows:
    codes = _halves(b[..., 4:].reshape(*b.shape[:2], 4, 8))
    raw = np.ascontiguousarray(b[..., :4]).reshape(len(b), -1)
    sub = np.where(raw == 127, np.uint8(0), raw & np.uint8(127))  # ggml reads the NaN of e4m3 as 0
    return CodeRows(_rows(codes), np.full((len(b), 1), 0.5, np.float32), sub_scales=sub)


def _tq2_0(b: U8) -> CodeRows:
    codes = _bits(b[..., :64].reshape(*b.shape[:2], 2, 32), 4, 2)
    return CodeRows(_rows(codes), _f16(b[..., 64:66]))


def _trits(part: U8, count: int) -> U8:
    """Bytes [.., m] that hold `count` ternary digits each, as fractions of 256 -> [.., count * m] digits."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:count, None]
    digits = ((part[..., None, :] * powers).astype(np.uint16) * 3) >> 8
    return digits.astype(np.uint8).reshape(*part.shape[:-1], -1)


def _tq1_0(b: U8) -> CodeRows:
    codes = np.concatenate([_trits(b[..., :32], 5), _trits(b[..., 32:48], 5), _trits(b[..., 48:52], 4)], axis=-1)
    return CodeRows(_rows(codes), _f16(b[..., 52:54]))


_BLOCKS: Mapping[str, _Block] = {
    "Q4_0": _Block(18, 32, _q4_0),
    "Q4_1": _Block(20, 32, _q4_1),
    "Q5_0": _Block(22, 32, _q5_0),
    "Q5_1": _Block(24, 32, _q5_1),
    "Q8_0": _Block(34, 32, _q8_0),
    "Q2_K": _Block(84, 256, _q2_k),
    "Q3_K": _Block(110, 256, _q3_k),
    "Q4_K": _Block(144, 256, _q4_k),
    "Q5_K": _Block(176, 256, _q5_k),
    "Q6_K": _Block(210, 256, _q6_k),
    "IQ4_NL": _Block(18, 32, _iq4_nl),
    "IQ4_XS": _Block(136, 256, _iq4_xs),
    "MXFP4": _Block(17, 32, _mxfp4),
    "NVFP4": _Block(36, 64, _nvfp4),
    "TQ1_0": _Block(54, 256, _tq1_0),
    "TQ2_0": _Block(66, 256, _tq2_0),
}
_FLOATS: Mapping[str, tuple[str, npt.DTypeLike]] = {
    "F32": ("f32", np.float32),
    "F16": ("f16", np.float16),
    "BF16": ("bf16", np.uint16),
}


def gguf_types() -> tuple[str, ...]:
    """GGUF types that load into the packed layout exactly."""
    return (*_FLOATS, *_BLOCKS)


def gguf_format(ggml_type: str) -> str:
    """The packed format that keeps a GGUF type; raises UnsupportedError for a type without one."""
    if ggml_type in _FLOATS:
        return _FLOATS[ggml_type][0]
    if ggml_type in _BLOCKS:
        return "tq2_0" if ggml_type == "TQ1_0" else ggml_type.lower()  # ternary digits become codes of two bits
    raise UnsupportedError(f"GGUF type {ggml_type} has no packed form", remedy=f"Supported: {', '.join(gguf_types())}")


def pack_gguf(raw: U8, ggml_type: str, shape: tuple[int, int], rows: npt.NDArray[np.int64] | None = None) -> Packed:
    """Packs a GGUF tensor, values unchanged.

    Args:
        raw: its bytes, uint8 [nbytes].
        ggml_type: one of `gguf_types()`.
        shape: [out, in] of the tensor.
        rows: the source rows to take, in this order; all, if None. The result is then [len(rows), in].

    Raises:
        UnsupportedError: another type. FormatError: bytes and shape disagree. UsageError: a row outside the matrix.
    """
    name = gguf_format(ggml_type)
    flat = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    block = _BLOCKS.get(ggml_type)
    itemsize = 0 if block else np.dtype(_FLOATS[ggml_type][1]).itemsize
    per_row = shape[1] // block.elements * block.nbytes if block else shape[1] * itemsize
    if (block and shape[1] % block.elements) or flat.nbytes != shape[0] * per_row:
        raise FormatError(f"{ggml_type} matrix {shape} does not take {flat.nbytes} bytes")
    source = flat.reshape(shape[0], per_row)
    if rows is not None and rows.size and not 0 <= rows.min() <= rows.max() < shape[0]:
        raise UsageError(f"source rows must lie within 0..{shape[0] - 1}")
    if block is None:
        picked = source if rows is None else source[rows]
        return pack_float(np.ascontiguousarray(picked).view(_FLOATS[ggml_type][1]), name)
    packer = Packer(name, (shape[0] if rows is None else len(rows), shape[1]))
    span = runs(packer.shape)
    for start in span:
        part = slice(start, start + span.step)
        blocks = source[part] if rows is None else source[rows[part]]
        packer.add(block.read(blocks.reshape(len(blocks), -1, block.nbytes)))
    return packer.finish()
