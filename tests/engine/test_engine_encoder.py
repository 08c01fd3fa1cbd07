"""Encoder-decoders over the fake executor: inputs encoded once by content, lent, given back, and never mixed up."""

from array import array
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from inhouse.core.errors import CapacityError, ContextLengthError, ExecutorError, UsageError
from inhouse.engine.encoders import Encoders
from inhouse.engine.engine import Engine
from inhouse.engine.request import EngineConfig, FinishReason, Request, SamplingParams, make_request
from inhouse.runtime.program import StateGroup, StateKind
from inhouse.runtime.sampling import ReferenceSampler
from tests.engine.driving import EOS, Result, drive, make_engine, run_all
from tests.engine.fakes import VOCAB, FakeExecutor, encoder_programs, logits_after, programs

pytestmark = pytest.mark.null
GREEDY = SamplingParams(temperature=0)


def request(name: str, encoder: list[int], count: int = 12, **more: Any) -> Request:
    return make_request(name, [1], more.pop("params", GREEDY), count, encoder=encoder, **more)


def alone(encoder: list[int], count: int = 12) -> list[int]:
    """Greedy by the fake's own function, no engine at all."""
    tokens = [1]
    while len(tokens) < 1 + count:
        token = int(np.argmax(logits_after(tokens, encoder)))
        if token == EOS:
            break
        tokens.append(token)
    return tokens[1:]


def text(seed: int, length: int) -> list[int]:
    return [8 + (seed * 31 + i * 7) % 40 for i in range(length)]


def encodes(executor: FakeExecutor) -> list[int]:
    """Inputs in each step of `encode` that ran."""
    return [step.lengths.size for step in executor.steps if "encoder" in step.tables]


def test_each_answer_depends_on_its_own_input() -> None:
    executor = FakeExecutor(encoder_programs())
    engine = make_engine(executor, step_tokens=40, max_running=4)
    inputs = [text(i, 5 + 9 * i) for i in range(8)]
    results = run_all(engine, [request(str(i), ids) for i, ids in enumerate(inputs)])
    for ids, result in zip(inputs, results, strict=True):
        assert result.tokens.get(0, []) == alone(ids)
        assert result.finished[0].usage.prompt_tokens == len(ids)
    assert sum(encodes(executor)) == 8
    assert engine.stats().kv_usage == 0


def test_an_input_is_encoded_once_and_kept_by_content_and_salt() -> None:
    executor = FakeExecutor(encoder_programs())
    engine = make_engine(executor, max_running=8)
    same = [request(str(i), text(1, 30)) for i in range(5)]
    run_all(engine, [*same, request("salted", text(1, 30), salt="other")])
    assert encodes(executor) == [2]
    (later,) = run_all(engine, [request("later", text(1, 30))])
    assert encodes(executor) == [2]
    assert later.finished[0].usage.cached_tokens == 30
    assert later.tokens[0] == alone(text(1, 30))


def test_choices_share_their_input() -> None:
    executor = FakeExecutor(encoder_programs())
    engine = make_engine(executor, max_running=4)
    (result,) = run_all(engine, [request("n", text(2, 20), params=SamplingParams(n=4, seed=3))])
    assert sorted(result.finished) == [0, 1, 2, 3]
    assert encodes(executor) == [1]


def test_a_long_input_runs_alone_and_steps_take_turns() -> None:
    executor = FakeExecutor(encoder_programs())
    engine = make_engine(executor, step_tokens=16, max_running=8)
    results = [Result() for _ in range(5)]
    engine.submit(request("first", text(0, 10), 40), results[0].feed)
    for _ in range(4):
        engine.step()
    for i in range(1, 5):
        engine.submit(request(str(i), text(i, 100), 4), results[i].feed)
    drive(engine)
    kinds = ["encoder" in step.tables for step in executor.steps]
    assert encodes(executor) == [1] * 5
    assert not any(a and b for a, b in pairwise(kinds)), "the sequence that decodes waits for one input at most"
    assert [r.tokens[0] for r in results] == [alone(text(0, 10), 40), *(alone(text(i, 100), 4) for i in range(1, 5))]


def test_idle_inputs_are_forgotten_when_their_blocks_are_needed_and_preempted_ones_come_back() -> None:
    executor = FakeExecutor(encoder_programs())
    engine = make_engine(executor, max_running=4, blocks={"full": 4, "cross": 6, "encoder": 8})
    inputs = [text(i, 20 + i) for i in range(6)]
    results = run_all(engine, [request(str(i), ids, 40) for i, ids in enumerate(inputs)])
    assert [r.tokens[0] for r in results] == [alone(ids, 40) for ids in inputs]
    assert engine.stats().preemptions > 0


def test_what_is_refused() -> None:
    engine = make_engine(FakeExecutor(encoder_programs(context=64)), blocks={"full": 9, "cross": 2, "encoder": 9})
    with pytest.raises(UsageError, match="needs the encoder's input"):
        engine.submit(make_request("a", [1], GREEDY, 4), Result().feed)
    with pytest.raises(UsageError, match="token 61"):
        engine.submit(request("b", [VOCAB]), Result().feed)
    with pytest.raises(ContextLengthError, match="33 tokens, the encoder takes 32"):
        engine.submit(request("c", [9] * 33), Result().feed)
    with pytest.raises(UsageError, match="no tokens"):
        request("d", [])
    with pytest.raises(UsageError, match="no encoder"):
        make_engine(FakeExecutor(programs())).submit(request("e", [9]), Result().feed)


