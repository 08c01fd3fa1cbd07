"""The engine over the fake executor: whatever the batch, chunks, cache, preemptions and cancels, each request gets
what it would get alone."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inhouse.core.errors import (
    ExecutorError,
    UnavailableError,
    UsageError,
)
from inhouse.engine.engine import Engine
from inhouse.engine.recipe import make_recipe
from inhouse.engine.request import EngineConfig, FinishReason, Request, SamplingParams, make_request
from inhouse.runtime.program import StateGroup
from inhouse.runtime.sampling import ROW, ReferenceSampler
from tests.engine.driving import EOS, Result, drive, make_engine, run_all
from tests.engine.fakes import VOCAB, FakeExecutor, logits_after, paged, programs, window

pytestmark = pytest.mark.null
GREEDY = SamplingParams(temperature=0)


def alone(request: Request, choice: int = 0, context: int = 256) -> list[int]:
    """The oracle: one token after another from the fake's own function, no engine at all."""
    tokens, params = list(request.prompt), request.params
    recipe = make_recipe(params, VOCAB)
    limit = context if request.max_tokens is None else len(tokens) + request.max_tokens
    while len(tokens) < limit:
        row = (
            params.seed or 0,
            len(tokens),
            0,
            0,
            0,
            len(request.prompt),
            len(tokens),
            0,
            choice,
            max(params.top_k, 0),
        )
        rows = np.array([(*row, -1, *recipe.numbers)], ROW)
        history = np.array(tokens, np.int32)
        masks = np.zeros((0, 2), np.uint32)
        empty, zero = np.zeros(0, np.int32), np.zeros(0, np.float32)
        drawn, _ = ReferenceSampler().sample(logits_after(tokens)[None], rows, empty, zero, history, masks)
        token = int(drawn[0])
        if token == EOS:
            break
        tokens.append(token)
    return tokens[len(request.prompt) :]


def random_requests(seed: int, count: int, longest: int = 70) -> list[Request]:
    """Requests with shared prefixes, greedy and drawn, penalised and not."""
    rng = random.Random(seed)
    stem = [rng.randrange(8, VOCAB) for _ in range(longest)]
    out = []
    for i in range(count):
        shared = rng.randrange(longest)
        prompt = stem[:shared] + [rng.randrange(8, VOCAB) for _ in range(rng.randrange(1, 20))]
        params = rng.choice(
            (
                GREEDY,
                SamplingParams(seed=rng.randrange(2**40), n=rng.choice((1, 1, 3))),
                SamplingParams(seed=rng.randrange(2**40), top_k=9, top_p=0.9, repetition_penalty=1.3),
                SamplingParams(seed=3, temperature=0.7, presence_penalty=0.5, frequency_penalty=0.5, typical_p=0.8),
            )
        )
        out.append(make_request(f"r{i}", prompt, params, max_tokens=rng.randrange(1, 30)))
    return out


def assert_as_alone(requests: list[Request], results: list[Result]) -> None:
    for request, result in zip(requests, results, strict=True):
        assert not result.failed
        assert len(result.finished) == request.params.n
        for choice in range(request.params.n):
            assert result.tokens.get(choice, []) == alone(request, choice), (request.id, choice)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    running=st.integers(3, 9),
    budget=st.sampled_from((1, 5, 16, 33, 512)),
    blocks=st.sampled_from((9, 12, 20, 64)),
    cache=st.booleans(),
    groups=st.sampled_from(((paged(),), (paged(), window(24)), (window(17),))),
)
def test_every_answer_is_what_it_is_alone(
    seed: int, running: int, budget: int, blocks: int, cache: bool, groups: tuple[StateGroup, ...]
) -> None:
    executor = FakeExecutor(programs(*groups))
    counts = {group.name: blocks for group in groups}
    engine = make_engine(executor, max_running=running, step_tokens=budget, prefix_cache=cache, blocks=counts)
    requests = random_requests(seed, 10)
    assert_as_alone(requests, run_all(engine, requests))
    assert all(step.tokens.size <= max(budget, 1) for step in executor.steps)
    assert all(step.lengths.size <= running for step in executor.steps)
    assert all(pool.used == 0 for pool in engine._blocks.pools.values())


