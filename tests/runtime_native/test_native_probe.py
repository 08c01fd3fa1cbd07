"""The yardsticks of benchmarks: they measure something, on every level, and refuse what does not exist."""

import ctypes

import pytest

from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.native_library import available_levels, library
from inhouse.runtime.probe import measure_bandwidth, measure_peaks

pytestmark = pytest.mark.native


@pytest.mark.parametrize("isa", available_levels()[1:] or available_levels())
def test_peaks_are_those_of_a_computer(isa: str) -> None:
    peaks = measure_peaks(isa, 1)
    assert 1e8 < peaks.read_bytes < 1e13
    assert 1e8 < peaks.f32_ops < 1e13
    assert 1e8 < peaks.int8_ops < 1e14


def test_vector_levels_beat_plain_code() -> None:
    levels = available_levels()
    if len(levels) < 2:
        pytest.skip(f"this machine runs {levels} alone")
    assert measure_peaks(levels[-1], 1).int8_ops > 4 * measure_peaks("scalar", 1).int8_ops


def test_bandwidth_is_measured_by_default_threads() -> None:
    assert measure_bandwidth() > 1e8


def test_refusals() -> None:
    with pytest.raises(UsageError, match="unknown instruction set"):
        measure_peaks("mmx")
    with pytest.raises(UsageError, match="threads"):
        measure_peaks("", -1)
    value = ctypes.c_double()
    assert library().ih_probe(b"", 9, 1, ctypes.byref(value)) == 1
    absent = next((name for name in ("neon", "avx512") if name not in available_levels()), None)
    if absent is not None:
        with pytest.raises(UnsupportedError):
            measure_peaks(absent)
