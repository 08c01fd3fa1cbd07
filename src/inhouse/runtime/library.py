"""Finds and opens libinhouse. Knows where it may lie and its ABI number; declares no functions of it.

Order: $INHOUSE_NATIVE_LIB, then `lib/` in each folder of the package (a wheel's, an editable install's, a build's).
"""

import ctypes
import os
from functools import cache
from pathlib import Path

import inhouse
from inhouse.core.errors import UnavailableError

ABI_VERSION = 4  # IH_ABI_VERSION of native/include/inhouse.h
NAME = "libinhouse.so"


def library_path() -> Path:
    """Where the library is; raises UnavailableError naming the places where it is not."""
    named = os.environ.get("INHOUSE_NATIVE_LIB")
    places = [Path(named)] if named else [Path(folder) / "lib" / NAME for folder in inhouse.__path__]
    for place in places:
        if place.is_file():
            return place
    raise UnavailableError(
        f"the native library is not at {', '.join(map(str, places))}",
        remedy="Install Inhouse with `pip install .`, or name the file in INHOUSE_NATIVE_LIB",
    )


@cache
def load_library(path: Path) -> ctypes.CDLL:
    """Opens the library once; raises UnavailableError if it cannot be opened or speaks another ABI version."""
    try:
        library = ctypes.CDLL(str(path))
        library.ih_abi_version.restype = ctypes.c_int32
    except (OSError, AttributeError) as error:
        raise UnavailableError(f"cannot open {path}: {error}", remedy="Build it again for this machine") from error
    library.ih_error.restype = ctypes.c_int64
    library.ih_error.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    if (found := library.ih_abi_version()) != ABI_VERSION:
        raise UnavailableError(f"{path} speaks ABI {found}, this Inhouse needs {ABI_VERSION}", remedy="Build it again")
    return library


def last_error(library: ctypes.CDLL) -> str:
    """The reason of this thread's last failure."""
    text = ctypes.create_string_buffer(4096)
    library.ih_error(text, len(text))
    return text.value.decode("utf-8", "replace")