def test_few_blocks_force_preemptions_and_change_nothing() -> None:
    engine = make_engine(FakeExecutor(programs()), blocks={"full": 8}, max_running=6, step_tokens=64)
    requests = [make_request(f"r{i}", range(8 + i, 40 + i), GREEDY, 60) for i in range(6)]
    requests = [replace(r, params=replace(GREEDY, ignore_eos=True)) for r in requests]
    results = run_all(engine, requests)
    assert engine.stats().preemptions > 0
    assert sum(r.finished[0].timings.preemptions for r in results) == engine.stats().preemptions
    for request, result in zip(requests, results, strict=True):
        assert result.tokens[0][:5] == alone(replace(request, max_tokens=5))[:5] or EOS in result.tokens[0]
        assert len(result.tokens[0]) == 60
        assert result.finished[0].reason is FinishReason.LENGTH


def test_prefix_cache_saves_work_and_says_so() -> None:
    executor = FakeExecutor(programs())
    engine = make_engine(executor)
    prompt = list(range(8, 58))
    cold, warm = (run_all(engine, [make_request(str(i), prompt, GREEDY, 4)])[0] for i in range(2))
    assert (cold.finished[0].usage.cached_tokens, warm.finished[0].usage.cached_tokens) == (0, 48)
    assert cold.tokens == warm.tokens
    assert executor.steps[-1].tokens.size == 1
    computed = [step.tokens.size for step in executor.steps]
    assert computed[0] == 50
    assert 2 in computed
    stats = engine.stats()
    assert (stats.prefix_queries, stats.prefix_hits, stats.prompt_tokens) == (100, 48, 100)


@pytest.mark.parametrize("other", [{"salt": "b"}, {"adapter": 1}])
def test_prefixes_are_not_shared_across_salt_or_adapter(other: dict[str, Any]) -> None:
    engine = make_engine(FakeExecutor(programs()))
    prompt = list(range(8, 58))
    loading = threading.Thread(target=engine.adapters.load, args=("kind", {}, "digest"))
    loading.start()
    while not engine.adapters.table():
        engine.step()
    loading.join()
    run_all(engine, [make_request("a", prompt, GREEDY, 2)])
    assert run_all(engine, [make_request("b", prompt, GREEDY, 2, **other)])[0].finished[0].usage.cached_tokens == 0
    assert run_all(engine, [make_request("c", prompt, GREEDY, 2)])[0].finished[0].usage.cached_tokens == 48


def test_choices_share_the_prompt_and_copy_on_write() -> None:
    executor = FakeExecutor(programs())
    engine = make_engine(executor, max_running=8)
    request = make_request("n", range(8, 48), SamplingParams(seed=5, n=6, ignore_eos=True), 10)
    result = run_all(engine, [request])[0]
    assert sorted(result.tokens) == list(range(6))
    assert len({tuple(t) for t in result.tokens.values()}) == 6, "every choice draws for itself"
    assert sum(step.tokens.size for step in executor.steps) == 40 + 6 * 9, "the prompt is computed once"
    widest = max(executor.steps, key=lambda step: step.lengths.size)
    shared = {tuple(row[:2]) for row in widest.tables["full"]}
    assert len(shared) == 1, "full prompt blocks are the same for all"
    assert len({row[2] for row in widest.tables["full"]}) == 6, "the partly filled one is not"
    assert {f.last for f in result.finished.values()} == {False, True}


