"""The engine over real executors and trained weights: golden text, and bits that nothing but a token's own context
may change (docs/architecture.md, section 7)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from inhouse.core.errors import ContextLengthError
from inhouse.engine.engine import Engine
from inhouse.engine.request import EngineConfig, Request, SamplingParams, make_request
from inhouse.load.model import LoadedModel, open_model
from inhouse.plan import memory
from inhouse.runtime.native import NativeExecutor
from inhouse.runtime.sampling_native import NativeSampler
from tests.engine.driving import Result, run_all

F32 = npt.NDArray[np.float32]
Bits = dict[tuple[int, int], bytes]  # (seed, position) -> logits that the token at position was drawn from

pytestmark = [pytest.mark.native, pytest.mark.realdata]


class Recorder(NativeSampler):
    """Keeps the bits of every row of logits, under the seed of its request and the position drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.bits: Bits = {}

    def sample(
        self, logits: F32, rows: npt.NDArray[np.void], *arrays: Any
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        for row in rows:
            self.bits[int(row["seed"]), int(row["position"])] = logits[row["logit_row"]].tobytes()
        return super().sample(logits, rows, *arrays)


def path_of(stories: Path, file: str) -> str:
    return str(stories / "hf" if file == "hf" else stories / f"stories260K-{file}.gguf")


def run(
    model: LoadedModel, requests: list[Request], sampler: NativeSampler | None = None, **limits: Any
) -> tuple[list[Result], Engine]:
    limits = {"blocks": {"full": 160}} | limits
    count = limits["blocks"]["full"]
    limits["blocks"] = {group.name: count for group in model.executor.programs.groups}
    config = EngineConfig(**limits)
    engine = Engine(model.executor, config, model.tokenizer.eos_ids, model.digest, sampler=sampler, start=False)
    results = run_all(engine, requests)
    assert not any(result.failed for result in results), [result.failed for result in results if result.failed]
    return results, engine


@pytest.fixture(params=["native", pytest.param("torch", marks=pytest.mark.torch)])
def executor(request: pytest.FixtureRequest) -> str:
    if request.param == "torch":
        import torch

        torch.set_num_threads(1)  # two that share a busy machine spin against each other: 80 times slower
    return str(request.param)


@pytest.mark.parametrize("file", ["hf", "Q8_0"])
def test_no_step_allocates_and_the_plan_covers_them(stories: Path, file: str) -> None:
    """Whatever T, S and N a step has, its room was made at the start, and the memory formula had planned for it."""
    model = open_model(path_of(stories, file), executor="native", threads=2, cache=False)
    executor = model.executor
    assert isinstance(executor, NativeExecutor)
    config = EngineConfig(blocks={"full": 160}, max_running=8, step_tokens=64, logit_rows=16)
    engine = Engine(executor, config, model.tokenizer.eos_ids, model.digest, start=False)
    room = executor.nbytes
    planned = memory.activation_bytes(executor.programs, 64, 16) + memory.workspace_bytes(64, 2)
    assert 0 < room - engine.state_bytes <= planned
    params = SamplingParams(seed=1, ignore_eos=True, n=2)
    run_all(engine, [make_request(str(i), range(5, 6 + 20 * i), params, 4) for i in range(7)])
    run_all(engine, [make_request("scored", range(5, 105), SamplingParams(), 0, prompt_logprobs=1)])
    assert executor.nbytes == room
    engine.close()
    model.close()


@pytest.mark.parametrize("file", ["hf", "F32"])
def test_greedy_text_is_the_golden_one_in_one_batch(stories: Path, executor: str, file: str) -> None:
    golden = json.loads((stories / "golden.json").read_text())["greedy"]
    model = open_model(path_of(stories, file), executor=executor, threads=1, cache=False)
    greedy = SamplingParams(temperature=0, ignore_eos=True)
    requests = [
        make_request(str(i), entry["prompt_ids"], greedy, len(entry["output_ids"])) for i, entry in enumerate(golden)
    ]
    results, _ = run(model, requests, step_tokens=9)
    for entry, result in zip(golden, results, strict=True):
        assert result.tokens[0] == entry["output_ids"]
    model.close()


def requests_for_bits() -> list[Request]:
    """Prompts of 1 to 300 tokens, some with a common beginning, greedy and drawn."""
    rng = np.random.default_rng(0)
    stem = [1, *rng.integers(3, 512, 320).tolist()]
    lengths = [1, 5, 15, 16, 17, 40, 100, 255, 257, 300]
    requests = []
    for i, length in enumerate(lengths):
        prompt = stem[:length] if i % 2 else [1, *rng.integers(3, 512, length - 1).tolist()]
        params = SamplingParams(temperature=0.0 if i % 3 else 0.8, top_p=0.9, seed=i, ignore_eos=True)
        requests.append(make_request(str(i), prompt, params, 20))
    return requests


SOURCES = (("hf", "f32"), ("Q8_0", "f16"), ("Q4_0", "bf16"), ("hf", "int4"))


@pytest.fixture(scope="module", params=SOURCES, ids="-".join)
def source(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def model(source: tuple[str, str], stories: Path) -> Iterator[LoadedModel]:
    loaded = open_model(path_of(stories, source[0]), kv_dtype=source[1], threads=2, cache=False)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def alone(model: LoadedModel) -> tuple[Bits, list[dict[int, list[int]]]]:
    """Each request in an engine of its own: no strangers, one chunk, nothing cached."""
    recorder, tokens = Recorder(), []
    for request in requests_for_bits():
        tokens.append(run(model, [request], recorder, prefix_cache=False)[0][0].tokens)
    assert len(recorder.bits) == 200
    return recorder.bits, tokens


@pytest.mark.parametrize(
    "limits",
    [
        {"prefix_cache": False},
        {"prefix_cache": False, "step_tokens": 7},
        {"prefix_cache": False, "step_tokens": 33, "max_running": 3},
        {"step_tokens": 64},
        {"blocks": {"full": 21}, "step_tokens": 48},
    ],
    ids=["batched", "chunks of 7", "chunks of 33", "prefix cache", "preempted"],
)
def test_bits_depend_on_a_tokens_own_context_alone(
    model: LoadedModel, alone: tuple[Bits, list[dict[int, list[int]]]], limits: dict[str, Any]
) -> None:
    recorder = Recorder()
    results, engine = run(model, requests_for_bits(), recorder, **limits)
    assert [result.tokens for result in results] == alone[1]
    assert recorder.bits == alone[0]
    if "blocks" in limits:
        assert engine.stats().preemptions > 0
    if limits == {"step_tokens": 64}:
        assert engine.stats().prefix_hits > 0


@pytest.mark.parametrize("threads", [1, 3])
def test_bits_do_not_depend_on_threads(
    source: tuple[str, str], stories: Path, alone: tuple[Bits, list[dict[int, list[int]]]], threads: int
) -> None:
    model = open_model(path_of(stories, source[0]), kv_dtype=source[1], threads=threads, cache=False)
    recorder = Recorder()
    run(model, requests_for_bits(), recorder)
    assert recorder.bits == alone[0]
    model.close()


def test_choices_equal_requests_of_their_own(stories: Path, executor: str) -> None:
    """A fork shares blocks and copies on write; its choices are those of a request that asks for n alike."""
    model = open_model(path_of(stories, "hf"), executor=executor, threads=1, cache=False)
    params = SamplingParams(seed=9, n=4, ignore_eos=True)
    request = make_request("n", [1, *range(40, 70)], params, 20)
    (first,), _ = run(model, [request])
    (second, *_), _ = run(model, [request, *requests_for_bits()[:4]], step_tokens=11, prefix_cache=False)
    assert first.tokens == second.tokens
    assert len({tuple(t) for t in first.tokens.values()}) == 4
    single = make_request("1", request.prompt, SamplingParams(seed=9, ignore_eos=True), 20)
    assert run(model, [single])[0][0].tokens[0] == first.tokens[0], "choice 0 is what n = 1 draws"
    model.close()


def test_score_equals_the_logprobs_of_generation(stories: Path) -> None:
    model = open_model(path_of(stories, "hf"), cache=False)
    request = make_request("g", [1, 70, 80], SamplingParams(temperature=0, logprobs=0, ignore_eos=True), 30)
    (result,), _ = run(model, [request])
    engine = Engine(model.executor, EngineConfig(blocks={"full": 64}), digest=model.digest)
    scored = engine.score([1, 70, 80, *result.tokens[0]])
    assert [s.logprob for s in scored[2:]] == [s.logprob for s in result.logprobs[0]]
    with pytest.raises(ContextLengthError):
        engine.score([1] * 600)
    engine.close()


@pytest.mark.parametrize("kv_dtype", ["f32", "int8", "int4", "k=int8,v=int4"])
def test_memory_formula_is_what_the_executor_takes(stories: Path, kv_dtype: str) -> None:
    model = open_model(path_of(stories, "hf"), kv_dtype=kv_dtype, cache=False)
    engine = Engine(model.executor, EngineConfig(kv_budget=1 << 20), start=False)
    for group in model.executor.programs.groups:
        block = model.executor.read_blocks(group.name, np.zeros(1, np.int32)).nbytes
        assert block == memory.block_bytes(group, kv_dtype)
    assert engine.state_bytes <= 1 << 20
    engine.close()
    model.close()


def test_recent_positions_are_given_back(stories: Path) -> None:
    """Codes are kept of a whole sequence, their f16 form of what a query may still read so."""
    model = open_model(path_of(stories, "hf"), kv_dtype="int4", cache=False)
    params = SamplingParams(temperature=0, ignore_eos=True)
    config = EngineConfig(blocks={"full": 32, "full.recent": 13}, step_tokens=32, prefix_cache=False)
    engine = Engine(model.executor, config, model.tokenizer.eos_ids, model.digest, start=False)
    (result,) = run_all(engine, [make_request("long", range(1, 200), params, 300)])
    assert not result.failed
    assert len(result.tokens[0]) == 300
    roomy, _ = run(model, [make_request("long", range(1, 200), params, 300)], prefix_cache=False)
    assert result.tokens == roomy[0].tokens
    engine.close()
    model.close()
