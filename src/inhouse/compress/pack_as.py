"""A float tensor as a Packed of any format, without data: floats narrowed, codes by weighted least squares."""

import numpy as np
from torch import Tensor

from inhouse.compress.grids import Grid
from inhouse.runtime.packed import Packed, is_float, pack_float


def pack_as(tensor: Tensor, name: str) -> Packed:
    """A matrix [out, in] in the format `name`. Raises UnsupportedError for an unknown format or inputs that do not fit
    it, FormatError for a value that it cannot hold."""
    values = tensor.detach().float().cpu().contiguous()
    if is_float(name):
        return pack_float(np.ascontiguousarray(values.numpy()), name)
    return Grid(name, values.shape[1]).quantize(values)
