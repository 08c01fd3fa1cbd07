"""A float tensor as a Packed of a named format without data: floats narrowed, codes rounded to the nearest.

Knows which formats can be made of floats alone; those that need more are built by the pages that choose their codes.
"""

import numpy as np
from torch import Tensor

from inhouse.core.errors import UnsupportedError
from inhouse.runtime.packed import QUANTIZED_FORMAT, Packed, is_float, pack_float, quantize

_KINDS = {name: kind for kind, name in QUANTIZED_FORMAT.items()}
STORABLE = ("f32", "f16", "bf16", *_KINDS)


def pack_as(tensor: Tensor, name: str) -> Packed:
    """A matrix [out, in] in the format `name` of STORABLE; raises UnsupportedError for another, FormatError for a value
    that the format cannot hold."""
    array = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
    if is_float(name):
        return pack_float(array, name)
    if name not in _KINDS:
        raise UnsupportedError(
            f"format {name} is not made of floats alone", remedy=f"Use {', '.join(STORABLE)}", param="format"
        )
    return quantize(array, _KINDS[name])  # type: ignore[arg-type]