def test_a_seed_draws_the_same_whoever_is_near() -> None:
    request = make_request("x", range(8, 20), SamplingParams(seed=11), 20)
    first = run_all(make_engine(FakeExecutor(programs())), [request])[0]
    crowd = [*random_requests(1, 12), request]
    second = run_all(make_engine(FakeExecutor(programs()), max_running=16), crowd)[-1]
    assert first.tokens == second.tokens
    unseeded = make_request("y", range(8, 20), SamplingParams(ignore_eos=True), 20)
    one, two = (run_all(make_engine(FakeExecutor(programs())), [unseeded])[0] for _ in range(2))
    assert one.tokens != two.tokens
    told = replace(unseeded, params=SamplingParams(ignore_eos=True, seed=one.finished[0].seed))
    assert run_all(make_engine(FakeExecutor(programs())), [told])[0].tokens == one.tokens


def test_cancel_in_the_middle_frees_blocks_at_once_and_disturbs_nobody() -> None:
    engine = make_engine(FakeExecutor(programs()), step_tokens=8)
    requests = random_requests(2, 8)
    victims = {"r1": 3, "r4": 6, "r6": 0}

    def between(step: int) -> None:
        for name, at in victims.items():
            if step == at:
                engine.cancel(name)

    results = run_all(engine, requests, between)
    spared = [(r, s) for r, s in zip(requests, results, strict=True) if r.id not in victims]
    assert_as_alone([r for r, _ in spared], [s for _, s in spared])
    for request, result in zip(requests, results, strict=True):
        if request.id in victims:
            assert {f.reason for f in result.finished.values()} & {FinishReason.CANCELLED}
    assert engine.stats().kv_usage == 0
    engine.cancel("never there")
    assert engine.step() is False


def test_one_choice_can_be_stopped_alone() -> None:
    engine = make_engine(FakeExecutor(programs()))
    params = SamplingParams(seed=5, n=3, ignore_eos=True)
    result = Result()
    engine.submit(make_request("n", range(8, 20), params, 10), result.feed)
    drive(engine, lambda step: engine.cancel("n", 1) if step == 4 else None)
    assert result.finished[1].reason is FinishReason.CANCELLED
    assert len(result.tokens[1]) == 4
    assert len(result.tokens[0]) == len(result.tokens[2]) == 10


def test_stop_tokens_minimum_and_length() -> None:
    free = make_request("a", range(8, 20), replace(GREEDY, ignore_eos=True), 40)
    tokens = run_all(make_engine(FakeExecutor(programs())), [free])[0].tokens[0]
    stop = tokens[5]
    first = tokens.index(stop)
    stopped = replace(free, params=replace(GREEDY, ignore_eos=True, stop_token_ids=(stop,)))
    result = run_all(make_engine(FakeExecutor(programs())), [stopped])[0]
    assert result.tokens.get(0, []) == tokens[:first]
    end = result.finished[0]
    assert (end.reason, end.stop_token, end.usage.completion_tokens) == (FinishReason.STOP, stop, first + 1)
    later = replace(stopped, params=replace(stopped.params, min_tokens=first + 1))
    longer = run_all(make_engine(FakeExecutor(programs())), [later])[0].tokens[0]
    assert len(longer) > first
    assert stop not in longer[: first + 1]


def test_bans_masks_and_bad_words() -> None:
    base = make_request("a", range(8, 20), replace(GREEDY, ignore_eos=True), 12)
    tokens = run_all(make_engine(FakeExecutor(programs())), [base])[0].tokens[0]
    pair = (tokens[2], tokens[3])
    word = replace(base, params=replace(base.params, bad_words=(pair, (tokens[0],))))
    without = run_all(make_engine(FakeExecutor(programs())), [word])[0].tokens[0]
    assert tokens[0] not in without
    assert pair not in list(zip(without, without[1:], strict=False))
    few = replace(base, params=SamplingParams(seed=1, allowed_token_ids=(9, 30), ignore_eos=True))
    assert set(run_all(make_engine(FakeExecutor(programs())), [few])[0].tokens[0]) == {9, 30}
    forced = replace(base, params=replace(base.params, logit_bias={33: 100.0}))
    assert set(run_all(make_engine(FakeExecutor(programs())), [forced])[0].tokens[0]) == {33}
    params = replace(base.params, allowed_token_ids=(9,), bad_words=((9,),))
    stuck = run_all(make_engine(FakeExecutor(programs())), [replace(base, params=params)])[0]
    assert isinstance(stuck.failed[0].error, UsageError)


