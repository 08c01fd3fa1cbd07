"""Requests for vectors in the engine: every input gets the bits that it gets alone, whatever runs beside it."""

import threading
from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from inhouse.core.errors import (
    CancelledError,
    CapacityError,
    ConflictError,
    ContextLengthError,
    ExecutorError,
    UnavailableError,
    UnsupportedError,
    UsageError,
)
from inhouse.engine.engine import Engine
from inhouse.engine.request import (
    Embedded,
    EmbedEvent,
    EmbedRequest,
    EngineConfig,
    Failed,
    SamplingParams,
    TokenEvent,
    make_request,
)
from inhouse.model.build import Spec, build
from inhouse.model.encoder import ClassifierSpec, EncoderSpec
from inhouse.model.pooling import Dense, Pooling
from inhouse.model.spec import ModelSpec, RopeSpec
from inhouse.runtime.executor import F32, Weight
from inhouse.runtime.native import NativeExecutor
from inhouse.runtime.packed import pack_float

pytestmark = pytest.mark.native

VOCAB = 71
ENCODER = EncoderSpec("bert", 32, 2, 2, 48, VOCAB, 60, 1e-6, position_rows=60, types=2)
DECODER = ModelSpec("llama", 32, 2, 4, 2, 8, 48, VOCAB, 128, RopeSpec(8), 1e-6, tied=True)


def executor_of(spec: Spec) -> NativeExecutor:
    """An executor over random weights."""
    programs = build(spec)
    draw = np.random.default_rng(5)
    weights: dict[str, Weight] = {}
    for name, weight in programs.weights.items():
        values = draw.standard_normal(weight.shape).astype(np.float32) * 0.3
        weights[name] = values + 1 if weight.kind == "vector" else pack_float(values, "f32")
    return NativeExecutor(programs, weights, threads=1, kv_dtype="f32")


class Box:
    """Keeps what a request gave."""

    def __init__(self) -> None:
        self.values: dict[int, F32] = {}
        self.failed: list[Failed] = []
        self.ended = threading.Event()

    def __call__(self, events: list[EmbedEvent]) -> None:
        assert not self.ended.is_set(), "an event after the last"
        for event in events:
            if isinstance(event, Embedded):
                assert event.index not in self.values
                self.values[event.index] = event.values
            else:
                self.failed.append(event)
            if event.last:
                self.ended.set()


def ids(seed: int, count: int) -> "array[int]":
    drawn: npt.NDArray[np.int64] = np.random.default_rng(seed).integers(0, VOCAB, count)
    return array("i", drawn.tolist())


def request(name: str, *inputs: "array[int]", role: str = "pooled", priority: int = 0) -> EmbedRequest:
    return EmbedRequest(name, inputs, role=role, priority=priority)


@pytest.fixture
def encoder() -> Iterator[Engine]:
    engine = Engine(executor_of(ENCODER), EngineConfig(step_tokens=64, max_running=5, max_queue=3), start=False)
    yield engine
    engine.close()


def work(engine: Engine, most: int = 200) -> int:
    """Steps until nothing runs; how many steps that took."""
    for count in range(most):
        if not engine.step():
            engine.check()
            return count
        engine.check()
    raise AssertionError("the engine does not come to rest")


def alone(spec: Spec, tokens: "array[int]", role: str = "pooled") -> F32:
    engine = Engine(executor_of(spec), EngineConfig(step_tokens=64), start=False)
    box = Box()
    engine.embed(request("alone", tokens, role=role), box)
    work(engine)
    engine.close()
    return box.values[0]


def test_batches_are_as_alone_and_share_steps(encoder: Engine) -> None:
    many = [ids(i, 1 + i * 7 % 50) for i in range(9)]
    boxes = [Box(), Box()]
    encoder.embed(request("a", *many[:6]), boxes[0])
    encoder.embed(request("b", *many[6:], role="hidden"), boxes[1])
    assert encoder.stats().embed_waiting == 2
    steps = work(encoder)
    assert steps < 9, "inputs do not share steps"
    for i, tokens in enumerate(many):
        box, role = (boxes[0], "pooled") if i < 6 else (boxes[1], "hidden")
        got = box.values[i if i < 6 else i - 6]
        assert got.tobytes() == alone(ENCODER, tokens, role).tobytes()
        assert got.shape == ((32,) if i < 6 else (len(tokens), 32))
        if i < 6:
            assert np.linalg.norm(got) == pytest.approx(1, abs=1e-6)
    stats = encoder.stats()
    assert (stats.embed_waiting, stats.embed_inputs, stats.embed_tokens) == (0, 9, sum(map(len, many)))


def test_token_types_reach_the_model(encoder: Engine) -> None:
    tokens, boxes = ids(1, 8), [Box(), Box()]
    encoder.embed(EmbedRequest("a", (tokens,), (array("i", [0] * 8),)), boxes[0])
    encoder.embed(EmbedRequest("b", (tokens,), (array("i", [0] * 4 + [1] * 4),)), boxes[1])
    work(encoder)
    assert boxes[0].values[0].tobytes() == alone(ENCODER, tokens).tobytes()
    assert not np.allclose(boxes[0].values[0], boxes[1].values[0], atol=1e-3)


def test_priority_decides_who_goes_first(encoder: Engine) -> None:
    order: list[str] = []

    encoder.embed(request("late", ids(1, 50)), lambda events: order.append("late"))
    encoder.embed(request("first", ids(2, 50), priority=-1), lambda events: order.append("first"))
    work(encoder)
    assert order == ["first", "late"]


