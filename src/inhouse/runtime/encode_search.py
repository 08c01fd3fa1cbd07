"""Finding scales: the numbers that make a group of weights lie best on a few levels.

Every function works on columns: `x` is f32 [G, n], n groups of G weights, and `w` the weight of each error (same
shape), None for all alike. What is least is sum(w * (x - value)^2). Rounding is to nearest, ties to even. Knows
nothing of block types or layouts. The searches (stretch the extreme to several codes, solve the scale by least
squares, keep the best) are those of ggml's reference quantisers, written anew; where these weigh errors by the
magnitudes alone we weigh all alike.
"""

from collections.abc import Sequence

import numpy as np

from inhouse.runtime.packed_layout import F32

TINY = np.float32(1e-30)  # a group whose largest magnitude is below this counts as all zero


def divide(numerator: F32 | np.float32, values: F32) -> F32:
    """numerator / value, 0 where the value is 0."""
    shape = np.broadcast_shapes(np.shape(numerator), values.shape)
    return np.divide(numerator, values, out=np.zeros(shape, np.float32), where=values != 0)


def half(values: F32) -> F32:
    """Rounded to what f16 holds."""
    return values.astype(np.float16).astype(np.float32)


def extreme(x: F32) -> F32:
    """The element of largest magnitude of each group, with its sign; 0 where it is too small to divide by. [n]"""
    low, high = x.min(axis=0), x.max(axis=0)
    found = np.where(-low > high, low, high)
    return np.where(np.abs(found) < TINY, np.float32(0), found)


def dot(a: F32, b: F32) -> F32:
    """Sums over each group. [n]"""
    sums: F32 = np.einsum("gn,gn->n", a, b)
    return sums


def round_codes(x: F32, inverse: F32, low: int, high: int) -> F32:
    """x * inverse rounded to a code of low..high. [G, n]"""
    codes = x * inverse
    np.rint(codes, out=codes)
    return np.clip(codes, np.float32(low), np.float32(high), out=codes)


def symmetric(x: F32, low: int, high: int, targets: Sequence[float], w: F32 | None, rounds: int = 1) -> F32:
    """Signed scales [n] of codes low..high around 0.

    Args:
        targets: codes that the extreme is stretched to, in turn.
        rounds: how often the best codes are rounded anew with their own scale, and the scale solved again.
    """
    top = extreme(x)
    xw = x if w is None else x * w
    best, scale = np.zeros_like(top), np.zeros_like(top)

    def consider(inverse: F32) -> None:
        codes = round_codes(x, inverse, low, high)
        xq = dot(xw, codes)
        qq = dot(codes, codes if w is None else codes * w)
        found = divide(xq, qq)
        gain = xq * found  # how much of sum(w x^2) the codes explain
        better = gain > best
        best[better] = gain[better]
        scale[better] = found[better]

    for target in targets:
        consider(divide(np.float32(target), top))
    for _ in range(rounds):
        consider(divide(np.float32(1), scale))
    return scale


def levels(x: F32, table: F32, targets: Sequence[float], w: F32 | None) -> F32:
    """Signed scales [n] of weights on scaled `table` levels (ascending integers within -128..127)."""
    top = extreme(x)
    xw = x if w is None else x * w
    best, scale = np.zeros_like(top), np.zeros_like(top)
    places = level_places(table)
    for inverse in [divide(np.float32(target), top) for target in targets] + [None]:
        values = table[nearest_level(x * (divide(np.float32(1), scale) if inverse is None else inverse), places)]
        xq = dot(xw, values)
        found = divide(xq, dot(values, values if w is None else values * w))
        gain = xq * found
        better = gain > best
        best[better] = gain[better]
        scale[better] = found[better]
    return scale


def level_places(table: F32) -> np.ndarray:
    """uint8 [512]: the nearest level of each half step from -128 on."""
    halves = np.arange(-256, 256, dtype=np.float32) / 2 + np.float32(0.25)
    places: np.ndarray = np.abs(halves[:, None] - table).argmin(axis=1).astype(np.uint8)
    return places


def nearest_level(x: F32, places: np.ndarray) -> np.ndarray:
    """Index of the nearest level, uint8 like `x`: middles between integers lie on half steps."""
    steps = np.floor(x * np.float32(2)) + np.float32(256)
    found: np.ndarray = places[np.clip(steps, 0, 511).astype(np.int16)]
    return found


def affine(
    x: F32, top: int, deltas: Sequence[float], w: F32 | None, *, below_zero: bool, rounds: int = 1
) -> tuple[F32, F32]:
    """Scales and minimums [n] of codes 0..top: value = scale * code + minimum.

    Args:
        deltas: added to `top` for each stretch of the range that is tried.
        below_zero: the minimum must not be above 0 (k-quants keep its magnitude alone).
    """
    least, most = x.min(axis=0), x.max(axis=0)
    if below_zero:
        least = np.minimum(least, np.float32(0))
    span = most - least
    span[span < TINY] = 0
    ones = np.ones_like(x) if w is None else w
    sw, sx, xw = ones.sum(axis=0), dot(x, ones), x * ones
    scale, minimum = span / np.float32(top), least.copy()
    error = np.full_like(span, np.inf)

    def consider(inverse: F32, offset: F32) -> None:
        codes = round_codes(x - offset, inverse, 0, top)
        weighted = codes if w is None else codes * w
        sl, sll, sxl = weighted.sum(axis=0), dot(weighted, codes), dot(xw, codes)
        determinant = sw * sll - sl * sl
        a = divide(sw * sxl - sx * sl, determinant)
        b = divide(sll * sx - sl * sxl, determinant)
        if below_zero:
            a = np.where(b > 0, divide(sxl, sll), a)
            b = np.minimum(b, np.float32(0))
        found = a * (a * sll - 2 * sxl) + b * (b * sw - 2 * sx) + 2 * a * b * sl  # the error, less sum(w x^2)
        better = (found < error) & (determinant > 0) & (a > 0)
        error[better] = found[better]
        scale[better] = a[better]
        minimum[better] = b[better]

    for delta in deltas:
        consider(divide(np.float32(top + delta), span), least)
    for _ in range(rounds):
        consider(divide(np.float32(1), scale), minimum.copy())
    return scale, minimum
