"""From codes to the bytes of GGUF blocks: the reverse of packed_gguf, for what encoders made and for packed matrices.

Lossless: a matrix that came out of a GGUF type goes back into the same blocks (but for bits that mean nothing, such
as a TQ1_0 byte above its five digits). Knows bit positions of blocks; not how codes are chosen.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.packed_layout import BLOCK, TILE_ROWS, U8, Format, Packed, format_of, layout, spread_plane
from inhouse.runtime.packed_pack import Array, CodeRows, runs

_Writer = Callable[[CodeRows], U8]


def _blocks(codes: U8, elements: int) -> U8:
    """[n, width] -> [n, blocks, elements]."""
    return codes.reshape(len(codes), -1, elements)


def _f16(values: Array | None, codes: U8, elements: int) -> U8:
    """[n, blocks] f16 values -> two bytes each, [n, blocks, 2]."""
    if values is None:
        raise UsageError("scales are missing")
    halves = np.ascontiguousarray(values, dtype="<f2")
    return halves.view(np.uint8).reshape(len(codes), codes.shape[1] // elements, 2)


def _subs(values: Array | None, codes: U8) -> U8:
    """Sub-scales [n, groups] of two-level formats, by super-block: [n, blocks, groups of a super-block]."""
    if values is None:
        raise UsageError("sub-scales are missing")
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(codes), codes.shape[1] // 256, -1)


def _pair(codes: U8) -> U8:
    """[.., 2 m] codes -> [.., m] bytes: the first half in the low nibbles."""
    half = codes.shape[-1] // 2
    return (codes[..., :half] & np.uint8(15)) | ((codes[..., half:] & np.uint8(15)) << np.uint8(4))


def _join(fields: U8, bits: int) -> U8:
    """[.., count, m] -> [.., m]: field i moved up by i * bits, ored together."""
    count = fields.shape[-2]
    shifts = np.arange(0, count * bits, bits, dtype=np.uint8)[:, None]
    joined: U8 = np.bitwise_or.reduce((fields & np.uint8((1 << bits) - 1)) << shifts, axis=-2)
    return joined


def _bytes(*parts: U8) -> U8:
    """Parts [n, blocks, m] side by side -> [n, bytes of a row]."""
    return np.concatenate(parts, axis=-1).reshape(len(parts[0]), -1)


def _small(r: CodeRows, fifth: bool) -> U8:
    """Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL."""
    codes = _blocks(r.codes, 32)
    parts = [_f16(r.scales, r.codes, 32)]
    if r.minimums is not None:
        parts.append(_f16(r.minimums, r.codes, 32))
    if fifth:
        parts.append(np.packbits(codes >> np.uint8(4), axis=-1, bitorder="little"))
    return _bytes(*parts, _pair(codes))


def _q8_0(r: CodeRows) -> U8:
    return _bytes(_f16(r.scales, r.codes, 32), _blocks(r.codes ^ np.uint8(128), 32))


def _q2_k(r: CodeRows) -> U8:
    codes = _blocks(r.codes, 256).reshape(len(r.codes), -1, 2, 4, 32)
    low = _join(codes, 2).reshape(*codes.shape[:2], 64)
    scales = _subs(r.sub_scales, r.codes) | (_subs(r.sub_minimums, r.codes) << np.uint8(4))
    return _bytes(scales, low, _f16(r.scales, r.codes, 256), _f16(r.minimums, r.codes, 256))


def _q3_k(r: CodeRows) -> U8:
    codes = _blocks(r.codes, 256)
    shape = codes.shape[:2]
    low = _join(codes.reshape(*shape, 2, 4, 32), 2).reshape(*shape, 64)
    high = _join((codes >> np.uint8(2)).reshape(*shape, 8, 32), 1)
    six = _subs(r.sub_scales, r.codes) + np.uint8(32)
    scales = np.concatenate([_pair(six), _join((six >> np.uint8(4)).reshape(*shape, 4, 4), 2)], axis=-1)
    return _bytes(high, low, scales, _f16(r.scales, r.codes, 256))


def _sixes(r: CodeRows) -> U8:
    """The 12 bytes of Q4_K and Q5_K: 8 six-bit sub-scales and 8 sub-minimums."""
    s, m = _subs(r.sub_scales, r.codes), _subs(r.sub_minimums, r.codes)
    top = np.uint8(2), np.uint8(0xC0)
    first = s[..., :4] | ((s[..., 4:] << top[0]) & top[1])
    second = m[..., :4] | ((m[..., 4:] << top[0]) & top[1])
    return np.concatenate([first, second, (s[..., 4:] & np.uint8(15)) | (m[..., 4:] << np.uint8(4))], axis=-1)


def _q45_k(r: CodeRows, fifth: bool) -> U8:
    codes = _blocks(r.codes, 256)
    shape = codes.shape[:2]
    low = _pair(codes.reshape(*shape, 4, 64)).reshape(*shape, 128)
    parts = [_f16(r.scales, r.codes, 256), _f16(r.minimums, r.codes, 256), _sixes(r)]
    if fifth:
        parts.append(_join((codes >> np.uint8(4)).reshape(*shape, 8, 32), 1))
    return _bytes(*parts, low)


def _q6_k(r: CodeRows) -> U8:
    codes = _blocks(r.codes, 256)
    shape = codes.shape[:2]
    low = _pair(codes.reshape(*shape, 2, 128)).reshape(*shape, 128)
    high = _join((codes >> np.uint8(4)).reshape(*shape, 2, 4, 32), 2).reshape(*shape, 64)
    return _bytes(low, high, _subs(r.sub_scales, r.codes), _f16(r.scales, r.codes, 256))


def _iq4_xs(r: CodeRows) -> U8:
    codes = _blocks(r.codes, 256)
    six = _subs(r.sub_scales, r.codes) + np.uint8(32)
    two = (six >> np.uint8(4)).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16)
    high = np.bitwise_or.reduce(two, axis=-1).astype("<u2")[..., None].view(np.uint8)
    low = (six[..., 0::2] & np.uint8(15)) | ((six[..., 1::2] & np.uint8(15)) << np.uint8(4))
    nibbles = _pair(codes.reshape(*codes.shape[:2], 8, 32)).reshape(*codes.shape[:2], 128)
    return _bytes(_f16(r.scales, r.codes, 256), high, low, nibbles)


def _mxfp4(r: CodeRows) -> U8:
    scales = r.scales.astype(np.uint8).reshape(len(r.codes), -1, 1)
    return _bytes(scales, _pair(_blocks(r.codes, 32)))


def _nvfp4(r: CodeRows) -> U8:
    if r.sub_scales is None or np.any(r.scales != np.float32(0.5)):
        raise UnsupportedError("GGUF's NVFP4 has no scale of the whole tensor", remedy="Export it as another type")
    codes = _blocks(r.codes, 64)
    sub = r.sub_scales.reshape(*codes.shape[:2], 4).view(np.uint8)
    return _bytes(sub, _pair(codes.reshape(*codes.shape[:2], 4, 16)).reshape(*codes.shape[:2], 32))


def _tq2_0(r: CodeRows) -> U8:
    codes = _blocks(r.codes, 256).reshape(len(r.codes), -1, 2, 4, 32)
    return _bytes(_join(codes, 2).reshape(*codes.shape[:2], 64), _f16(r.scales, r.codes, 256))


def _digits(part: U8) -> U8:
    """[.., count, m] ternary digits -> [.., m] bytes: the number of five digits as a fraction of 243, rounded up."""
    count = part.shape[-2]
    powers = np.array([81, 27, 9, 3, 1], np.uint16)[:count, None]
    number = (part.astype(np.uint16) * powers).sum(axis=-2, dtype=np.uint16)
    digits: U8 = ((number.astype(np.uint32) * 256 + 242) // 243).astype(np.uint8)
    return digits


def _tq1_0(r: CodeRows) -> U8:
    if r.codes.size and r.codes.max() > 2:
        raise UnsupportedError("TQ1_0 holds -1, 0 and 1 alone, the matrix has other codes", remedy="Export as tq2_0")
    codes = _blocks(r.codes, 256)
    shape = codes.shape[:2]
    return _bytes(
        _digits(codes[..., :160].reshape(*shape, 5, 32)), _digits(codes[..., 160:240].reshape(*shape, 5, 16)),
        _digits(codes[..., 240:].reshape(*shape, 4, 4)), _f16(r.scales, r.codes, 256),
    )  # fmt: skip


_WRITERS: Mapping[str, tuple[str, _Writer]] = {
    "Q4_0": ("q4_0", partial(_small, fifth=False)),
    "Q4_1": ("q4_1", partial(_small, fifth=False)),
    "Q5_0": ("q5_0", partial(_small, fifth=True)),
    "Q5_1": ("q5_1", partial(_small, fifth=True)),
    "Q8_0": ("q8_0", _q8_0),
    "Q2_K": ("q2_k", _q2_k),
    "Q3_K": ("q3_k", _q3_k),
    "Q4_K": ("q4_k", partial(_q45_k, fifth=False)),
    "Q5_K": ("q5_k", partial(_q45_k, fifth=True)),
    "Q6_K": ("q6_k", _q6_k),
    "IQ4_NL": ("iq4_nl", partial(_small, fifth=False)),
    "IQ4_XS": ("iq4_xs", _iq4_xs),
    "MXFP4": ("mxfp4", _mxfp4),
    "NVFP4": ("nvfp4", _nvfp4),
    "TQ1_0": ("tq2_0", _tq1_0),
    "TQ2_0": ("tq2_0", _tq2_0),
}


def writable() -> Mapping[str, str]:
    """GGUF block type -> the packed format whose codes it is made of."""
    return {kind: name for kind, (name, _) in _WRITERS.items()}


def gguf_blocks(rows: CodeRows, ggml_type: str) -> U8:
    """The rows as blocks of a GGUF type, uint8 [n, bytes of a row].

    Raises UnsupportedError for a type that is not written, or codes or scales that it does not have.
    """
    if ggml_type not in _WRITERS:
        raise UnsupportedError(f"GGUF type {ggml_type} is not written", remedy=f"Known: {', '.join(_WRITERS)}")
    return _WRITERS[ggml_type][1](rows)


def code_rows(packed: Packed) -> Iterator[CodeRows]:
    """A packed matrix as it was before packing, in runs of rows: codes with the zero point, scales as they are kept.

    Raises UsageError for a float format.
    """
    packed = packed.plain()
    fmt = format_of(packed.format)
    if fmt.low == 0:
        raise UsageError(f"format {packed.format} holds floats, not codes")
    plan = layout(fmt, packed.shape[1])
    tiles = packed.data.reshape(-1, plan.tile_bytes)
    step = runs(packed.shape).step
    for start in range(0, packed.shape[0], step):
        stop = min(start + step, packed.shape[0])
        part = tiles[start // TILE_ROWS : -(-stop // TILE_ROWS)]
        yield _run(fmt, packed.shape[1], part, stop - start)


def _run(fmt: Format, width: int, tiles: U8, count: int) -> CodeRows:
    plan = layout(fmt, width)

    def lanes(name: str, dtype: str) -> Array | None:
        if name not in plan.sections:
            return None
        section = plan.sections[name]
        raw = np.ascontiguousarray(tiles[:, section.offset : section.offset + section.nbytes]).view(dtype)
        return raw.reshape(len(tiles), -1, TILE_ROWS).transpose(0, 2, 1).reshape(len(tiles) * TILE_ROWS, -1)[:count]

    def plane(name: str, bits: int) -> U8:
        section = plan.sections[name]
        vectors = tiles[:, section.offset : section.offset + section.nbytes]
        blocks = plan.width // BLOCK
        quads = spread_plane(vectors.reshape(len(tiles), blocks, bits, TILE_ROWS * 4), bits)
        shaped = quads.reshape(len(tiles), blocks, 8, TILE_ROWS, 4).transpose(0, 3, 1, 2, 4)
        return shaped.reshape(len(tiles) * TILE_ROWS, plan.width)[:count, :width]

    codes = plane("low", fmt.low)
    if fmt.high:
        codes = codes | (plane("high", fmt.high) << np.uint8(fmt.low))
    kind = {"f32": "<f4", "f16": "<f2", "bf16": "<u2", "e8m0": "u1"}[fmt.scale]
    scales = lanes("scale", kind)
    assert scales is not None
    sub = "u1" if fmt.float_subs else "i1"
    return CodeRows(
        np.ascontiguousarray(codes),
        scales,
        lanes("minimum", kind),
        lanes("sub_scale", sub),
        lanes("sub_minimum", sub),
        lanes("zeros", "i1"),
    )
