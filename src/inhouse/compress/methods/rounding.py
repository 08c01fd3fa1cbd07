"""Plain rounding: each weight to the nearest code, the scale by the packer's own search.

Source: the round-to-nearest baseline of GPTQ (Frantar et al. 2022, arXiv 2210.17323). `q8`, `q6` and `q4` are what
`--quantize` packs at load; float formats narrow.
"""

from dataclasses import dataclass
from typing import get_args

import numpy as np
from torch import Tensor

from inhouse.compress.stats import LinearStats
from inhouse.core.errors import UnsupportedError
from inhouse.runtime.form import Form
from inhouse.runtime.packed import QUANTIZED_FORMAT, is_float, pack_float, quantize
from inhouse.runtime.packed_quantize import Kind


@dataclass(frozen=True, slots=True)
class RoundingOptions:
    """None."""


def rounding(weight: Tensor, stats: LinearStats | None, options: RoundingOptions, fmt: str) -> Form:
    """weight f32 [out, in] -> Form in a float format, or in one of those that `--quantize` makes."""
    array = np.ascontiguousarray(weight.numpy(), np.float32)
    kinds: dict[str, Kind] = {QUANTIZED_FORMAT[kind]: kind for kind in get_args(Kind)}
    if fmt in kinds:
        return Form(quantize([array], kinds[fmt], shape=(array.shape[0], array.shape[1])))
    if is_float(fmt):
        return Form(pack_float(array, fmt))
    raise UnsupportedError(f"plain rounding has no format {fmt}", param="format")
