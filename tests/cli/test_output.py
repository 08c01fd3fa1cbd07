"""Tables, sizes and the progress bar, as text."""

import io
import json

import pytest

from inhouse.cli import output

pytestmark = pytest.mark.null


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock of the progress bar: clock[0] seconds."""
    now = [100.0]
    monkeypatch.setattr("inhouse.cli.output.time.monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 30, "5.0 GiB"),
        (3 << 40, "3.0 TiB"),
        (9 << 50, "9216.0 TiB"),
    ],
)
def test_bytes(size: int, text: str) -> None:
    assert output.human_bytes(size) == text


@pytest.mark.parametrize(("count", "text"), [(7, "7"), (260_032, "260.0K"), (494_032_768, "494.0M"), (7.2e9, "7.2B")])
def test_counts(count: float, text: str) -> None:
    assert output.human_count(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (59.6, "1:00"), (4000, "1:06:40")])
def test_seconds(seconds: float, text: str) -> None:
    assert output.human_seconds(seconds) == text


def test_a_table_aligns_numbers_to_the_right_and_text_to_the_left(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": "a", "n": 5, "x": 0.123456}, {"name": "longer", "n": 12345, "x": None}]
    output.print_table(rows, ["name", "n", "x"])
    assert capsys.readouterr().out == (
        "NAME        N  X\n"  # x holds something that is no number: to the left
        "a           5  0.1235\n"
        "longer  12345  -\n"
    )


def test_a_table_without_rows_is_its_header(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table([], ["name", "size"])
    assert capsys.readouterr().out == "NAME  SIZE\n"


def test_large_floats_are_whole_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_pairs({"rate": 24451.7, "b": 12.3456})
    assert capsys.readouterr().out == "rate  24452\nb     12.35\n"


def test_json_keeps_other_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"name": "模型"})
    text = capsys.readouterr().out
    assert "模型" in text
    assert json.loads(text) == {"name": "模型"}


def test_the_bar_tells_amount_share_and_time_left(clock: list[float]) -> None:
    screen = Screen()
    bar = output.ProgressBar(screen, width=10)
    bar("store model", 0, 4 << 20)
    clock[0] += 2.0
    bar("store model", 1 << 20, 4 << 20)
    last = screen.getvalue().rsplit("\r\x1b[K", 1)[1]
    assert last == "store model [##        ]  25% 1.0 MiB of 4.0 MiB, 0:06 left"
    clock[0] += 2.0
    bar("store model", 4 << 20, 4 << 20)
    assert screen.getvalue().endswith("store model [##########] 100% 4.0 MiB of 4.0 MiB\n")


def test_the_bar_draws_at_most_ten_times_a_second(clock: list[float]) -> None:
    screen = Screen()
    bar = output.ProgressBar(screen)
    for done in range(1000):
        clock[0] += 0.001
        bar("hash", done, 1001)
    assert screen.getvalue().count("\r") <= 11


def test_a_new_stage_begins_a_new_line_and_a_new_estimate(clock: list[float]) -> None:
    screen = Screen()
    bar = output.ProgressBar(screen, unit="tokens", width=4)
    bar("one", 1, 2)
    clock[0] += 100
    bar("two", 0, 2)
    clock[0] += 1
    bar("two", 1, 2)
    lines = screen.getvalue().split("\n")
    assert len(lines) == 2
    assert lines[1].endswith("two [##  ]  50% 1 of 2 tokens, 0:01 left")
    bar.finish()
    bar.finish()
    assert screen.getvalue().count("\n") == 2


def test_a_log_file_gets_one_line_a_stage_and_no_escapes(clock: list[float]) -> None:
    log = io.StringIO()
    bar = output.ProgressBar(log)
    for done in range(10):
        bar("pack weights", done, 10)
        clock[0] += 0.5
    bar("quick", 1, 1)
    bar.finish()
    assert log.getvalue().count("\n") == 1
    assert "\x1b" not in log.getvalue()
    assert log.getvalue().startswith("pack weights [")


def test_an_empty_stage_is_whole_and_a_short_one_leaves_no_trace(clock: list[float]) -> None:
    screen = Screen()
    output.ProgressBar(screen, width=2)("none", 0, 0)
    assert screen.getvalue() == "\r\x1b[Knone [##] 100% 0 B of 0 B\r\x1b[K"
