"""The search for scales: of many candidates the one of least weighted squared error, group by group.

Groups are f32 [out, groups, G], with weights of errors of the same shape or None (all alike). Every candidate is first
rounded to what the format stores. Knows no formats and no packing.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

Tensor = torch.Tensor
TINY = 1e-30  # a group whose largest magnitude is below this counts as all zero
REFITS = 2  # how often the best candidate's codes are rounded anew and its scale solved again
SHRINK = tuple(1.0 - 0.025 * i for i in range(29))  # of `mse`, down to 0.3
WIDTHS = (-1.25, -1.0, -0.75, -0.5, -0.25, 0.25, 0.5, 0.75, 1.0, 1.25)  # codes by which wls stretches the range
MOST_WHOLE = 8  # whole codes the extreme is laid on; finer grids than this are barely bettered by more
MANY_WHOLE = 32  # of 8-bit ranges with a zero point: what a bf16 scale may leave unused


class Candidates(NamedTuple):
    """How candidates are made: the search, the symmetric convention, and what rounds a scale to what is stored."""

    search: str
    convention: str
    storable: Callable[[Tensor], Tensor]
    power_of_two: bool = False


class _Best:
    """The best candidate so far of every group."""

    def __init__(self, x: Tensor, w: Tensor | None) -> None:
        self.x, self.w = x, w
        self.error = torch.full(x.shape[:2], torch.inf)
        self.scale = torch.ones(x.shape[:2])
        self.zero = torch.zeros(x.shape[:2])

    def consider(self, scale: Tensor, zero: Tensor, values: Tensor, offset: Tensor | None = None) -> None:
        """Judges `scale * values` (+ offset)."""
        found = values * scale[..., None]
        if offset is not None:
            found += offset[..., None]
        found -= self.x
        found.square_()
        if self.w is not None:
            found *= self.w
        error = found.sum(-1)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def _solved(x: Tensor, w: Tensor | None, values: Tensor) -> Tensor:
    """The scale of least squares for the levels chosen."""
    weighted = values if w is None else values * w
    qq = (weighted * values).sum(-1)
    return torch.where(qq > 0, (weighted * x).sum(-1) / qq, 1.0)


def _extreme(x: Tensor) -> Tensor:
    """The element of largest magnitude of each group, with its sign."""
    low, high = x.amin(-1), x.amax(-1)
    return torch.where(-low > high, low, high)


def _spans(top: int, most: int = MOST_WHOLE) -> list[float]:
    """Codes (whole and between) that a range may be laid on, the greatest of them near `top`."""
    whole = [float(n) for n in range(top, max(top // 2, top - most, 1) - 1, -1)]
    return whole + [top + step for step in WIDTHS if top + step > 0.3 and (top + step) not in whole]


def integer(
    x: Tensor, w: Tensor | None, low: int, high: int, free_zero: bool, how: Candidates
) -> tuple[Tensor, Tensor]:
    """Scales and zero points [out, groups] of integer levels low..high: value = scale * (level - zero).

    With `free_zero` the range is laid over [min(x, 0), max(x, 0)] and zero is a whole number within low..high, so that
    0 is a value; else zero is 0 and a scale may be negative.
    """
    best = _Best(x, w)

    def attempt(scale: Tensor, zero: Tensor, solve: bool) -> None:
        for again in range(2 if solve else 1):
            scale = how.storable(scale)
            values = (x * _inverse(scale)[..., None]).round_()
            values = torch.clamp(values, (low - zero)[..., None], (high - zero)[..., None])
            best.consider(scale, zero, values)
            if solve and not again:
                scale = _solved(x, w, values)

    solve = how.search == "wls"
    if free_zero:
        _ranges(x, low, high, how, attempt)
    else:
        none = torch.zeros(x.shape[:2])
        for scale in _symmetric(x, low, high, how):
            attempt(scale, none, solve)
    for _ in range(REFITS if solve else 0):
        values = (x * _inverse(best.scale)[..., None]).round_()
        values = torch.clamp(values, (low - best.zero)[..., None], (high - best.zero)[..., None])
        attempt(_solved(x, w, values), best.zero, False)
    dead = x.abs().amax(-1) < TINY
    return torch.where(dead, 1.0, best.scale), torch.where(dead, 0.0, best.zero)


def _symmetric(x: Tensor, low: int, high: int, how: Candidates) -> Iterable[Tensor]:
    """Scales that lay a group's extreme on some code."""
    top = _extreme(x)
    size = top.abs()
    first = {
        "signed": top / low if low != -high else size / high,
        "even": 2.0 * size / (high - low),
        "restricted": size / high,
    }
    if how.search == "minmax":
        yield first[how.convention]
    elif how.search == "mse":
        for share in SHRINK:
            yield first[how.convention] * share
    else:
        yield from first.values()
        for span in _spans(-low):
            yield top / -span
            if low != -high and span <= high:
                yield top / span


