"""The roofline against sums done by hand."""

from pathlib import Path

import pytest

from inhouse.load.model import open_model
from inhouse.runtime.packed import Packed
from inhouse.runtime.probe import Peaks
from inhouse.tune.limits import Chunk, Work, fresh_peaks, step_work
from inhouse.tune.measure import CELLS, choose, fit

pytestmark = pytest.mark.native


def test_work_of_stories_by_hand(stories: Path) -> None:
    """dim 64, hidden 172, 5 layers, 8 heads of 8, 4 KV heads, vocabulary 512."""
    loaded = open_model(str(stories / "stories260K-Q8_0.gguf"), cache=False)
    try:
        work = step_work(loaded.programs, loaded.weights, "f16", [Chunk(1, 99), Chunk(3, 7, 2)])
        read = {n: w for n, w in loaded.weights.items() if isinstance(w, Packed) and n != "embed.weight"}  # has a head
        assert work.bytes_read == sum(w.nbytes for w in read.values()) + (100 + 10) * 5 * 2 * 4 * 8 * 2
        a_row = 5 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 172 * 2)
        assert work.int8_ops == 2 * (4 * a_row + 3 * 512 * 64)
        assert work.f32_ops == 2 * 4 * 5 * 64 * 172  # ffn_down stays f16: 172 is no multiple of 32
        assert work.attention_ops == 2 * 5 * 8 * 16 * (100 + 8 + 9 + 10)
    finally:
        loaded.close()


def test_reading_and_computing_overlap() -> None:
    peaks = Peaks(read_bytes=10.0, int8_ops=100.0, f32_ops=50.0)
    assert Work(bytes_read=30.0, int8_ops=100.0).seconds(peaks) == 3.0
    assert Work(bytes_read=30.0, int8_ops=200.0, f32_ops=50.0, attention_ops=200.0).seconds(peaks) == 5.0


def test_fresh_peaks_come_from_another_process() -> None:
    assert fresh_peaks(1).int8_ops > 1e8


def test_cells_are_cut_or_left_out() -> None:
    assert [c.key for c in choose("all")] == [c.key for c in CELLS]
    short = fit(CELLS[0], 256, 64)
    assert short is not None
    assert (short.prompt, short.answer) == (255, 1)
    assert fit(CELLS[1], 4096, 64) is None
    assert fit(CELLS[1], 4097, 64) == CELLS[1]
