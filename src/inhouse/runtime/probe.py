"""What this machine can reach at most: memory bandwidth, int8 dot products, f32 arithmetic. Measured by the native
library at the level and with the threads that an executor uses; knows nothing of models."""

import ctypes
from dataclasses import dataclass

from inhouse.runtime.native_library import check, library

_READ, _DOT, _FMA = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Peaks:
    """Rates a second over all threads: bytes read from memory, int8 operations and f32 operations (a multiply and an
    add are two)."""

    read_bytes: float
    int8_ops: float
    f32_ops: float


def measure_peaks(isa: str = "", threads: int = 0) -> Peaks:
    """Measures all three, in about half a second; takes 256 MiB of memory while it runs.

    Args:
        isa: level to measure; "": the one that executors use. threads: 0: the default of executors.

    Raises: UsageError, UnsupportedError (the level), CapacityError (no memory).
    """
    return Peaks(*(_probe(isa, kind, threads) for kind in (_READ, _DOT, _FMA)))


def measure_bandwidth(threads: int = 0) -> float:
    """Bytes a second that all threads together read from memory; about a tenth of a second."""
    return _probe("", _READ, threads)


def _probe(isa: str, kind: int, threads: int) -> float:
    lib, value = library(), ctypes.c_double()
    probe = lib.ih_probe
    probe.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_double)]
    probe.restype = ctypes.c_int32
    check(lib, probe(isa.encode(), kind, threads, ctypes.byref(value)))
    return value.value
