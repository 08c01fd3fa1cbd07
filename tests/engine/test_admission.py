"""What the engine refuses at its door, and how it says so: field, number, limit."""

from array import array
from dataclasses import replace
from typing import Any

import pytest

from inhouse.core.errors import CapacityError, ConflictError, ContextLengthError, UnsupportedError, UsageError
from inhouse.engine.request import FinishReason, Request, SamplingParams, make_request
from inhouse.runtime.program import StateGroup, StateKind
from tests.engine.driving import drive, make_engine, run_all
from tests.engine.fakes import FakeExecutor, programs

pytestmark = pytest.mark.null
GREEDY = SamplingParams(temperature=0)


def test_the_context_rule() -> None:
    engine = make_engine(FakeExecutor(programs(context=64)))
    with pytest.raises(ContextLengthError, match="64 tokens, the context holds 64"):
        engine.submit(make_request("a", [9] * 64), print)
    with pytest.raises(ContextLengthError, match="max_tokens is 15: 65 in all, the context holds 64") as caught:
        engine.submit(make_request("a", [9] * 50, GREEDY, 15), print)
    assert caught.value.to_dict()["context_length"] == 64
    full = run_all(engine, [make_request("a", [9] * 50, replace(GREEDY, ignore_eos=True), 14)])[0]
    rest = run_all(engine, [make_request("b", [9] * 50, replace(GREEDY, ignore_eos=True))])[0]
    assert full.tokens == rest.tokens
    assert rest.finished[0].reason is FinishReason.LENGTH
    assert run_all(engine, [make_request("c", [9] * 64, GREEDY, 0)])[0].finished[0].usage.completion_tokens == 0


def test_admission_refuses_with_numbers() -> None:
    engine = make_engine(FakeExecutor(programs()), blocks={"full": 4}, max_queue=2, max_running=2)
    with pytest.raises(UsageError, match="token 61, the vocabulary is 0..60"):
        engine.submit(make_request("a", [61], GREEDY, 5), print)
    with pytest.raises(UsageError, match="logit_bias holds token 99"):
        engine.submit(make_request("a", [9], SamplingParams(logit_bias={99: 1.0}), 5), print)
    for name in "abcd":  # two start at once, two wait
        engine.submit(make_request(name, [9], GREEDY, 5), lambda events: None)
    with pytest.raises(CapacityError, match="2 sequences wait, the queue holds 2"):
        engine.submit(make_request("e", [9], GREEDY, 5), print)
    engine.step()
    with pytest.raises(CapacityError, match="2 sequences wait, the queue holds 2"):
        engine.submit(make_request("e", [9], GREEDY, 5), print)
    with pytest.raises(ConflictError, match="'a' is living"):
        engine.submit(make_request("a", [9], GREEDY, 5), print)
    drive(engine)
    room = run_all(engine, [make_request("d", [9] * 50, replace(GREEDY, ignore_eos=True))])[0]
    assert len(room.tokens[0]) == 15, "without max_tokens the room is what blocks hold"


def test_what_can_never_run_is_no_matter_of_trying_again() -> None:
    """429 would be tried again by clients; these are 400, with the limit and the setting that moves it."""
    engine = make_engine(FakeExecutor(programs()), blocks={"full": 4}, max_running=2)
    with pytest.raises(UsageError, match=r"n is 3, the engine runs 2 .*\(max_sequences\).*--max-sequences") as caught:
        engine.submit(make_request("a", [9] * 5, SamplingParams(n=3), 5), print)
    assert (caught.value.http_status, caught.value.param) == (400, "n")
    with pytest.raises(ContextLengthError, match="100 tokens, there are blocks for 64.*--kv-memory") as caught:
        engine.submit(make_request("a", [9] * 50, GREEDY, 50), print)
    assert (caught.value.http_status, caught.value.param) == (400, "max_tokens")
    assert caught.value.to_dict()["capacity"] == 64
    with pytest.raises(ContextLengthError, match="65 tokens, there are blocks for 64"):
        engine.submit(make_request("a", [9] * 65, GREEDY), print)


