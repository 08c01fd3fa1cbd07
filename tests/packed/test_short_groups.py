"""Widths that a format's groups do not divide: the last group of a row is short, in every format and on every level."""

import numpy as np
import pytest

from inhouse.core.errors import UnsupportedError
from inhouse.runtime import packed_native
from inhouse.runtime.packed import FORMATS, Packed, activation_group, quantize_rows_reference
from inhouse.runtime.packed_layout import F32
from inhouse.runtime.packed_plan import layout
from tests.compress.forms import random_packed

pytestmark = [pytest.mark.native]
WIDTHS = (172, 300, 33)
LONG = [name for name, fmt in FORMATS.items() if fmt.group > 32 and not fmt.two_level]


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_short_group_has_its_own_scale(name: str, width: int) -> None:
    packed = random_packed(name, (35, width), width)
    plan = layout(FORMATS[name], width)
    assert plan.groups == -(-plan.width // FORMATS[name].group)
    values = packed.dequantize()
    assert np.isfinite(values).all()
    rows = np.array([0, 34, 16, 15])
    assert np.array_equal(packed_native.unpack_rows(packed, rows), values[rows])
    x = np.random.default_rng(1).standard_normal((9, width)).astype(np.float32)
    for some in (x, x[:1]):
        for isa in ("scalar", "avx2", None):
            try:
                packed_native.linear(packed, some, quantized=False, isa=isa)
            except UnsupportedError:
                continue  # another machine's level
            _compare(packed, some, values, isa)


def _compare(packed: Packed, x: F32, values: F32, isa: str | None) -> None:
    wanted = x.astype(np.float64) @ values.astype(np.float64).T
    found = packed_native.linear(packed, x, quantized=False, isa=isa)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    if activation_group(packed.format):
        codes, scales = quantize_rows_reference(x, activation_group(packed.format))
        rounded = codes.astype(np.float64) * np.repeat(scales, 32, 1)[:, : x.shape[1]]
        wanted = rounded @ values.astype(np.float64).T
        found = packed_native.linear(packed, x, quantized=True, isa=isa)
        assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