def test_what_cannot_run_is_refused_at_the_door(encoder: Engine) -> None:
    with pytest.raises(ContextLengthError, match="61 tokens, this model takes 60"):
        encoder.embed(request("a", ids(1, 61)), Box())
    with pytest.raises(UnsupportedError, match="gives no 'scores'; it gives hidden, pooled"):
        encoder.embed(request("a", ids(1, 3), role="scores"), Box())
    with pytest.raises(UsageError, match="the token 71, allowed are 0..70"):
        encoder.embed(request("a", array("i", [1, 71])), Box())
    with pytest.raises(UsageError, match="token type 2"):
        encoder.embed(EmbedRequest("a", (ids(1, 2),), (array("i", [0, 2]),)), Box())
    with pytest.raises(UsageError, match="no tokens"):
        request("a", array("i"))
    with pytest.raises(UnsupportedError, match="no program 'step'"):
        encoder.submit(make_request("b", [1, 2]), lambda events: None)
    for name in "abc":
        encoder.embed(request(name, ids(1, 3)), Box())
    with pytest.raises(ConflictError):
        encoder.embed(request("a", ids(1, 3)), Box())
    with pytest.raises(CapacityError, match="3 embed requests wait"):
        encoder.embed(request("d", ids(1, 3)), Box())
    work(encoder)


def test_cancel_ends_a_request_once(encoder: Engine) -> None:
    box, other = Box(), Box()
    encoder.embed(request("a", *(ids(i, 40) for i in range(8))), box)
    encoder.embed(request("b", ids(9, 9)), other)
    encoder.step()
    encoder.cancel("a")
    work(encoder)
    assert len(box.values) == 1
    assert [type(failed.error) for failed in box.failed] == [CancelledError]
    assert set(other.values) == {0}


def test_a_failed_step_ends_its_requests_and_three_shut_the_door(
    encoder: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = encoder.executor.run

    def broken(*args: object) -> None:
        raise ExecutorError("told to fail")

    boxes = [Box() for _ in range(4)]
    monkeypatch.setattr(encoder.executor, "run", broken)
    encoder.embed(request("a", ids(1, 3)), boxes[0])
    work(encoder)
    monkeypatch.setattr(encoder.executor, "run", run)
    encoder.embed(request("b", ids(1, 3)), boxes[1])
    work(encoder)
    assert boxes[0].failed
    assert set(boxes[1].values) == {0}
    monkeypatch.setattr(encoder.executor, "run", broken)
    for name in "cde":
        encoder.embed(request(name, ids(1, 3)), boxes[2])
        encoder.step()
        boxes[2] = Box()
    assert isinstance(encoder.error, UnavailableError)
    with pytest.raises(UnavailableError):
        encoder.embed(request("f", ids(1, 3)), Box())


def test_a_sink_that_raises_loses_its_request_only(encoder: Engine) -> None:
    def bad(events: list[EmbedEvent]) -> None:
        raise RuntimeError("gone")

    good = Box()
    encoder.embed(request("bad", ids(1, 50), ids(2, 50)), bad)
    encoder.embed(request("good", ids(3, 5)), good)
    work(encoder)
    assert set(good.values) == {0}
    assert encoder.stats().embed_waiting == 0


def test_vectors_and_text_together_are_as_alone() -> None:
    prompts = [ids(i, 5 + i * 9) for i in range(5)]
    greedy = SamplingParams(temperature=0)

    def texts(busy: bool, blocks: int) -> dict[str, list[int]]:
        engine = Engine(
            executor_of(DECODER), EngineConfig(step_tokens=32, max_running=4, blocks={"full": blocks}), start=False
        )
        found: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            name = f"text {i}"
            found[name] = []

            def sink(events: list[object], name: str = name) -> None:
                for event in events:
                    assert not isinstance(event, Failed)
                    if isinstance(event, TokenEvent):
                        found[name] += event.tokens

            engine.submit(make_request(name, prompt, greedy, 20), sink)  # type: ignore[arg-type]
        boxes = [Box() for _ in range(8)] if busy else []
        for i, box in enumerate(boxes):
            engine.embed(request(f"vector {i}", ids(50 + i, 60), ids(70 + i, 3)), box)
        work(engine)
        for i, box in enumerate(boxes):
            assert box.values[0].tobytes() == wanted[i]
        engine.close()
        return found

    wanted = [alone(DECODER, ids(50 + i, 60)).tobytes() for i in range(8)]
    quiet = texts(False, 64)
    assert texts(True, 64) == quiet
    assert texts(True, 9) == quiet, "few blocks: vectors wait for them, and text goes on"


def test_pooling_dense_and_classifier_on_the_engine() -> None:
    pooling = Pooling("mean", True, (Dense(32, 12, True, "tanh"),))
    dense = EncoderSpec("bert", 32, 1, 2, 48, VOCAB, 60, 1e-6, position_rows=60, pooling=pooling)
    vector = alone(dense, ids(3, 9))
    assert vector.shape == (12,)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    labels = ClassifierSpec(("a", "b", "c"), dense=True, activation="tanh")
    texts = EncoderSpec("bert", 32, 1, 2, 48, VOCAB, 60, 1e-6, position_rows=60, classifier=labels)
    assert alone(texts, ids(3, 9), "scores").shape == (3,)


def test_the_thread_wakes_drains_and_closes() -> None:
    engine = Engine(executor_of(ENCODER), EngineConfig(step_tokens=64))
    box = Box()
    engine.embed(request("a", ids(1, 20), ids(2, 20)), box)
    assert box.ended.wait(20)
    late = Box()
    engine.embed(request("b", ids(1, 20)), late)
    assert engine.drain(20)
    assert set(late.values) == {0}
    with pytest.raises(UnavailableError):
        engine.embed(request("c", ids(1, 2)), Box())
    engine.close()