def test_free_slots_are_no_queue() -> None:
    """What can start at once does not wait: on an idle engine, a call of more prompts than the queue holds runs."""
    engine = make_engine(FakeExecutor(programs()), max_queue=2, max_running=6)
    results = run_all(engine, [make_request(name, [9], GREEDY, 5) for name in "abcd"])
    assert all(result.finished for result in results)
    pair = SamplingParams(temperature=0, n=2)
    for name in "abc":  # six slots
        engine.submit(make_request(name, [9], pair, 5), lambda events: None)
    for name in "de":
        engine.submit(make_request(name, [9], GREEDY, 5), lambda events: None)
    with pytest.raises(CapacityError, match="2 sequences wait"):
        engine.submit(make_request("f", [9], GREEDY, 5), print)
    drive(engine)
    engine.submit(make_request("f", [9], GREEDY, 5), lambda events: None)
    drive(engine)


def test_min_tokens_that_cannot_be_honoured_are_refused() -> None:
    with pytest.raises(UsageError, match="min_tokens is 6, more than max_tokens, which is 5") as caught:
        make_request("a", [9], SamplingParams(min_tokens=6), 5)
    assert caught.value.param == "min_tokens"
    make_request("a", [9], SamplingParams(min_tokens=5), 5)
    engine = make_engine(FakeExecutor(programs(context=64)))
    with pytest.raises(UsageError, match="min_tokens is 61, .* prompt of 4 tokens there is room for 60") as caught:
        engine.submit(make_request("a", [9] * 4, SamplingParams(min_tokens=61)), print)
    assert caught.value.param == "min_tokens"
    most = run_all(engine, [make_request("b", [9] * 4, SamplingParams(seed=1, min_tokens=60))])[0]
    assert len(most.tokens[0]) == 60


def test_a_huge_top_k_filters_nothing_and_harms_nothing() -> None:
    """It once overflowed the row's int32 in the step, and three such steps shut the engine's door."""
    engine = make_engine(FakeExecutor(programs()))
    seeded = SamplingParams(seed=3, ignore_eos=True)
    free, huge = run_all(
        engine, [make_request(str(k), [9], replace(seeded, top_k=k), 8) for k in (0, 10**400)]
    )  # fmt: skip
    assert huge.tokens == free.tokens


def test_state_that_cannot_be_scheduled_is_refused() -> None:
    group = StateGroup("cross", StateKind.CROSS, (0,), 1, 4, 4)
    with pytest.raises(UnsupportedError, match="cross"):
        make_engine(FakeExecutor(programs(group)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("min_p", 2),
        ("typical_p", 0), ("repetition_penalty", 0), ("presence_penalty", 3), ("frequency_penalty", -3), ("n", 0),
        ("n", 1000), ("logprobs", -1), ("min_tokens", -1), ("seed", 2**64), ("logit_bias", {3: 101}),
        ("allowed_token_ids", ()), ("bad_words", ((),)), ("n", 1.5), ("top_k", "3"), ("seed", 2.0),
    ],
)  # fmt: skip
def test_params_out_of_range_name_field_and_range(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=field):
        SamplingParams(**{field: value})


def test_messages_read_well() -> None:
    for field, value, message in (
        ("temperature", float("inf"), "temperature is inf, it must be a finite number"),
        ("top_p", float("nan"), "top_p is nan, it must be a finite number"),
        ("min_p", "much", "min_p is 'much', it must be a finite number"),
        ("top_p", 0, r"top_p is 0, it must be within \(0, 1\]"),
        ("min_tokens", -1, "min_tokens is -1, it must be at least 0"),
        (
            "seed",
            2**64,
            r"seed is 18446744073709551616, it must be within \[-9223372036854775808, 18446744073709551615",
        ),
        ("temperature", 10**400, r"it must be within \[0, 1000000.0\]"),
    ):
        with pytest.raises(UsageError, match=message):
            SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert SamplingParams(seed=-(2**63)).seed == -(2**63)
    assert SamplingParams(seed=2**64 - 1).seed == 2**64 - 1


def test_requests_out_of_range() -> None:
    with pytest.raises(UsageError, match="no tokens"):
        Request("a", array("i"))
    with pytest.raises(UsageError, match="max_tokens"):
        make_request("a", [1], max_tokens=-1)
    with pytest.raises(UsageError, match="no token id"):
        make_request("a", [2**40])
    with pytest.raises(UsageError, match="n is 2 with max_tokens 0"):
        make_request("a", [1], SamplingParams(n=2), 0)