def test_logprobs_of_draws_and_of_the_prompt_in_slices() -> None:
    executor = FakeExecutor(programs())
    engine = make_engine(executor, logit_rows=5, max_running=3, step_tokens=64)
    params = replace(GREEDY, logprobs=3, ignore_eos=True)
    request = replace(make_request("p", range(8, 40), params, 4, 2), prompt_logprobs=2)
    neighbour = make_request("q", range(9, 40), GREEDY, 30)
    run_all(engine, [neighbour])
    result = run_all(engine, [request, make_request("r", range(9, 40), GREEDY, 30)])[0]
    assert max(step.sampled.size for step in executor.steps) == 5, "logits come in slices"
    history = list(request.prompt) + result.tokens[0]
    assert len(result.prompt) == 31
    for i, one in enumerate([*result.prompt, *result.logprobs[0]]):
        x = logits_after(history[: i + 1]).astype(np.float64)
        x -= np.log(np.exp(x).sum())
        assert one.token == history[i + 1]
        assert one.logprob == pytest.approx(x[one.token], abs=1e-5)
        assert one.rank == 1 + (x > x[one.token]).sum()
        assert [t for t, _ in one.top] == np.argsort(-x)[: 2 if i < 31 else 3].tolist()


def test_score_gives_each_token_and_taps_every_row() -> None:
    engine = Engine(
        FakeExecutor(programs()),
        EngineConfig(blocks={"full": 20}, logit_rows=7, max_running=2),
        sampler=ReferenceSampler(),
    )
    ids = [8 + i * 7 % 50 for i in range(60)]
    seen: dict[int, Any] = {}
    scored = engine.score(ids, tap=lambda start, rows: seen.update({start + i: r.copy() for i, r in enumerate(rows)}))
    engine.close()
    assert [s.token for s in scored] == ids[1:]
    assert sorted(seen) == list(range(60))
    for position in (0, 17, 59):
        np.testing.assert_array_equal(seen[position], logits_after(ids[: position + 1]))


def test_a_failing_step_ends_its_own_requests_and_no_others() -> None:
    executor = FakeExecutor(programs(), fail_when=50)
    engine = make_engine(executor, max_running=1)
    bad, good = run_all(engine, [make_request("bad", [9, 50], GREEDY, 5), make_request("good", [9, 10], GREEDY, 3)])
    assert isinstance(bad.failed[0].error, ExecutorError)
    if 50 not in alone(make_request("good", [9, 10], GREEDY, 3)):
        assert not good.failed
    assert engine.error is None


def test_a_row_of_nan_ends_one_request_only() -> None:
    engine = make_engine(FakeExecutor(programs(), nan_when=50))
    requests = [make_request("bad", [9, 50], GREEDY, 5), make_request("good", [9, 10], GREEDY, 1)]
    bad, good = run_all(engine, requests)
    assert "NaN" in str(bad.failed[0].error)
    assert good.tokens[0] == alone(requests[1])


def test_an_executor_that_fails_for_good_shuts_the_door() -> None:
    executor = FakeExecutor(programs())
    engine = make_engine(executor, max_running=1)
    executor.broken = True
    results = run_all(engine, [make_request(str(i), [9, i], GREEDY, 5) for i in range(8, 14)])
    assert all(result.failed for result in results)
    assert len(executor.steps) == 3
    with pytest.raises(UnavailableError, match="3 steps failed one after another"):
        engine.submit(make_request("x", [9], GREEDY, 5), print)


