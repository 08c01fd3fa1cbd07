"""Floats to the block formats of GGUF, ours: codes, scales and minimums of least squared error.

`encode_rows` gives what the packed layout and the GGUF blocks are both made of (`CodeRows`). Knows the formats'
levels and how wide their scales are; not where bits lie. Deterministic; the same on every machine up to the order in
which a sum runs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from inhouse.core.errors import FormatError, UnsupportedError, UsageError
from inhouse.runtime.encode_search import (
    affine,
    divide,
    dot,
    half,
    level_places,
    levels,
    nearest_level,
    round_codes,
    symmetric,
)
from inhouse.runtime.packed_layout import F32, FORMATS, SUPER, TABLES, format_of
from inhouse.runtime.packed_pack import CodeRows

RUN_ELEMENTS = 1 << 17  # elements that a search works on at once: they stay in the second-level cache
F16_MOST = 65504.0


class _Groups(NamedTuple):
    """Rows taken apart into groups as columns."""

    x: F32  # [G, n groups]
    w: F32 | None
    rows: int
    width: int

    def rows_of(self, codes: F32) -> np.ndarray:
        """Unsigned codes [G, n] -> uint8 [rows, width]."""
        return np.ascontiguousarray(codes.T.astype(np.uint8)).reshape(self.rows, self.width)

    def per_row(self, values: F32) -> F32:
        return values.reshape(self.rows, -1)


_Encoder = Callable[[_Groups], CodeRows]


def _steps(center: float, step: float, count: int) -> tuple[float, ...]:
    return tuple(center + step * i for i in range(-count, count + 1))


def _q8_0(g: _Groups) -> CodeRows:
    scales = half(np.abs(g.x).max(axis=0) / np.float32(127))
    codes = round_codes(g.x, divide(np.float32(1), scales), -127, 127)
    return CodeRows(g.rows_of(codes + np.float32(128)), g.per_row(scales))


def _one_level(g: _Groups, bits: int) -> CodeRows:
    """Q4_0, Q5_0: signed codes, one scale."""
    top = 1 << (bits - 1)
    targets = (*_steps(-top - 0.25, 0.25, 5), top - 1.0)
    scales = half(symmetric(g.x, -top, top - 1, targets, g.w))
    codes = round_codes(g.x, divide(np.float32(1), scales), -top, top - 1)
    return CodeRows(g.rows_of(codes + np.float32(top)), g.per_row(scales))


def _one_level_minimum(g: _Groups, bits: int) -> CodeRows:
    """Q4_1, Q5_1."""
    top = (1 << bits) - 1
    scales, minimums = affine(g.x, top, _steps(0.0, 0.15, 6), g.w, below_zero=False)
    scales, minimums = half(scales), half(minimums)
    codes = round_codes(g.x - minimums, divide(np.float32(1), scales), 0, top)
    return CodeRows(g.rows_of(codes), g.per_row(scales), g.per_row(minimums))


def _fitted(values: F32, most: int) -> tuple[F32, F32]:
    """Magnitudes [super-blocks, groups] -> f16 unit [super-blocks] and integer multiples 0..most."""
    top = values.max(axis=1)
    unit = half(top / np.float32(most))
    inverse = divide(np.float32(most), top)
    return unit, np.clip(np.rint(values * inverse[:, None]), 0, most).astype(np.float32)


def _two_level_minimum(g: _Groups, bits: int, most: int, deltas: Sequence[float]) -> CodeRows:
    """Q2_K, Q4_K, Q5_K: unsigned codes; scale and minimum of a group are multiples of the super-block's."""
    top = (1 << bits) - 1
    per = SUPER // len(g.x)
    wide = _steps(0.0, 0.1, 14)  # where errors weigh unlike, the best stretch is farther off
    scales, minimums = affine(g.x, top, deltas if g.w is None else wide, g.w, below_zero=True, rounds=2)
    d, sub = _fitted(scales.reshape(-1, per), most)
    dmin, sub_min = _fitted(-minimums.reshape(-1, per), most)
    for last in (False, True):  # then the super-block's two numbers by least squares over what the codes became
        offset = (dmin[:, None] * sub_min).reshape(-1)
        codes = round_codes(g.x + offset, divide(np.float32(1), (d[:, None] * sub).reshape(-1)), 0, top)
        if not last:
            d, dmin = _refit(g, codes, sub, sub_min, d, dmin)
    packed = (sub.astype(np.int8).reshape(g.rows, -1), sub_min.astype(np.int8).reshape(g.rows, -1))
    return CodeRows(g.rows_of(codes), g.per_row(d), g.per_row(dmin), *packed)


