"""Logarithmic codes: w = sign(w) s 2^-q, q = 0..6, and one code for 0; four bits (LogNet, Miyashita et al. 2016,
arXiv 1603.01025).

q is -log2(|w| / s) rounded (`log`, the paper's rule: least relative error) or the nearest level (`linear`: least
squared error). s is found group by group: the largest magnitude and shares of it are tried, each solved once more by
least squares for the codes it gives, and the one of least (weighted) error kept. The levels lie as dense near 0 as
floats, so three bits and heavy tails suit them; at four bits linear codes are better for weights that are normal.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from inhouse.compress.stats import LinearStats
from inhouse.core.errors import UsageError
from inhouse.runtime.form import Form
from inhouse.runtime.packed import pack_codes

LEVELS = 7  # magnitudes 2^0 .. 2^-6 of the scale
GROUP = 32
FORMAT = "log4_g32"
TRIED = tuple(2.0 ** (-i / 8) for i in range(-3, 9))  # of the largest magnitude


@dataclass(frozen=True, slots=True)
class LogOptions:
    """rounding: as the page says. importance: errors weigh as the mean square of their input, where it is known."""

    rounding: Literal["log", "linear"] = "linear"
    importance: bool = True

    def __post_init__(self) -> None:
        if self.rounding not in ("log", "linear"):
            raise UsageError(f"unknown rounding {self.rounding!r}", remedy="Use log or linear", param="rounding")


def logcodes(weight: Tensor, stats: LinearStats | None, options: LogOptions, fmt: str = "") -> Form:
    """As the table of methods calls it: weight f32 [out, in] -> Form. Raises UsageError for another format."""
    if fmt not in ("", FORMAT):
        raise UsageError(f"logarithmic codes are stored as {FORMAT}, not {fmt}", param="format")
    heed = stats.mean_square if stats is not None and stats.count and options.importance else None
    codes, scales = encode(weight, heed, options.rounding)
    return Form(pack_codes(FORMAT, table_codes(codes), (scales / 2 ** (LEVELS - 1)).numpy()))


def encode(weight: Tensor, importance: Tensor | None = None, rounding: str = "linear") -> tuple[Tensor, Tensor]:
    """Signed codes int64 [out, in] (0: zero; +-(1 + q): +-s 2^-q) and scales s f32 [out, groups], 64 times an f16 each.

    importance: f32 [in], how much a squared error counts there. The last group may be short.
    """
    rows, inputs = weight.shape
    groups = -(-inputs // GROUP)
    w = torch.zeros(rows, groups * GROUP)
    w[:, :inputs] = weight.float()
    heed = torch.zeros(groups * GROUP)
    heed[:inputs] = 1.0 if importance is None else importance.float().clamp(min=0.0)
    heed = heed / heed.mean().clamp(min=1e-30)
    w, heed = w.reshape(rows, groups, GROUP), heed.reshape(1, groups, GROUP)
    largest = w.abs().amax(2)
    best = torch.full_like(largest, torch.inf)
    scales = torch.zeros_like(largest)
    for share in TRIED:
        for candidate in _solved(w, heed, largest * share, rounding):
            error = (heed * (w - decode(_codes(w, candidate, rounding), candidate)).square()).sum(2)
            better = error < best
            best, scales = torch.where(better, error, best), torch.where(better, candidate, scales)
    codes = _codes(w, scales, rounding)
    return codes.reshape(rows, -1)[:, :inputs], scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """What signed codes [..., k] of one scale [...] mean; exact where scales are 64 times an f16."""
    powers = torch.ldexp(codes.sign().float(), 1 - codes.abs())
    return scales[..., None] * powers


def table_codes(codes: Tensor) -> np.ndarray:
    """Signed codes as the packed format numbers them: 0, then 2^-6 .. 2^0 as 1..7, negative ones from 9 on."""
    size = torch.where(codes == 0, 0, LEVELS + 1 - codes.abs())
    return torch.where(codes < 0, size + 8, size).to(torch.uint8).numpy()


def _solved(w: Tensor, heed: Tensor, guess: Tensor, rounding: str) -> tuple[Tensor, Tensor]:
    """The guess, and the least-squares scale for the codes that it gives; both as they can be stored."""
    guess = _storable(guess)
    unit = decode(_codes(w, guess, rounding), torch.ones_like(guess))
    size = (heed * unit.square()).sum(2)
    return guess, _storable(torch.where(size > 0, (heed * unit * w).sum(2) / size.clamp(min=1e-30), guess))


def _storable(scale: Tensor) -> Tensor:
    """64 times an f16, finite."""
    narrow = (scale / 2.0 ** (LEVELS - 1)).clamp(max=65504.0).half()
    return narrow.float() * 2.0 ** (LEVELS - 1)


def _codes(w: Tensor, scale: Tensor, rounding: str) -> Tensor:
    """Signed codes of w [..., k] for scales [...]."""
    ratio = torch.where(scale[..., None] > 0, w.abs() / scale[..., None].clamp(min=1e-30), 0.0)
    exponent = -torch.log2(ratio.clamp(min=1e-30))
    # Halfway between 2^-q and 2^-(q+1): 2^-(q + 1/2) in the logarithm, 3/4 2^-q on the line.
    q = torch.ceil(exponent - 0.5) if rounding == "log" else torch.ceil(exponent + float(np.log2(0.75)))
    least = 2.0 ** -(LEVELS - 0.5) if rounding == "log" else 2.0**-LEVELS  # below it lies 0
    codes = q.clamp(0, LEVELS - 1).long() + 1
    return torch.where(ratio < least, 0, codes * w.sign().long())
