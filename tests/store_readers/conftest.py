"""What the reader tests share: the peak of memory that a call takes."""

import tracemalloc
from collections.abc import Callable

import pytest


@pytest.fixture
def peak_bytes() -> Callable[[Callable[[], object]], int]:
    """Runs a call and gives the most bytes that Python and numpy held during it beyond those held before."""

    def measure(call: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            call()
            return tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()

    return measure