def test_a_failed_encode_ends_those_who_wait_for_it_and_no_other() -> None:
    executor = FakeExecutor(encoder_programs(), fail_encode=60)
    engine = make_engine(executor, max_running=4)
    good, bad = Result(), Result()
    engine.submit(request("good", text(1, 10), 20), good.feed)
    for _ in range(3):
        engine.step()
    engine.submit(request("bad", [60, 9]), bad.feed)
    drive(engine)
    assert isinstance(bad.failed[0].error, ExecutorError)
    assert good.tokens[0] == alone(text(1, 10), 20)
    assert engine.stats().kv_usage == 0


def test_a_cancel_between_encode_and_admission_gives_the_input_back() -> None:
    engine = make_engine(FakeExecutor(encoder_programs()), max_running=4)
    result = Result()
    engine.submit(request("a", text(1, 40)), result.feed)
    engine.step()
    engine.check()
    engine.cancel("a")
    drive(engine)
    assert result.finished[0].reason is FinishReason.CANCELLED
    assert engine.stats().kv_usage == 0


def test_without_content_nothing_is_shared() -> None:
    group = StateGroup("cross", StateKind.CROSS, (0,), 1, 4, 4)
    encoders = Encoders((group,), (), {"cross": 3})
    first = encoders.make(b"digest", array("i", [1, 2]))
    assert first is not None
    assert encoders.find(b"digest", array("i", [1, 3])) is None
    assert encoders.find(b"other", array("i", [1, 2])) is None
    encoders.hold(first)
    assert encoders.make(b"digest", array("i", range(40))) is None, "three blocks are too few beside one in use"
    first.ready = True
    encoders.drop(first)
    assert encoders.find(b"digest", array("i", [1, 2])) is first
    second = encoders.make(b"digest", array("i", range(40)))
    assert second is not None
    assert encoders.find(b"digest", array("i", [1, 2])) is None, "the idle one went"
    encoders.hold(second)
    encoders.check([second])


class EncoderMachine(RuleBasedStateMachine):
    """Requests with inputs of few kinds come, are cancelled and served in any order, in few blocks."""

    @initialize(
        blocks=st.integers(8, 16), cross=st.integers(3, 8), running=st.integers(1, 4), budget=st.integers(1, 60)
    )
    def open(self, blocks: int, cross: int, running: int, budget: int) -> None:
        config = EngineConfig(
            blocks={"full": blocks, "cross": cross, "encoder": 5}, max_running=running, step_tokens=budget
        )
        executor = FakeExecutor(encoder_programs(context=80), fail_encode=59)
        self.engine = Engine(executor, config, {EOS}, sampler=ReferenceSampler(), start=False)
        self.results: dict[str, tuple[Request, Result]] = {}

    @rule(
        kind=st.integers(0, 4), length=st.integers(1, 48), tokens=st.integers(1, 30), n=st.integers(1, 2),
        priority=st.integers(-1, 1), fails=st.booleans(),
    )  # fmt: skip
    def submit(self, kind: int, length: int, tokens: int, n: int, priority: int, fails: bool) -> None:
        name, result = str(len(self.results)), Result()
        ids = text(kind, length) + ([59] if fails and kind == 4 else [])
        params = SamplingParams(temperature=0, n=n)
        made = make_request(name, [1], params, tokens, priority=priority, encoder=ids)
        try:
            self.engine.submit(made, result.feed)
        except (ContextLengthError, CapacityError):
            return
        except UsageError:
            if n <= self.engine.config.max_running:
                raise
            return
        self.results[name] = made, result

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()
            self.engine.check()
            self.engine._failures = 0

    @precondition(lambda self: self.results)
    @rule(data=st.data(), choice=st.sampled_from((None, 0, 1)))
    def cancel(self, data: st.DataObject, choice: int | None) -> None:
        self.engine.cancel(data.draw(st.sampled_from(sorted(self.results))), choice)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(20_000):
            self.engine._failures = 0
            if not self.engine.step():
                break
        self.engine.check()
        assert self.engine.stats().kv_usage == 0
        broken = any(59 in (made.encoder or ()) for made, _ in self.results.values())  # a step fails as a whole
        for made, result in self.results.values():
            assert result.lasts == 1
            ids = list(made.encoder or ())
            assert broken or not result.failed
            for choice, end in result.finished.items():
                if end.reason is not FinishReason.CANCELLED:
                    assert result.tokens.get(choice, []) == alone(ids, made.max_tokens or 0)


TestEncoders = EncoderMachine.TestCase
TestEncoders.settings = settings(
    max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_forced_tokens_and_repeated_runs() -> None:
    engine = make_engine(FakeExecutor(encoder_programs()))
    params = SamplingParams(temperature=0, first_token=33, last_token=44, ignore_eos=True, bad_words=((8,), (9, 10)))
    (forced,) = run_all(engine, [request("f", text(1, 9), 6, params=params)])
    assert forced.tokens[0][0] == 33
    assert forced.tokens[0][-1] == 44
    biased = SamplingParams(temperature=0, ignore_eos=True, logit_bias={20: 100.0}, no_repeat_ngram=2)
    (plain,) = run_all(engine, [request("r", text(1, 9), 8, params=biased)])
    pairs = list(pairwise([1, *plain.tokens[0]]))
    assert len(set(pairs)) == len(pairs), "no pair of tokens comes twice, however likely"
    assert plain.tokens[0][:2] == [20, 20]
    assert 20 not in plain.tokens[0][2:3]
