"""A lock between processes on one file: many adders or one sweeper.

Knows flock; a process that dies, however it dies, lets go of it. Does not know what is protected.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inhouse.core.errors import CapacityError, UnavailableError

_POLL_S = 0.02


@contextmanager
def shared(path: Path, timeout_s: float = 60.0) -> Iterator[None]:
    """Held by any number of processes and threads at once. Raises CapacityError after `timeout_s`."""
    with _held(path, fcntl.LOCK_SH, timeout_s):
        yield


@contextmanager
def exclusive(path: Path, timeout_s: float = 60.0) -> Iterator[None]:
    """Held by one alone; 0 seconds means: now or never. Raises CapacityError after `timeout_s`."""
    with _held(path, fcntl.LOCK_EX, timeout_s):
        yield


@contextmanager
def _held(path: Path, kind: int, timeout_s: float) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _acquire(descriptor, path, kind, timeout_s)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, kind: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UnavailableError(
                    f"{path} cannot be locked: {error.strerror}",
                    remedy="Keep the model home on a file system that has locks.",
                ) from None
        if time.monotonic() >= deadline:
            raise CapacityError(
                f"another process has held {path.name} for {timeout_s:g} s",
                remedy="Wait until its import or clean-up is done.",
            )
        time.sleep(_POLL_S)
