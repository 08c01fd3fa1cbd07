"""Single packed matrices in the native library: filling tiles at load, and the kernels by themselves for tests.

Everything here has a numpy definition elsewhere (packed_quantize, packed_layout); this is the same, faster.
"""

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_void_p
from functools import cache

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import UnavailableError, UsageError
from inhouse.runtime.native_library import CWeight, check, library
from inhouse.runtime.packed_layout import F32, FORMATS, U8, Packed

_SIGNATURES = {
    "ih_linear": [c_char_p, POINTER(CWeight), c_void_p, c_int64, c_int32, c_void_p],
    "ih_unpack_rows": [c_char_p, POINTER(CWeight), c_void_p, c_int64, c_void_p],
    "ih_quantize_tiles": [c_char_p, POINTER(CWeight), c_void_p],
}


@cache
def _declared() -> ctypes.CDLL:
    lib = library()
    for name, arguments in _SIGNATURES.items():
        function = getattr(lib, name, None)
        if function is None:
            raise UnavailableError(f"the native library lacks {name}", remedy="Build it again")
        function.restype = c_int32
        function.argtypes = arguments
    return lib


def _weight(name: str, shape: tuple[int, int], data: U8) -> CWeight:
    return CWeight(FORMATS[name].id, 0, shape[0], shape[1], data.ctypes.data, data.nbytes)


def _name(isa: str | None) -> bytes | None:
    return None if isa is None else isa.encode()


def fill_tiles(name: str, rows: F32, tiles: U8, isa: str | None = None) -> bool:
    """Quantises finite rows [n, in] to q8_0, q6_0 or q4_0 into the bytes of their tiles; False without the library."""
    try:
        lib = _declared()
    except UnavailableError:
        return False
    source = np.ascontiguousarray(rows, np.float32)
    weight = _weight(name, (source.shape[0], source.shape[1]), tiles)
    check(lib, lib.ih_quantize_tiles(_name(isa), byref(weight), source.ctypes.data))
    return True


def linear(packed: Packed, x: F32, *, quantized: bool, isa: str | None = None) -> F32:
    """y [rows, out] = x [rows, in] times the matrix on one thread; `quantized`: x goes through quantize_rows first.

    Raises UsageError where x does not fit, UnsupportedError for a level that this machine lacks, UnavailableError
    without the library.
    """
    if x.ndim != 2 or x.shape[1] != packed.shape[1]:
        raise UsageError(f"activations {x.shape} do not fit a matrix {packed.shape}")
    lib, source = _declared(), np.ascontiguousarray(x, np.float32)
    y = np.empty((x.shape[0], packed.shape[0]), np.float32)
    weight = _weight(packed.format, packed.shape, packed.data)
    status = lib.ih_linear(
        _name(isa), byref(weight), source.ctypes.data, len(source), c_int32(quantized), y.ctypes.data
    )
    check(lib, status)
    return y


def unpack_rows(packed: Packed, ids: npt.ArrayLike, isa: str | None = None) -> F32:
    """Rows `ids` as f32 [n, in], as `Packed.rows`; raises UsageError for an id outside the matrix."""
    lib, index = _declared(), np.ascontiguousarray(ids, np.int64)
    out = np.empty((index.size, packed.shape[1]), np.float32)
    weight = _weight(packed.format, packed.shape, packed.data)
    check(lib, lib.ih_unpack_rows(_name(isa), byref(weight), index.ctypes.data, index.size, out.ctypes.data))
    return out