def _ranges(x: Tensor, low: int, high: int, how: Candidates, attempt: Callable[[Tensor, Tensor, bool], None]) -> None:
    """Tries scales with their zero points over [min(x, 0), max(x, 0)]."""
    least, most = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    width, steps = most - least, high - low
    wls = how.search == "wls"
    spans: Iterable[float] = [float(steps)]
    if wls:
        spans = _spans(steps, MOST_WHOLE if steps < 32 else MANY_WHOLE)
    elif how.search == "mse":
        spans = [steps / share for share in SHRINK]
    shifts = (0, -1, 1) if wls and steps < 32 else (0,)
    for span in spans:
        scale = how.storable(width / span)
        shrink = min(1.0, steps / span)  # a range too wide for the codes loses as much at both its ends
        start = torch.round((least * shrink) * _inverse(scale))
        for shift in shifts:
            attempt(scale, (low - start - shift).clamp(low, high), wls)


def affine(x: Tensor, w: Tensor | None, top: int, how: Candidates) -> tuple[Tensor, Tensor]:
    """Scales and minimums [out, groups] of codes 0..top: value = scale * code + minimum."""
    best = _Best(x, w)
    least, most = x.amin(-1), x.amax(-1)

    def attempt(scale: Tensor, minimum: Tensor, solve: int) -> None:
        for again in range(solve + 1):
            scale, minimum = how.storable(scale), how.storable(minimum)
            codes = ((x - minimum[..., None]) * _inverse(scale)[..., None]).round_().clamp_(0, top)
            best.consider(scale, minimum, codes, minimum)
            if again < solve:
                scale, minimum = _solved_pair(x, w, codes, scale, minimum)

    spans = [float(top)]
    if how.search == "mse":
        spans = [top / share for share in SHRINK]
    elif how.search == "wls":
        spans = _spans(top)
    for span in spans:
        middle = (least + most) / 2 - (most - least) / 2 * min(1.0, top / span)
        attempt((most - least) / span, middle, int(how.search == "wls"))
    if how.search == "wls":
        attempt(best.scale, best.zero, REFITS)
    flat = most - least < TINY  # one value: it is the minimum
    return torch.where(flat, 1.0, best.scale), torch.where(flat, how.storable(least), best.zero)


def _solved_pair(x: Tensor, w: Tensor | None, codes: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of least squares for the codes chosen; the ones given where the codes are all alike."""
    ones = torch.ones_like(x) if w is None else w
    weighted = codes * ones
    s0, s1, s2 = ones.sum(-1), weighted.sum(-1), (weighted * codes).sum(-1)
    t0, t1 = (ones * x).sum(-1), (weighted * x).sum(-1)
    determinant = s0 * s2 - s1 * s1
    sound = determinant > 1e-7 * s0 * s2
    safe = torch.where(sound, determinant, 1.0)
    a, b = (s0 * t1 - s1 * t0) / safe, (s2 * t0 - s1 * t1) / safe
    sound &= a > 0
    return torch.where(sound, a, scale), torch.where(sound, b, minimum)


def table(x: Tensor, w: Tensor | None, levels: Tensor, how: Candidates) -> Tensor:
    """Scales [out, groups] of a table's levels (f32 [codes], NaN where a code is none): value = scale * level."""
    best = _Best(x, w)
    values = torch.unique(levels[~levels.isnan()])  # ascending
    middles = (values[1:] + values[:-1]) / 2
    none = torch.zeros(x.shape[:2])

    def attempt(scale: Tensor, solve: bool) -> None:
        for again in range(2 if solve else 1):
            scale = how.storable(scale)
            found = values[torch.bucketize(x * _inverse(scale)[..., None], middles)]
            best.consider(scale, none, found)
            if solve and not again:
                scale = _solved(x, w, found)

    solve = how.search == "wls"
    for scale in _table_scales(x, values, how):
        attempt(scale, solve)
    if solve:
        found = values[torch.bucketize(x * _inverse(best.scale)[..., None], middles)]
        attempt(_solved(x, w, found), False)
    dead = 1.0 if bool((values == 0).any()) else 0.0
    return torch.where(x.abs().amax(-1) < TINY, dead, best.scale)


def _table_scales(x: Tensor, values: Tensor, how: Candidates) -> Iterable[Tensor]:
    top = _extreme(x)
    size, longest = top.abs(), float(values.abs().max())
    even = bool(torch.equal(values, -values.flip(0))) or float(values[-1]) == -float(values[0])
    if how.power_of_two:  # the OCP rule: the power of two of the largest magnitude over that of the longest level
        unit = 2.0 ** (math.frexp(longest)[1] - 1)
        base = torch.ldexp(torch.ones_like(size), torch.frexp(size / unit).exponent - 1)
        yield from (base,) if how.search == "minmax" else (base, base * 2, base / 2)
        return
    far = float(values[0] if -values[0] > values[-1] else values[-1])
    first = size / longest if even else top / far
    yield first
    if how.search == "mse":
        yield from (first * share for share in SHRINK[1:])
    if how.search != "wls":
        return
    if len(values) > 16:  # floats of one byte: their relative step is the same at any scale
        yield from (first * share for share in (0.95, 0.9, 0.85, 0.8))
        return
    yield from (first * share for share in (0.8, 0.85, 0.9, 0.95, 1.05, 1.1))
    for level in values.tolist():
        if abs(level) >= 0.4 * longest and not (even and level < 0 and -level in values.tolist()):
            yield (size if even else top) / level
