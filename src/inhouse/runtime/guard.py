"""Reading mapped files that somebody may cut short: an error instead of the process's end.

Knows the native library's guards; does not know files. Inside a guarded range a page that is gone reads as zeros, and
the range is marked. Without the library there is no guard: such a file ends the process, as it would any program.
Weights of a native model are guarded by the model itself; a second guard over them would hide the damage from it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from inhouse.core.errors import FormatError, UnavailableError
from inhouse.runtime.native_library import library


@contextmanager
def guarded(ranges: Iterable[tuple[int, int]], what: str) -> Iterator[None]:
    """Guards (address, bytes) ranges while the block runs.

    Raises FormatError, whatever else the block raised, if a page of them was lost meanwhile; `what` names the file.
    """
    try:
        lib = library()
    except UnavailableError:
        yield
        return
    handles = [handle for begin, size in ranges if (handle := lib.ih_guard_add(begin, size)) >= 0]
    try:
        yield
    finally:
        damaged = [handle for handle in handles if lib.ih_guard_damaged(handle)]
        for handle in handles:
            lib.ih_guard_remove(handle)
        if damaged:
            raise FormatError(
                f"{what} was cut short while it was read", remedy="Leave it alone meanwhile; restore it and try again."
            )