def _refit(g: _Groups, codes: F32, sub: F32, sub_min: F32, d: F32, dmin: F32) -> tuple[F32, F32]:
    """d and dmin of each super-block that make x = d * (sub * code) - dmin * sub_min best, where that is sound."""
    w = np.ones_like(g.x) if g.w is None else g.w
    per = sub.shape[1]

    def total(values: F32) -> F32:
        sums: F32 = values.reshape(-1, per).sum(axis=1)
        return sums

    flat, flat_min = sub.reshape(-1), sub_min.reshape(-1)
    aa = total(dot(codes * codes, w) * flat * flat)
    ab = -total(dot(codes, w) * flat * flat_min)
    bb = total(w.sum(axis=0) * flat_min * flat_min)
    ax, bx = total(dot(codes * w, g.x) * flat), -total(dot(w, g.x) * flat_min)
    determinant = aa * bb - ab * ab
    sound = determinant > np.float32(1e-6) * aa * bb
    a = np.where(sound, divide(bb * ax - ab * bx, determinant), d)
    b = np.where(sound, divide(aa * bx - ab * ax, determinant), dmin)
    keep = sound & (a > 0.5 * d) & (a < 2 * d) & (b > 0.5 * dmin) & (b < 2 * dmin)
    return half(np.where(keep, a, d)), half(np.where(keep, b, dmin))


