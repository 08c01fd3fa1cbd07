"""How `inhouse bench` counts: tokens of several streams, and what stands beside a rate."""

import pytest

from inhouse.core.settings import load_settings
from inhouse.engine.session import Session
from inhouse.runtime.probe import Peaks
from inhouse.tune.measure import Cell, begun, measure, rate_of_answers


def test_tokens_count_from_when_the_last_sequence_has_begun() -> None:
    """a begins at 1 and makes a token a second; b begins in the step at 3; a ends at 5, b at 7."""
    tokens = [("a", 1.0), ("a", 2.0), ("a", 3.0), ("b", 3.0), ("a", 4.0), ("b", 4.0), ("a", 5.0), ("b", 5.0)]
    tokens += [("b", 6.0), ("b", 7.0)]
    assert begun(tokens, 2) == (3.0, 4)
    assert rate_of_answers(tokens, 2) == 6 / 4


@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
def test_what_the_same_step_makes_after_the_last_first_token_is_out_too(order: str) -> None:
    """a and b run; c begins at 2; in each step the tokens come in that order, a millisecond apart."""
    tokens = [(n, 1 + 0.001 * i) for i, n in enumerate(order.replace("c", ""))]
    tokens += [(n, t + 0.001 * i) for t in (2.0, 3.0, 4.0) for i, n in enumerate(order)]
    assert begun(tokens, 3) == (2.002, 5)
    assert rate_of_answers(tokens, 3) == pytest.approx(3.0)


def test_nothing_counts_where_the_last_to_begin_has_one_token() -> None:
    assert begun([("a", 1.0), ("b", 2.0), ("a", 2.1)], 2) == (2.1, 3)


def test_first_tokens_in_one_step_are_the_old_count() -> None:
    tokens = [(name, float(t)) for t in range(1, 6) for name in "abcd"]
    assert begun(tokens, 4) == (1.0, 4)
    assert rate_of_answers(tokens, 4) == 4 * 4 / 4
    assert rate_of_answers(tokens[:4], 4) == 0.0


def test_a_sequence_without_a_token_is_no_rate() -> None:
    with pytest.raises(ValueError, match="1 of 2"):
        begun([("a", 1.0)], 2)


@pytest.mark.native
def test_a_cell_is_probed_before_and_after() -> None:
    probes = iter([Peaks(1e9, 1e12, 1e12), Peaks(3e9, 1e12, 1e12)])
    with Session.open("demo", load_settings({"prefix_cache": False})) as session:
        found = measure(session, Cell("batch8", 3, 8, 4), lambda: next(probes), rounds=1)
    assert (found.peaks.read_bytes, found.peaks_after.read_bytes) == (1e9, 3e9)
    assert found.share == pytest.approx(found.gb_s / 2.0)  # of the mean
    assert found.disturbed
    assert found.decode_tokens_s == found.tokens_s > 0
    assert next(probes, None) is None
