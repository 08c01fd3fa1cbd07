"""What a run takes of memory, measured while it runs.

Counted are anonymous and shared pages (RssAnon + RssShmem): mapped files are the system's to drop. Knows Linux's
/proc; elsewhere the resident set stands in.
"""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

STATUS = Path("/proc/self/status")
SAMPLE_SECONDS = 0.02


def anonymous_bytes() -> int:
    """Anonymous and shared memory of this process, in bytes."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return int(psutil.Process().memory_info().rss)
    found = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return sum(int(found.get(key, "0 kB").split()[0]) * 1024 for key in ("RssAnon", "RssShmem"))


class PeakMemory:
    """The largest `anonymous_bytes` while the context lasts, sampled by a thread."""

    def __init__(self) -> None:
        self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, anonymous_bytes())