def _two_level(g: _Groups, bits: int, most: int, targets: Sequence[float], rounds: int) -> CodeRows:
    """Q3_K, Q6_K: signed codes; the scale of a group is a signed multiple of the super-block's."""
    top = 1 << (bits - 1)
    scales = symmetric(g.x, -top, top - 1, targets, g.w, rounds)
    d, sub = _signed_multiples(scales, SUPER // len(g.x), most)
    step = (d[:, None] * sub).reshape(-1)
    codes = round_codes(g.x, divide(np.float32(1), step), -top, top - 1)
    multiples = sub.astype(np.int8).reshape(g.rows, -1)
    return CodeRows(g.rows_of(codes + np.float32(top)), g.per_row(d), sub_scales=multiples)


def _signed_multiples(scales: F32, per: int, most: int) -> tuple[F32, F32]:
    """Signed scales [n groups] -> f16 unit of each super-block and integer multiples -most..most-1."""
    grouped = scales.reshape(-1, per)
    low, high = grouped.min(axis=1), grouped.max(axis=1)
    top = np.where(-low > high, low, high)  # becomes -most: the longer end of the range
    unit = half(top / np.float32(-most))
    inverse = divide(np.float32(1), unit)
    return unit, np.clip(np.rint(grouped * inverse[:, None]), -most, most - 1).astype(np.float32)


def _iq4(g: _Groups, two_level: bool) -> CodeRows:
    """IQ4_NL, IQ4_XS: uneven levels."""
    table = np.array(TABLES["iq4"], np.float32)
    scales = levels(g.x, table, _steps(-127.0, 2.0, 7), g.w)
    multiples = None
    if two_level:
        d, sub = _signed_multiples(scales, SUPER // len(g.x), 32)
        scales, multiples = (d[:, None] * sub).reshape(-1), sub.astype(np.int8).reshape(g.rows, -1)
    else:
        d = scales = half(scales)
    codes = nearest_level(g.x * divide(np.float32(1), scales), level_places(table))
    return CodeRows(g.rows_of(codes), g.per_row(d), sub_scales=multiples)


def _mxfp4(g: _Groups) -> CodeRows:
    """The OCP rule: the power of two of the largest magnitude, less two; then the nearest e2m1 value."""
    most = np.abs(g.x).max(axis=0)
    _, exponent = np.frexp(most)
    e = np.where(most > 0, np.clip(exponent - 1 - 2 + 127, 0, 254), 0).astype(np.uint8)
    doubled = np.ldexp(np.abs(g.x), 128 - e.astype(np.int32))  # twice the value in units of the scale
    middles = np.array([0.5, 1.5, 2.5, 3.5, 5, 7, 10], np.float32)
    codes = np.searchsorted(middles, doubled).astype(np.float32)
    codes += np.where((g.x < 0) & (codes > 0), np.float32(8), np.float32(0))
    return CodeRows(g.rows_of(codes), e.reshape(g.rows, -1))


def _ternary(g: _Groups) -> CodeRows:
    """TQ2_0: -1, 0, 1 times the least-squares scale."""
    scales = half(np.abs(symmetric(g.x, -1, 1, _steps(1.25, 0.125, 6), g.w)))
    codes = round_codes(g.x, divide(np.float32(1), scales), -1, 1)
    return CodeRows(g.rows_of(codes + np.float32(1)), g.per_row(scales))


# deltas and targets: measured against ggml's encoder, see docs/formats-export.md.
_ENCODERS: Mapping[str, _Encoder] = {
    "q8_0": _q8_0,
    "q4_0": partial(_one_level, bits=4),
    "q5_0": partial(_one_level, bits=5),
    "q4_1": partial(_one_level_minimum, bits=4),
    "q5_1": partial(_one_level_minimum, bits=5),
    "q2_k": partial(_two_level_minimum, bits=2, most=15, deltas=tuple(-0.5 + 0.1 * i for i in range(16))),
    "q4_k": partial(_two_level_minimum, bits=4, most=63, deltas=tuple(-1.0 + 0.1 * i for i in range(0, 21, 2))),
    "q5_k": partial(_two_level_minimum, bits=5, most=63, deltas=tuple(-0.5 + 0.1 * i for i in range(0, 16, 2))),
    "q3_k": partial(_two_level, bits=3, most=32, targets=(*_steps(-4.0, 0.2, 5), 3.0, 3.5), rounds=2),
    "q6_k": partial(_two_level, bits=6, most=128, targets=_steps(-32.0, 0.1, 9), rounds=1),
    "iq4_nl": partial(_iq4, two_level=False),
    "iq4_xs": partial(_iq4, two_level=True),
    "mxfp4": _mxfp4,
    "tq2_0": _ternary,
}


def encodable() -> tuple[str, ...]:
    """Packed formats that `encode_rows` makes."""
    return tuple(_ENCODERS)


def encode_rows(name: str, rows: F32, importance: F32 | None = None) -> CodeRows:
    """Codes, scales and minimums of some rows in a packed format that a GGUF type shares.

    Args:
        name: one of `encodable()`.
        rows: float32 [n, in], finite; `in` a multiple of 32, of 256 for two-level formats and tq2_0.
        importance: float32 [in], how much an error in each input column counts (mean square of that input), 0 or
            more; None: all alike. `q8_0` and `mxfp4` follow a fixed rule and ignore it.

    Raises:
        UnsupportedError: no encoder for that format, or a width that does not fit. FormatError: a weight that is
        not finite or beyond f16. UsageError: importance of another length, or negative.
    """
    if name not in _ENCODERS:
        raise UnsupportedError(f"no encoder to {name!r}", remedy=f"Known: {', '.join(_ENCODERS)}")
    fmt = format_of(name)
    unit = SUPER if fmt.two_level else fmt.group
    if rows.ndim != 2 or rows.shape[1] % unit:
        raise UnsupportedError(f"{name} needs rows in multiples of {unit}, got {list(rows.shape)}")
    largest = float(np.abs(rows).max(initial=0.0))
    if not largest <= F16_MOST:  # also NaN
        raise FormatError(f"a weight of {largest} cannot be encoded as {name}", remedy="The tensor is damaged")
    weights = _checked(importance, rows.shape[1])
    step = max(1, RUN_ELEMENTS // max(1, rows.shape[1]))
    starts = range(0, max(1, len(rows)), step)
    return joined([_ENCODERS[name](_grouped(rows[at : at + step], weights, fmt.group)) for at in starts])


def _checked(importance: F32 | None, width: int) -> F32 | None:
    if importance is None:
        return None
    if importance.shape != (width,) or not np.isfinite(importance).all() or importance.min(initial=0.0) < 0:
        raise UsageError(f"importance must be {width} finite numbers of 0 or more")
    mean = float(importance.mean(dtype=np.float64))
    if mean == 0:
        return None
    # A column that was never active still has weights to keep: it counts a thousandth of the mean.
    weights: F32 = np.maximum(importance / np.float32(mean), np.float32(1e-3)).astype(np.float32)
    return weights


def _grouped(rows: F32, importance: F32 | None, group: int) -> _Groups:
    n, width = rows.shape
    w = None
    if importance is not None:
        w = np.ascontiguousarray(np.broadcast_to(importance, rows.shape).reshape(-1, group).T)
    return _Groups(np.ascontiguousarray(rows.reshape(-1, group).T, np.float32), w, n, width)


def joined(parts: Sequence[CodeRows]) -> CodeRows:
    """Runs of rows as one."""
    columns = [None if column[0] is None else np.concatenate(column) for column in zip(*parts, strict=True)]
    return CodeRows(*columns)  # type: ignore[arg-type]


def fits(name: str, width: int) -> bool:
    """Whether rows of that many inputs can be encoded in the format."""
    fmt = FORMATS[name]
    return width % (SUPER if fmt.two_level else fmt.group or 1) == 0
