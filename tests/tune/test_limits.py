"""The roofline against sums done by hand."""

from pathlib import Path

import pytest

from inhouse.load.model import open_model
from inhouse.runtime.packed import Packed
from inhouse.runtime.probe import Peaks
from inhouse.tune.limits import Chunk, Work, disturbed, fresh_peaks, mean_peaks, step_work
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


A_ROW = 5 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 172 * 3)  # weights of the layers of stories260K
HEAD = 512 * 64


@pytest.mark.parametrize(
    ("kv", "position"),
    [
        ("f32", 5 * 4 * (8 + 8) * 4),
        ("bf16", 5 * 4 * (8 + 8) * 2),
        ("int8", 5 * 4 * (8 + 16 + 2 * 4)),  # V of 8 padded to 16; a float scale for K, one for V
    ],
)
def test_a_prompt_counts_attention_one_row_of_the_head_and_the_bytes_of_the_kv_type(
    stories: Path, kv: str, position: int
) -> None:
    loaded = open_model(str(stories / "hf"), cache=False, kv_dtype=kv)
    try:
        work = step_work(loaded.executor.programs, loaded.weights, kv, [Chunk(100, 28, 1), Chunk(50, 0, 0)])
        weights = {n: w for n, w in loaded.weights.items() if isinstance(w, Packed)}
        floats = work.f32_ops + work.bf16_ops
        assert floats == 2 * (150 * A_ROW + HEAD)
        assert work.int8_ops == 0
        assert work.attention_ops == 2 * 5 * 8 * (8 + 8) * (sum(range(29, 129)) + sum(range(1, 51)))
        read = sum(w.nbytes for n, w in weights.items() if n != "embed.weight" or "head.weight" not in weights)
        assert work.bytes_read == read + (128 + 50) * position
        unsampled = step_work(loaded.executor.programs, loaded.weights, kv, [Chunk(9, 0, 0)])
        assert unsampled.ops == 2 * 9 * A_ROW + 2 * 5 * 8 * (8 + 8) * 45
    finally:
        loaded.close()


def test_bf16_weights_count_at_twice_the_f32_peak() -> None:
    loaded = open_model("demo")
    try:
        work = step_work(loaded.programs, loaded.weights, "f16", [Chunk(3, 0)])
        weights = {n: w for n, w in loaded.weights.items() if isinstance(w, Packed)}
    finally:
        loaded.close()
    assert {w.format for w in weights.values()} == {"bf16"}
    tables = {n: w.shape[0] * w.shape[1] for n, w in weights.items() if n in ("embed.weight", "head.weight")}
    layers = sum(w.shape[0] * w.shape[1] for n, w in weights.items() if n not in tables)
    assert (work.bf16_ops, work.f32_ops) == (2 * (3 * layers + tables["embed.weight"]), 0)
    peaks = Peaks(read_bytes=1e30, int8_ops=100.0, f32_ops=50.0)
    assert Work(bf16_ops=100.0).seconds(peaks) == 1.0
    assert Work(f32_ops=100.0).seconds(peaks) == 2.0


def test_reading_and_computing_overlap() -> None:
    peaks = Peaks(read_bytes=10.0, int8_ops=100.0, f32_ops=50.0)
    assert Work(bytes_read=30.0, int8_ops=100.0).seconds(peaks) == 3.0
    assert Work(bytes_read=30.0, int8_ops=200.0, f32_ops=50.0, attention_ops=200.0).seconds(peaks) == 5.0


def test_limits_that_differ_by_more_than_a_tenth_are_disturbed() -> None:
    before, work = Peaks(read_bytes=10.0, int8_ops=100.0, f32_ops=50.0), Work(bytes_read=30.0, int8_ops=100.0)
    assert mean_peaks(before, Peaks(20.0, 300.0, 60.0)) == Peaks(15.0, 200.0, 55.0)
    assert not disturbed(work, before, Peaks(10.9, 100.0, 50.0))
    assert disturbed(work, before, Peaks(11.1, 100.0, 50.0))
    assert disturbed(work, Peaks(11.1, 100.0, 50.0), before)
    assert not disturbed(work, before, Peaks(10.0, 200.0, 90.0))  # reading bounds it, before and after
    assert disturbed(work, before, Peaks(10.0, 25.0, 50.0))  # arithmetic bounds it after


def test_fresh_peaks_come_from_another_process() -> None:
    assert fresh_peaks(1).int8_ops > 1e8


def test_cells_are_cut_or_left_out() -> None:
    assert [c.key for c in choose("all")] == [c.key for c in CELLS]
    short = fit(CELLS[0], 256, 64)
    assert short is not None
    assert (short.prompt, short.answer) == (255, 1)
    assert fit(CELLS[1], 4096, 64) is None
    assert fit(CELLS[1], 4097, 64) == CELLS[1]
