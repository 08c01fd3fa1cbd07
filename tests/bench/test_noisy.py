"""The rows of bench.noisy: medians of tokens/s, ratios within a turn, the share a fair scheduler leaves."""

import os
import time

import pytest
from bench.noisy import fair, neighbours, summary


def test_ratios_are_taken_within_a_turn() -> None:
    rows = summary("decode32", [[100.0, 60.0, 40.0], [50.0, 40.0, 30.0], [80.0, 56.0, 40.0]], 2)
    assert [row["neighbours"] for row in rows] == [0, 1, 2]
    assert [row["tokens_s"] for row in rows] == [80.0, 56.0, 40.0]
    assert [row["ratio"] for row in rows] == [1.0, 0.7, 0.5]
    assert [row["fair"] for row in rows] == [1.0, 0.75, 0.5]


def test_a_neighbour_takes_half_of_a_processor() -> None:
    assert fair(1, 2) == 0.75
    assert fair(2, 8) == pytest.approx(0.875)


def test_neighbours_spin_where_they_are_put_and_end() -> None:
    cpu = max(os.sched_getaffinity(0))
    before = set(children())
    with neighbours([cpu]):
        (pid,) = set(children()) - before
        deadline = time.monotonic() + 20
        while os.sched_getaffinity(pid) != {cpu} and time.monotonic() < deadline:
            time.sleep(0.01)
        assert os.sched_getaffinity(pid) == {cpu}
    assert set(children()) == before


def children() -> list[int]:
    """Processes that this one has started and not yet waited for."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]
