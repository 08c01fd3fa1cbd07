"""Whose prompt goes first: the shortest rest, never overtaken for long; and where a step ends."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from inhouse.engine.order import PATIENCE
from inhouse.engine.request import Event, SamplingParams, make_request
from inhouse.runtime.program import StateGroup
from tests.engine.driving import Result, drive, make_engine, run_all
from tests.engine.fakes import FakeExecutor, paged, programs

pytestmark = pytest.mark.null
GREEDY = SamplingParams(temperature=0, ignore_eos=True)


def first_tokens(lengths: Sequence[int], priorities: Sequence[int] = (), **limits: Any) -> tuple[list[int], list[int]]:
    """(requests in the order in which their first tokens came, tokens of each step) of prompts that come at once."""
    executor = FakeExecutor(programs(context=2048))
    engine = make_engine(executor, blocks={"full": 400}, **limits)
    order: list[int] = []
    for i, length in enumerate(lengths):

        def note(events: list[Event], i: int = i) -> None:
            order.append(i)

        priority = priorities[i] if priorities else 0
        engine.submit(make_request(f"r{i}", [9 + i] * length, replace(GREEDY), 1, priority=priority), note)
    drive(engine)
    return order, [int(step.tokens.size) for step in executor.steps]


def test_the_shortest_prompt_goes_first_whenever_it_came() -> None:
    assert first_tokens((300, 20, 90, 40), step_tokens=64)[0] == [1, 3, 2, 0]
    assert first_tokens((300, 20, 90, 40), step_tokens=64, max_running=1)[0] == [1, 3, 2, 0]
    assert first_tokens((50, 50, 50), step_tokens=64)[0] == [0, 1, 2], "equal ones by arrival"
    assert first_tokens((300, 20, 90, 40), (0, 1, 1, -1), step_tokens=64)[0] == [3, 0, 1, 2], "priority before all"


def test_a_step_ends_with_a_prompt_once_half_of_it_is_used() -> None:
    assert first_tokens((128, 128, 128), step_tokens=256)[1] == [128, 128, 128]
    assert first_tokens((64, 64, 64, 64), step_tokens=256)[1] == [128, 128]
    assert first_tokens((600,), step_tokens=256)[1] == [256, 256, 88], "one alone takes whole steps"
    assert first_tokens((100, 600), step_tokens=256)[1] == [256, 256, 188]


@pytest.mark.parametrize("chunkable", [True, False])
def test_a_long_prompt_is_overtaken_by_so_many_tokens_at_most(chunkable: bool) -> None:
    group: StateGroup = replace(paged(), chunkable=chunkable, shareable=chunkable)
    budget, short, long = 64, 30, 200
    executor = FakeExecutor(programs(group, context=512))
    engine = make_engine(executor, step_tokens=budget, max_running=4, blocks={"full": 99})
    big = Result()
    engine.submit(make_request("big", [8] * long, GREEDY, 1), big.feed)
    for number in range(100):
        for part in range(2):  # more than a step can hold, so that the long one never has its turn by itself
            prompt = [9 + number % 40] * short
            engine.submit(make_request(f"s{number}.{part}", prompt, GREEDY, 1), lambda events: None)
        engine.step()
        engine.check()
        if big.finished:
            break
    assert big.finished, "it starves"
    overtook = sum(int(step.tokens.size) for step in executor.steps) - long
    assert overtook <= (PATIENCE + 2) * budget, "its last step and the one that passed the bound have others, too"
    drive(engine)


def test_memory_that_others_hold_makes_a_long_prompt_wait_but_not_for_ever() -> None:
    engine = make_engine(FakeExecutor(programs(context=256)), step_tokens=32, max_running=4, blocks={"full": 17})
    big = Result()
    engine.submit(make_request("big", [8] * 200, GREEDY, 4), big.feed)
    for number in range(300):
        engine.submit(make_request(f"s{number}", [9 + number % 40] * 20, GREEDY, 20), lambda events: None)
        engine.step()
        if big.finished:
            break
    assert big.finished
    drive(engine)


def test_what_comes_out_does_not_depend_on_the_order() -> None:
    requests = [make_request(f"r{i}", [9 + i] * (1 + 37 * i % 90), GREEDY, 9) for i in range(8)]
    crowd = run_all(make_engine(FakeExecutor(programs()), step_tokens=33), requests)
    for request, result in zip(requests, crowd, strict=True):
        (alone,) = run_all(make_engine(FakeExecutor(programs())), [request])
        assert result.tokens == alone.tokens
