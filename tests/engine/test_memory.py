"""The memory formula: bytes by hand, blocks within a budget, limits of a cgroup."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inhouse.core.errors import CapacityError
from inhouse.engine.engine import Engine
from inhouse.engine.request import EngineConfig
from inhouse.model.build import build
from inhouse.model.families.table import resolve
from inhouse.plan import memory
from inhouse.runtime.packed import pack_gguf
from inhouse.runtime.program import Axis, Op, Program, ProgramSet, StateGroup, Value
from inhouse.runtime.sampling import ReferenceSampler
from inhouse.store.gguf import open_gguf
from tests.engine.fakes import FakeExecutor, encoder_programs, paged, programs, window

pytestmark = pytest.mark.null


def test_weights_count_shared_memory_once() -> None:
    tied = pack_gguf(np.zeros(1000, np.uint8), "F32", (10, 25))  # a tile holds 16 rows
    assert memory.weight_bytes({"embedding": tied, "head": tied, "norm": np.zeros(7, np.float32)}) == 1628


def test_blocks_by_hand() -> None:
    group = replace(paged(), layers=(0, 1, 2), kv_heads=2, head_dim=64, v_dim=32)
    assert memory.block_bytes(group, "f16") == 3 * 2 * (64 + 32) * 2 * 16
    assert memory.block_bytes(group, "f32") == 2 * memory.block_bytes(group, "f16")
    assert memory.blocks_per_sequence(group, 100, 32) == 7
    assert memory.blocks_per_sequence(window(64), 1000, 32) == 7
    assert memory.blocks_per_sequence(window(64), 40, 32) == 3


@pytest.mark.parametrize("budget", [40_000, 100_000, 1_000_000, 10_000_000])
def test_blocks_fill_the_budget_and_no_more(budget: int) -> None:
    models = programs(paged(), window(32), context=256)
    blocks = memory.kv_blocks_for(models, "f32", budget, context=256, sequences=8, step_tokens=64)
    spent = sum(blocks[g.name] * memory.block_bytes(g, "f32") for g in models.groups)
    assert spent <= budget
    assert blocks["full"] <= 8 * 16
    assert blocks["full"] >= 16
    assert blocks["window"] >= 7
    more = sum(memory.block_bytes(g, "f32") for g in models.groups)
    assert blocks["full"] == 8 * 16 or spent + 2 * more > budget, "nothing is left unused"


def test_a_budget_below_one_sequence_says_both_numbers() -> None:
    with pytest.raises(CapacityError, match="one sequence of 256 tokens needs 8192 bytes.*budget is 8000"):
        memory.kv_blocks_for(programs(), "f32", 8000, context=256, sequences=4, step_tokens=16)


def test_the_engine_allocates_by_the_formula() -> None:
    executor = FakeExecutor(programs(paged(), window(32)))
    config = EngineConfig(kv_budget=50_000, max_running=3, step_tokens=32)
    engine = Engine(executor, config, sampler=ReferenceSampler(), start=False)
    assert engine.state_bytes <= 50_000
    full = Engine(executor, replace(config, kv_budget=None), sampler=ReferenceSampler(), start=False)
    assert full._blocks.pools["full"].count == 3 * 16, "as many as the sequences need, not the whole machine"


def test_a_context_that_nobody_asked_for_is_lowered_to_the_memory() -> None:
    def engine(**limits: Any) -> Engine:
        executor = FakeExecutor(programs(paged(), window(32), context=4096))
        config = EngineConfig(max_running=2, step_tokens=32, **limits)
        return Engine(executor, config, sampler=ReferenceSampler(), start=False)

    one = memory.sequence_bytes(programs(paged(), window(32)), "f32", 1024, 32)
    assert engine(kv_budget=one).context_length == 1024
    assert engine(kv_budget=one + 511).context_length == 1024
    assert engine(kv_budget=one + 512).context_length == 1040
    assert engine(kv_budget=10**9).context_length == 4096
    with pytest.raises(CapacityError, match="one sequence of 2048 tokens needs"):
        engine(kv_budget=one, context_length=2048)
    with pytest.raises(CapacityError, match="one sequence of 256 tokens needs"):
        engine(kv_budget=5000)


def test_what_a_step_needs_is_left_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a budget, state takes its share of what is left beside activations and workspace."""
    models = programs(paged(), context=4096)
    step = memory.activation_bytes(models, 32, 32) + memory.workspace_bytes(32, memory.threads_available())
    one = memory.sequence_bytes(models, "f32", 1024, 32)
    monkeypatch.setattr(memory, "available_bytes", lambda: step + int(one / memory.STATE_SHARE) + 1)
    assert memory.default_kv_budget(models, 32, 32) == one
    config = EngineConfig(max_running=2, step_tokens=32)
    engine = Engine(FakeExecutor(models), config, sampler=ReferenceSampler(), start=False)
    assert engine.context_length == 1024
    monkeypatch.setattr(memory, "available_bytes", lambda: step // 2)
    with pytest.raises(CapacityError, match="the budget is 0"):
        Engine(FakeExecutor(models), config, sampler=ReferenceSampler(), start=False)


def test_room_for_steps_is_made_once_and_for_the_largest() -> None:
    def reserved(*groups: StateGroup, **limits: Any) -> tuple[int, int, int] | None:
        executor = FakeExecutor(programs(*groups))
        Engine(executor, EngineConfig(**limits), sampler=ReferenceSampler(), start=False)
        return executor.reserved

    assert reserved(step_tokens=100, logit_rows=8, max_running=12) == (100, 12, 12)
    assert reserved(step_tokens=10, logit_rows=64, max_running=4) == (10, 10, 4)
    whole = replace(paged(), chunkable=False)
    assert reserved(whole, step_tokens=100, logit_rows=8, max_running=4) == (256, 256, 4)


def test_available_memory_is_bounded_by_the_cgroup(tmp_path: Path) -> None:
    free = memory.available_bytes(tmp_path)
    assert free > 1 << 20
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    assert memory.available_bytes(tmp_path) == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(tmp_path) > 1 << 20
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text("700")
    (old / "memory.usage_in_bytes").write_text("900")
    assert memory.available_bytes(tmp_path) == 0


def test_activations_are_the_widest_moment() -> None:
    a, b, c = (Value(i, Axis.TOKENS, width) for i, width in enumerate((10, 30, 5)))
    logits = Value(3, Axis.SAMPLED, 100)
    ops = tuple(
        Op(kind, inputs, (), (output,), {})
        for kind, inputs, output in (("embed", (), a), ("x", (a,), b), ("x", (b,), c), ("x", (c,), logits))
    )
    made = ProgramSet({"step": Program("step", ops, {"logits": logits})}, {}, (), 100, 64)
    assert memory.activation_bytes(made, 8, 2) == 4 * 8 * (10 + 30)
    assert memory.activation_bytes(made, 8, 64) == 4 * (8 * 5 + 64 * 100)


@pytest.mark.realdata
def test_activations_of_a_real_program(stories: Path) -> None:
    source = open_gguf(stories / "stories260K-F32.gguf")
    spec, _ = resolve(source.metadata, list(source))
    bytes_ = memory.activation_bytes(build(spec), 512, 64)
    widest = 512 * (64 + 2 * 172) * 4
    assert widest <= bytes_ < 2 * widest


def test_cross_state_grows_with_sequences_and_scratch_does_not() -> None:
    set_ = encoder_programs(context=128)
    shares = memory.share_groups(set_)
    assert [[group.name for group in part] for part in (shares.own, shares.cross, shares.scratch)] == [
        ["full"], ["cross"], ["encoder"],
    ]  # fmt: skip
    each = memory.block_bytes(set_.group("full"), "f32")
    scratch = 64 + 128 // 16  # one input, and part of a block for each of many
    budget = (scratch + 5 * 16) * each
    blocks = memory.kv_blocks_for(set_, "f32", budget, context=128, sequences=32, step_tokens=64)
    assert blocks == {"full": 5 * 8, "cross": 5 * 8, "encoder": scratch}
    with pytest.raises(CapacityError, match="one sequence of 128 tokens needs"):
        memory.kv_blocks_for(set_, "f32", scratch * each, context=128, sequences=32, step_tokens=64)
