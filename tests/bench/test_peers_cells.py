"""How bench/peers counts the tokens of a cell, with engines made by hand. No engine runs."""

import json

import pytest
from bench.peers import common
from bench.peers.common import Answered


def test_tokens_from_before_all_have_begun_do_not_count() -> None:
    """Two streams of five tokens, one a second each: the second begins when the first has three."""
    assert common.rate(2, 5, Answered(first=3.0, total=7.0, early=4)) == 6 / 4
    assert common.rate(2, 5, Answered(first=1.0, total=5.0, early=2)) == 8 / 4  # both begin in one step


def test_what_is_not_known_never_counts_against_a_peer() -> None:
    assert common.rate(8, 129, Answered(1.0, 3.0)) == 8 * 128 / 2
    assert common.rate(8, 129, Answered(1.0, 3.0, 3)) == 8 * 128 / 2  # fewer than one a prompt: miscounted


def told(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    """The figures on stdout."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_cell_tells_its_rate_and_what_was_out_before(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[int, int]] = []

    def generate(prompts: common.Prompts, new: int) -> Answered:
        asked.append((len(prompts), new))
        return Answered(2.0, 4.0, 100 if len(prompts) == 8 else None)

    common.run_cells("batch8,prefill512,decode32", generate, 1)
    batch, prefill, decode = told(capsys)
    assert (batch["value"], batch["early_tokens"]) == ((8 * 129 - 100) / 2, 100)
    assert prefill["value"] == 512 / 4
    assert (decode["value"], decode["early_tokens"]) == (128 / 2, None)
    assert asked == [(1, 8), (8, 129), (1, 1), (1, 1), (1, 129)]


def test_the_machine_is_probed_before_and_after_each_cell(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def generate(prompts: common.Prompts, new: int) -> Answered:
        order.append(f"run {new}")
        return Answered(1.0, 2.0, 1)

    def more(cell: str) -> common.Beside:
        order.append(f"before {cell}")

        def after() -> dict[str, object]:
            order.append(f"after {cell}")
            return {"probed": True}

        return after

    common.run_cells("decode32,prefill4096,rss", generate, 1, more)
    assert order == [
        "run 8", "before decode32", "run 129", "after decode32", "before prefill4096", "run 1", "after prefill4096",
        "before rss", "run 128", "after rss",
    ]  # fmt: skip
    assert all(figure["probed"] for figure in told(capsys))
