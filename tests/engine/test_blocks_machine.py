"""Blocks and scheduler under random histories: hypothesis chooses what happens, every invariant is checked after it."""

from array import array
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inhouse.core.errors import CapacityError, ContextLengthError, UsageError
from inhouse.engine.blocks import BlockPool, Blocks, Tables, blocks_of, first_block, is_static, next_key, root_digest
from inhouse.engine.engine import Engine
from inhouse.engine.request import EngineConfig, Failed, SamplingParams, make_request
from inhouse.runtime.sampling import ReferenceSampler
from inhouse.runtime.step import BLOCK_SIZE
from tests.engine.driving import EOS, Result
from tests.engine.fakes import VOCAB, FakeExecutor, paged, programs, window

pytestmark = pytest.mark.null
FEW = settings(max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))


class BlocksMachine(RuleBasedStateMachine):
    """Sequences that grow, fork, publish, adopt and end; a model says what each block must hold."""

    def __init__(self) -> None:
        super().__init__()
        static = replace(window(20, "static"), sink=16, stride=3)
        self.blocks = Blocks((paged(), window(20), static), {"full": 12, "window": 9, "static": 10})
        self.living: list[tuple[Tables, array[int]]] = []
        self.contents: dict[tuple[str, int], bytes] = {}  # (group, block) -> tokens written so far, from the beginning

    def keys(self, tokens: "array[int]", count: int) -> list[object]:
        keys, parent = [], root_digest("m", "", "")
        for i in range(count):
            keys.append(next_key(parent, tokens, i * BLOCK_SIZE))
            parent = keys[-1].digest
        return keys  # type: ignore[return-value]

    def write(self, tables: Tables, tokens: "array[int]", first: int) -> bool:
        copies = self.blocks.extend(tables, first, len(tokens))
        if copies is None:
            return False
        for group, source, target in copies:
            self.contents[group, target] = self.contents[group, source]
        for group, table in tables.items():
            for i in range(first // BLOCK_SIZE, blocks_of(len(tokens))):
                self.contents[group, table[i]] = tokens[: (i + 1) * BLOCK_SIZE].tobytes()
        return True

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=70))
    def begin(self, tokens: list[int]) -> None:
        ids = array("i", tokens)
        keys = self.keys(ids, (len(ids) - 1) // BLOCK_SIZE)
        tables = self.blocks.empty_tables()
        hits = self.blocks.match(keys)  # type: ignore[arg-type]
        self.blocks.adopt(tables, keys, hits)  # type: ignore[arg-type]
        if self.write(tables, ids, hits * BLOCK_SIZE):
            self.living.append((tables, ids))
        else:
            self.blocks.release(tables)

    @precondition(lambda self: self.living)
    @rule(data=st.data(), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, token: int) -> None:
        tables, tokens = data.draw(st.sampled_from(self.living))
        tokens.append(token)
        if not self.write(tables, tokens, len(tokens) - 1):
            tokens.pop()

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        tables, tokens = data.draw(st.sampled_from(self.living))
        self.blocks.publish(tables, self.keys(tokens, len(tokens) // BLOCK_SIZE), 0)  # type: ignore[arg-type]

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        tables, tokens = data.draw(st.sampled_from(self.living))
        self.living.append((self.blocks.fork(tables), array("i", tokens)))

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.blocks.release(self.living.pop(data.draw(st.integers(0, len(self.living) - 1)))[0])

    @invariant()
    def nothing_is_lost_and_every_sequence_reads_its_own(self) -> None:
        self.blocks.check([tables for tables, _ in self.living])
        for tables, tokens in self.living:
            for group, table in tables.items():
                kept = self.blocks.pools[group].group
                start = first_block(kept.window, len(tokens) - 1)
                for i in range(len(table)):
                    if i < start and not is_static(kept, i):
                        continue
                    mine = tokens[: (i + 1) * BLOCK_SIZE].tobytes()
                    assert self.contents[group, table[i]].startswith(mine[: len(self.contents[group, table[i]])])
                    assert len(self.contents[group, table[i]]) >= len(mine)


class EngineMachine(RuleBasedStateMachine):
    """Requests come, are cancelled and served in any order; every step keeps the invariants and serves no one twice."""

    @initialize(blocks=st.integers(8, 20), running=st.integers(1, 5), budget=st.integers(1, 40), cache=st.booleans())
    def open(self, blocks: int, running: int, budget: int, cache: bool) -> None:
        config = EngineConfig(
            blocks={"full": blocks, "window": blocks}, max_running=running, step_tokens=budget, prefix_cache=cache
        )
        executor = FakeExecutor(programs(paged(), window(24), context=120))
        self.engine = Engine(executor, config, {EOS}, sampler=ReferenceSampler(), start=False)
        self.results: dict[str, Result] = {}

    @rule(
        prompt=st.lists(st.integers(8, 10), min_size=1, max_size=60),
        tokens=st.integers(0, 40),
        n=st.integers(1, 3),
        priority=st.integers(-1, 1),
    )
    def submit(self, prompt: list[int], tokens: int, n: int, priority: int) -> None:
        name, result = str(len(self.results)), Result()
        params = SamplingParams(seed=1, n=n if tokens else 1)
        try:
            self.engine.submit(make_request(name, prompt, params, tokens, priority=priority), result.feed)
        except (ContextLengthError, CapacityError):
            return
        except UsageError:
            if params.n <= self.engine.config.max_running:
                raise
            return
        self.results[name] = result

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()
            self.engine.check()

    @precondition(lambda self: self.results)
    @rule(data=st.data(), choice=st.sampled_from((None, 0, 1)))
    def cancel(self, data: st.DataObject, choice: int | None) -> None:
        self.engine.cancel(data.draw(st.sampled_from(sorted(self.results))), choice)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(20_000):
            if not self.engine.step():
                break
        self.engine.check()
        assert self.engine.stats().kv_usage == 0
        for result in self.results.values():
            assert result.lasts == 1
            assert not any(isinstance(event, Failed) for event in result.failed.values())


TestBlocks = BlocksMachine.TestCase
TestBlocks.settings = FEW
TestEngine = EngineMachine.TestCase
TestEngine.settings = FEW


def test_a_digest_alone_is_not_trusted() -> None:
    pool = BlockPool(paged(), 4)
    tokens = array("i", range(16))
    key = next_key(b"root", tokens, 0)
    block = pool.take()
    pool.publish(block, key)
    assert pool.find(key) == block
    forged = type(key)(key.digest, key.parent, array("i", range(1, 17)).tobytes())
    assert pool.find(forged) is None


def test_the_oldest_idle_content_is_forgotten_first_and_a_prefix_from_its_end() -> None:
    blocks = Blocks((paged(),), {"full": 4})
    tables = blocks.empty_tables()
    tokens = array("i", [t % VOCAB for t in range(64)])
    assert blocks.extend(tables, 0, 64) == []
    keys, parent = [], b""
    for i in range(4):
        keys.append(next_key(parent, tokens, 16 * i))
        parent = keys[-1].digest
    blocks.publish(tables, keys, 0)
    blocks.release(tables)
    assert blocks.match(keys) == 4
    other = blocks.empty_tables()
    assert blocks.extend(other, 0, 20) == []
    assert blocks.match(keys) == 2, "two blocks were needed: the last two of the prefix went"
    blocks.check([other])
    assert {blocks.pools["full"].take() for _ in range(2)}.isdisjoint(other["full"])
    with pytest.raises(CapacityError, match="all 4 blocks of full are in use"):
        blocks.pools["full"].take()
