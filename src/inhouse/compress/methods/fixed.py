"""Dynamic fixed point: v = m 2^-f with whole mantissas m of b bits and one fraction length f a tensor.

Weights: f by the rule itself, mantissas rounded half to even (Courbariaux et al. 2014, arXiv 1412.7024; Ristretto,
Gysel 2016, arXiv 1604.03168). Activations: `Exponent` watches how often they overflow and moves f one step at a time.
Stored as int8 or int4 with a power of two as the scale of every row, so each product is a shift.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from inhouse.compress.stats import LinearStats
from inhouse.compress.values import Range
from inhouse.core.errors import FormatError, UsageError
from inhouse.runtime.form import Form
from inhouse.runtime.packed import pack_codes

FORMATS: Mapping[int, tuple[str, ...]] = {8: ("i8_row_f32", "i8_token_f32"), 4: ("i4_row_f32",)}  # by bits
BITS = 8


@dataclass(frozen=True, slots=True)
class FixedOptions:
    """overflow: share of a tensor's values that may be clipped. bits: of the mantissa, sign included: 8
    or 4, as those between are stored in as many bytes as 8."""

    overflow: Annotated[float, Range(0, 0.5, below=True)] = 0.0
    bits: Annotated[int, Range(2, BITS)] = BITS

    def __post_init__(self) -> None:
        if self.bits not in FORMATS:
            raise UsageError(
                f"mantissas of {self.bits} bits would be stored in {4 if self.bits < 4 else 8}",
                remedy=f"Use bits: {' or '.join(map(str, FORMATS))}", param="bits",
            )  # fmt: skip
        if not 0.0 <= self.overflow < 0.5:
            raise UsageError(f"an overflow of {self.overflow}, must lie in 0..0.5", param="overflow")


def fixed(
    weight: Tensor, stats: LinearStats | None, options: FixedOptions, fmt: str = ""
) -> tuple[Form, dict[str, int]]:
    """As the table of methods calls it: weight f32 [out, in] -> Form, and the fraction lengths for the record (that of
    the inputs from the largest magnitudes that calibration saw). Raises UsageError for another format."""
    known = FORMATS[options.bits]
    fmt = fmt or known[0]
    if fmt not in known:
        said = f"{options.bits}-bit fixed point is stored as {' or '.join(known)}, not {fmt}"
        raise UsageError(said, remedy="Give the `bits` of the format", param="format")
    length = fraction(weight, options.bits, options.overflow)
    codes = (mantissas(weight, length, options.bits) + (1 << (options.bits - 1))).to(torch.uint8).numpy()
    scales = np.full((weight.shape[0], 1), 2.0**-length, np.float32)
    record = {"fraction": length}
    if stats is not None and stats.count:
        record["input_fraction"] = fraction(stats.max_abs, options.bits, 0.0)
    return Form(pack_codes(fmt, codes, scales)), record


def fraction(values: Tensor, bits: int = BITS, overflow: float = 0.0) -> int:
    """The largest f at which at most a share `overflow` of the values lies beyond the mantissas; 0 for zeros. Where the
    rule of `Exponent` comes to rest. Raises FormatError for values that are not finite."""
    sizes = values.detach().abs().flatten().double()
    if not bool(torch.isfinite(sizes).all()):
        raise FormatError("a value is not finite; it has no fixed point")
    allowed = int(overflow * sizes.numel())
    largest = float(sizes.sort(descending=True).values[allowed]) if sizes.numel() else 0.0
    if largest <= 0:
        return 0
    most = 2 ** (bits - 1) - 1
    length = math.floor(math.log2((most + 0.5) / largest)) + 1
    while largest * 2.0**length > most + 0.5:  # half a step beyond the last mantissa still rounds to it
        length -= 1
    return max(-100, min(100, length))


def mantissas(values: Tensor, length: int, bits: int = BITS) -> Tensor:
    """m = round(v 2^f), half to even, clipped symmetrically; int64 of the values' shape."""
    most = 2 ** (bits - 1) - 1
    return torch.round(values.double() * 2.0**length).clamp(-most, most).long()


def quantised(values: Tensor, length: int, bits: int = BITS) -> Tensor:
    """The values that the mantissas mean, f32."""
    return (mantissas(values, length, bits).double() * 2.0**-length).float()


class Exponent:
    """The fraction length of a stream of activations, moved by its overflows.

    After each `update` with a tensor: f falls by one where more than a share `overflow` of its values overflow, and
    rises by one where, with f + 1, at most that share would. A stream whose size stays within a factor of two of
    steady therefore comes to rest, and one that grows by 2^n is followed in n updates.

    Args:
        bits: of the mantissa. length: where to begin. overflow: the share, t of the paper.
    """

    def __init__(self, bits: int = BITS, length: int = 0, overflow: float = 1e-4) -> None:
        self.bits, self.length, self.overflow = bits, length, overflow
        self.seen, self.clipped = 0, 0

    def update(self, values: Tensor) -> int:
        """Counts, moves f by at most one, and returns it. Raises FormatError for values that are not finite."""
        if not bool(torch.isfinite(values).all()):
            raise FormatError("an activation is not finite")
        self.seen += values.numel()
        now = self._beyond(values, self.length)
        self.clipped += now
        allowed = self.overflow * values.numel()
        if now > allowed:
            self.length -= 1
        elif self._beyond(values, self.length + 1) <= allowed and bool((values != 0).any()):
            self.length += 1
        return self.length

    def _beyond(self, values: Tensor, length: int) -> int:
        most = 2 ** (self.bits - 1) - 1
        return int((values.detach().abs().double() * 2.0**length > most + 0.5).sum())
