"""Plain rounding: each weight to the nearest code, the scale by the packer's own search.

Source: the round-to-nearest baseline of GPTQ (Frantar et al. 2022, arXiv 2210.17323). `q8`, `q6` and `q4` are what
`--quantize` packs at load; float formats narrow; other code formats have scales by each group's least and greatest
weight.
"""

from dataclasses import dataclass
from typing import get_args

import numpy as np
from torch import Tensor

from inhouse.compress.grids import Grid
from inhouse.compress.stats import LinearStats
from inhouse.core.errors import UsageError
from inhouse.runtime.form import Form
from inhouse.runtime.packed import QUANTIZED_FORMAT, is_float, pack_float, quantize
from inhouse.runtime.packed_quantize import Kind


@dataclass(frozen=True, slots=True)
class RoundingOptions:
    """There are none: the scale is the packer's own."""


def rounding(weight: Tensor, stats: LinearStats | None, options: RoundingOptions, fmt: str) -> Form:
    """weight f32 [out, in] -> Form. Raises UnsupportedError for a format without a grid."""
    array = np.ascontiguousarray(weight.numpy(), np.float32)
    kinds: dict[str, Kind] = {QUANTIZED_FORMAT[kind]: kind for kind in get_args(Kind)}
    if fmt in kinds:
        return Form(quantize([array], kinds[fmt], shape=(array.shape[0], array.shape[1])))
    if is_float(fmt):
        return Form(pack_float(array, fmt))
    if not fmt:
        raise UsageError("rounding needs a format", remedy="Name one, such as format: q4_0", param="format")
    return Form(Grid(fmt, weight.shape[1]).quantize(weight, None, "minmax"))