def test_drain_and_close_of_a_running_engine() -> None:
    executor = FakeExecutor(programs(context=4096))
    engine = Engine(executor, EngineConfig(blocks={"full": 300}), {EOS}, sampler=ReferenceSampler())
    events = list(engine.stream(make_request("a", [9, 10], GREEDY, 5)))
    assert getattr(events[-1], "last", False)
    result = Result()
    engine.submit(make_request("b", [9, 10], replace(GREEDY, ignore_eos=True), 300), result.feed)
    assert engine.drain(0.0) is False
    with pytest.raises(UnavailableError, match="draining"):
        engine.submit(make_request("c", [9], GREEDY, 5), print)
    assert engine.drain(60) is True
    assert len(result.tokens[0]) == 300
    engine.close()
    engine.close()
    assert executor.closed


def test_close_fails_what_lives() -> None:
    engine = Engine(
        FakeExecutor(programs(context=4096)), EngineConfig(blocks={"full": 300}), sampler=ReferenceSampler()
    )
    result = Result()
    engine.submit(make_request("b", [9, 10], GREEDY, 4000), result.feed)
    engine.close()
    assert isinstance(result.failed[0].error, UnavailableError)
    with pytest.raises(UnavailableError, match="closed"):
        engine.submit(make_request("c", [9], GREEDY, 5), print)


def test_a_sink_that_raises_loses_its_request_alone() -> None:
    engine = make_engine(FakeExecutor(programs()))

    def broken(events: object) -> None:
        raise RuntimeError("gone")

    engine.submit(make_request("bad", [9, 10], replace(GREEDY, ignore_eos=True), 50), broken)
    good = run_all(engine, [make_request("good", [9, 11], GREEDY, 5)])[0]
    assert good.finished
    assert engine.stats().finished["cancelled"] == 1


def test_decodes_never_wait_for_a_long_prompt_and_short_prompts_pass_it() -> None:
    executor = FakeExecutor(programs(context=2048))
    engine = make_engine(executor, blocks={"full": 200}, step_tokens=32)
    results = [Result() for _ in range(3)]
    decoding = make_request("d", [9, 10], replace(GREEDY, ignore_eos=True), 40)
    engine.submit(decoding, results[0].feed)
    engine.step()
    engine.submit(make_request("long", [11] * 900, GREEDY, 1), results[1].feed)
    engine.submit(make_request("short", [12] * 40, GREEDY, 1), results[2].feed)
    for _ in range(5):
        engine.step()
    assert len(results[0].tokens[0]) == 6, "one token a step"
    assert results[2].finished, "the short prompt is done"
    assert not results[1].finished
    drive(engine)


def test_priority_goes_first() -> None:
    engine = make_engine(FakeExecutor(programs()), max_running=1)
    ended: list[str] = []

    def note(name: str) -> Any:
        return lambda events: ended.append(name) if getattr(events[-1], "last", False) else None

    for name, priority in (("a", 5), ("b", 0), ("c", -1)):
        engine.submit(make_request(name, [9], GREEDY, 3, priority=priority), note(name))
    drive(engine)
    assert ended == ["c", "b", "a"]


def test_a_group_that_may_not_be_chunked_runs_its_prompt_whole() -> None:
    group = replace(paged(), chunkable=False, shareable=False)
    executor = FakeExecutor(programs(group))
    engine = make_engine(executor, step_tokens=16)
    requests = [make_request(f"r{i}", range(8, 8 + 10 * i), GREEDY, 6) for i in range(1, 5)]
    assert_as_alone(requests, run_all(engine, requests))
    firsts = [int(np.count_nonzero(step.positions == 0)) for step in executor.steps]
    assert sum(firsts) == 4
    assert engine.stats().prefix_queries == 0


def test_many_threads_share_one_engine_and_each_gets_its_own_answer() -> None:
    engine = Engine(
        FakeExecutor(programs()), EngineConfig(blocks={"full": 40}, max_running=8), {EOS}, sampler=ReferenceSampler()
    )
    requests = random_requests(9, 32, longest=40)

    def ask(request: Request) -> Result:
        result = Result()
        result.feed(list(engine.stream(request)))
        return result

    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(ask, requests))
    engine.close()
    assert_as_alone(requests, results)
