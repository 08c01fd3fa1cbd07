"""The executor's promises: what it stores, copies, saves and refuses; state kinds that the first families lack."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from inhouse.core.errors import ExecutorError, UnsupportedError, UsageError
from inhouse.model.build import build
from inhouse.model.rewrite import quantize_activations
from inhouse.runtime.executor import Executor
from inhouse.runtime.ops import Builder
from inhouse.runtime.packed import Packed, pack_float, quantize, quantize_rows_reference
from inhouse.runtime.program import ProgramSet, StateGroup, StateKind, WeightSpec
from inhouse.runtime.step import Step
from inhouse.runtime.torch_executor import TorchExecutor, to_torch
from tests.runtime_torch.tiny import Tiny, step_of, tiny, worst

pytestmark = pytest.mark.torch

TOKENS = [5, 17, 3, 88, 41, 2, 9, 60, 33, 12, 71, 8, 26, 54, 39, 66, 4, 20, 77, 13]


@pytest.fixture(scope="module")
def model() -> Tiny:
    return tiny("Qwen3", head_dim=8, use_sliding_window=True, sliding_window=6, max_window_layers=2)


def ids(*values: int) -> Any:
    return np.array(values, np.int32)


def test_it_is_an_executor(model: Tiny) -> None:
    executor: Executor = model.executor(kv_dtype="bf16")
    assert (executor.name, executor.kv_dtype, executor.programs) == ("torch/cpu", "bf16", model.programs)


def test_copied_blocks_continue_like_the_original(model: Tiny) -> None:
    executor = model.executor()
    executor.run("step", step_of(model.programs, [(TOKENS, 0)]))  # blocks 0..7, in reverse order
    for group in ("full", "window6"):
        executor.copy_blocks(group, ids(7, 6), ids(15, 14))
    both = executor.run("step", step_of(model.programs, [([1, 2], 20), ([1, 2], 20)]))["logits"]
    assert worst(both[2:], both[:2]) < 1e-6


def test_saved_blocks_come_back(model: Tiny) -> None:
    executor = model.executor(kv_dtype="f16")
    executor.run("step", step_of(model.programs, [(TOKENS, 0)]))
    saved = {group.name: executor.read_blocks(group.name, ids(7, 6)) for group in model.programs.groups}
    expected = executor.run("step", step_of(model.programs, [([1], 20)]))["logits"]
    assert saved["full"].shape == (2, model.programs.group("full").bytes_per_token(2) * 16)
    other = model.executor(kv_dtype="f16")
    for group, data in saved.items():
        other.write_blocks(group, ids(7, 6), data)
        np.testing.assert_array_equal(other.read_blocks(group, ids(6)), data[1:])
    np.testing.assert_array_equal(other.run("step", step_of(model.programs, [([1], 20)]))["logits"], expected)


def test_a_step_writes_only_its_own_positions(model: Tiny) -> None:
    executor = model.executor()
    blocks = ids(*range(64))
    before = executor.read_blocks("full", blocks)
    executor.run("step", step_of(model.programs, [(TOKENS[:4], 0)]))
    changed = (executor.read_blocks("full", blocks) != before).any(axis=1)
    assert np.flatnonzero(changed).tolist() == [7]


def test_stale_blocks_never_reach_a_result(model: Tiny) -> None:
    executor = model.executor()
    for group in model.programs.groups:
        data = executor.read_blocks(group.name, ids(*range(64)))
        data.view(np.float32)[:] = math.nan
        executor.write_blocks(group.name, ids(*range(64)), data)
    logits = executor.run("step", step_of(model.programs, [(TOKENS, 0), (TOKENS[:3], 0)]))["logits"]
    clean = model.executor().run("step", step_of(model.programs, [(TOKENS, 0), (TOKENS[:3], 0)]))["logits"]
    np.testing.assert_array_equal(logits, clean)


@pytest.mark.parametrize(("kv_dtype", "error"), [("f16", 2e-3), ("bf16", 2e-2)])
def test_kv_types_round_what_is_stored(model: Tiny, kv_dtype: str, error: float) -> None:
    step = step_of(model.programs, [(TOKENS, 0)])
    exact = model.executor().run("step", step)["logits"]
    executor = model.executor(kv_dtype=kv_dtype)
    rounded = executor.run("step", step)["logits"]
    assert error / 100 < worst(rounded, exact) < error
    halves = model.executor(kv_dtype=kv_dtype)  # the current chunk is read as it is stored, too
    first = halves.run("step", step_of(model.programs, [(TOKENS[:9], 0)]))["logits"]
    second = halves.run("step", step_of(model.programs, [(TOKENS[9:], 9)]))["logits"]
    assert worst(np.concatenate([first, second]), rounded) < 1e-5


@pytest.mark.parametrize(("dtype", "error"), [("f16", 2e-2), ("bf16", 2e-1)])
def test_half_precision_weights(model: Tiny, dtype: str, error: float) -> None:
    step = step_of(model.programs, [(TOKENS, 0)])
    exact = model.executor().run("step", step)["logits"]
    assert 1e-5 < worst(model.executor(dtype=dtype).run("step", step)["logits"], exact) < error


def test_pooled_rows_are_the_last_token_of_each_sequence(model: Tiny) -> None:
    out = model.executor().run("embed", step_of(model.programs, [(TOKENS, 0), (TOKENS[:5], 0)]))
    last = out["hidden"][[19, 24]]
    np.testing.assert_allclose(out["pooled"], last / np.linalg.norm(last, axis=1, keepdims=True), rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        theirs = model.original.model(torch.tensor([TOKENS])).last_hidden_state[0].numpy()
    assert worst(out["hidden"][:20], theirs) < 1e-4


def test_only_sampled_rows_come_back(model: Tiny) -> None:
    step = step_of(model.programs, [(TOKENS, 0)])
    whole = model.executor().run("step", step)["logits"]
    some = model.executor().run("step", replace(step, sampled=ids(19, 2)))["logits"]
    assert worst(some, whole[[19, 2]]) < 1e-6
    assert model.executor().run("step", replace(step, sampled=ids()))["logits"].shape == (0, 97)


def test_packed_weights_run_and_integers_are_multiplied_as_such() -> None:
    model = tiny("Llama", hidden_size=64, num_attention_heads=8, intermediate_size=96)
    weights: dict[str, Any] = {
        name: quantize(array, "q8") if array.ndim == 2 else array for name, array in model.weights.items()
    }
    formats = {name: weight.format for name, weight in weights.items() if isinstance(weight, Packed)}
    rewritten = quantize_activations(model.programs, formats)
    executor = TorchExecutor(rewritten, weights)
    executor.allocate({"full": 8})
    logits = executor.run("step", step_of(model.programs, [(TOKENS, 0)]))["logits"]
    exact = model.executor().run("step", step_of(model.programs, [(TOKENS, 0)]))["logits"]
    assert 1e-4 < worst(logits, exact) < 0.3
    seen: dict[str, Any] = {}

    def observe(op: Any, inputs: Any, outputs: Any) -> None:
        if op.kind == "linears" and op.layer == 1 and "layers.1.attn.k.weight" in op.weights:
            seen["rows"], seen["out"] = inputs[0], outputs[1].numpy()

    with torch.no_grad():
        executor.forward("step", torch.tensor([TOKENS]), observe=observe)
    codes = weights["layers.1.attn.k.weight"].codes()
    rows, scales = seen["rows"].codes.numpy().astype(np.int64), seen["rows"].scales.numpy().astype(np.float64)
    expected = sum(
        rows[:, g * 32 : g * 32 + 32] @ codes.codes[:, g * 32 : g * 32 + 32].T.astype(np.int64)
        * scales[:, g : g + 1] * codes.scales[:, g].astype(np.float64)
        for g in range(2)
    )  # fmt: skip
    assert worst(seen["out"], np.asarray(expected, np.float32)) < 2e-6
    again, _ = quantize_rows_reference(seen["rows"].dequantize().numpy(), 32)
    np.testing.assert_array_equal(again, seen["rows"].codes.numpy())


def test_packed_floats_are_exact(model: Tiny) -> None:
    packed = {n: pack_float(np.ascontiguousarray(a), "f32") if a.ndim == 2 else a for n, a in model.weights.items()}
    for name, tensor in to_torch(packed).items():
        np.testing.assert_array_equal(tensor.numpy(), model.weights[name])


def test_what_is_refused(model: Tiny) -> None:
    step = step_of(model.programs, [(TOKENS, 0)])
    executor = model.executor()
    with pytest.raises(UnsupportedError, match="no adapter in slot 3"):
        executor.run("step", replace(step, adapters=ids(3)))
    with pytest.raises(UsageError, match="tokens holds"):
        executor.run("step", replace(step, tokens=step.tokens + 90))
    with pytest.raises(UnsupportedError, match="encode"):
        executor.run("encode", step)
    with pytest.raises(UsageError, match="block ids 64"):
        executor.read_blocks("full", ids(64))
    with pytest.raises(UsageError, match="saved blocks"):
        executor.write_blocks("full", ids(1), np.zeros((1, 3), np.uint8))
    with pytest.raises(UnsupportedError, match="no state group"):
        executor.copy_blocks("latent", ids(0), ids(1))
    with pytest.raises(UnsupportedError, match="q8"):
        model.executor(kv_dtype="q8")
    with pytest.raises(UnsupportedError, match="f64"):
        model.executor(dtype="f64")
    with pytest.raises(UsageError, match="final_norm should have the shape"):
        TorchExecutor(model.programs, {**model.weights, "final_norm": np.zeros(3, np.float32)})
    with pytest.raises(UsageError, match="found nothing"):
        TorchExecutor(model.programs, {n: w for n, w in model.weights.items() if n != "head.weight"})
    executor.close()
    with pytest.raises(UsageError):
        executor.run("step", step)


def test_a_failing_step_is_an_executor_error(model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    executor = model.executor()
    monkeypatch.setattr("inhouse.runtime.torch_executor.evaluate", exhausted)
    with pytest.raises(ExecutorError, match="20 tokens failed"):
        executor.run("step", step_of(model.programs, [(TOKENS, 0)]))


def encoder_decoder() -> tuple[ProgramSet, dict[str, Any]]:
    """The smallest model with an encoder: both sides one attention, decoder rows attend what was encoded."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(8, 8), scale=0.3).astype(np.float32) for name in ("q", "k", "v")}
    arrays["table"] = rng.normal(size=(11, 8)).astype(np.float32)
    weights = {n: WeightSpec(n, a.shape, "embedding" if n == "table" else "linear") for n, a in arrays.items()}
    heads: dict[str, Any] = {"heads": 2, "kv_heads": 2, "head_dim": 4, "v_dim": 4, "scale": 0.5}
    encode = Builder("encode", weights)
    encode.layer = 0
    x = encode.one("embed", weights=["table"])
    q, k, v = encode.op("linears", x, weights=["q", "k", "v", "", "", ""])
    y = encode.one("attention", q, k, v, mask="bidirectional", group="encoder", **heads)
    encode.op("write_cross", *encode.op("linears", y, weights=["k", "v", "", ""]), group="cross")
    pooled = encode.one("pool", y, mode="mean")
    step = Builder("step", weights)
    step.layer = 0
    (q,) = step.op("linears", step.one("embed", weights=["table"]), weights=["q", ""])
    hidden = step.one("attention", q, cross=True, group="cross", **heads)
    programs = {"encode": encode.finish(pooled=pooled), "step": step.finish(hidden=hidden)}
    groups = [
        StateGroup(name, kind, (0,), 2, 4, 4, chunkable=False, shareable=False)
        for name, kind in (("cross", StateKind.CROSS), ("encoder", StateKind.PAGED))
    ]
    return ProgramSet(programs, weights, tuple(groups), 11, 64), arrays


def softmax_attention(q: Any, k: Any, v: Any) -> Any:
    out = []
    for h in (slice(0, 4), slice(4, 8)):
        scores = np.exp(0.5 * q[:, h] @ k[:, h].T)
        out.append(scores / scores.sum(1, keepdims=True) @ v[:, h])
    return np.concatenate(out, axis=1)


def test_cross_attention_reads_what_encode_wrote() -> None:
    programs, arrays = encoder_decoder()
    executor = TorchExecutor(programs, arrays)
    executor.allocate({"cross": 6, "encoder": 6})
    sources = [[1, 2, 3] * 6, [7, 8]]
    table = np.array([[4, 1], [2, -1]], np.int32)
    encode = Step(
        tokens=ids(*sources[0], *sources[1]), positions=ids(*range(18), 0, 1), sequences=ids(*[0] * 18, 1, 1),
        lengths=ids(18, 2), tables={"cross": table, "encoder": table[:, ::-1].copy() + 1}, sampled=ids(),
        adapters=ids(0, 0),
    )  # fmt: skip
    encode.tables["encoder"][1] = [0, -1]
    step = Step(
        tokens=ids(5, 6, 9), positions=ids(0, 1, 0), sequences=ids(0, 0, 1), lengths=ids(2, 1),
        tables={"cross": table}, sampled=ids(), adapters=ids(0, 0), encoder_lengths=ids(18, 2),
    )  # fmt: skip
    for lengths, match in ((ids(18, 0), "encoder_lengths 0"), (ids(18, 17), "lacks a block"), (ids(33, 2), "short")):
        with pytest.raises(UsageError, match=match):
            executor.run("step", replace(step, encoder_lengths=lengths))
    pooled = executor.run("encode", encode)["pooled"]
    hidden = executor.run("step", step)["hidden"]
    for n, (source, rows) in enumerate(zip(sources, ([5, 6], [9]), strict=True)):
        x = arrays["table"][source]
        y = softmax_attention(x @ arrays["q"].T, x @ arrays["k"].T, x @ arrays["v"].T)
        np.testing.assert_allclose(pooled[n], y.mean(0), rtol=1e-5)
        expected = softmax_attention(arrays["table"][rows] @ arrays["q"].T, y @ arrays["k"].T, y @ arrays["v"].T)
        np.testing.assert_allclose(hidden[step.sequences == n], expected, rtol=1e-5)


def test_a_spec_with_another_context_builds_its_own_frequencies(model: Tiny) -> None:
    longer = build(replace(model.spec, context_length=128))
    assert longer.context_length == 128


def test_a_prefix_is_seen_whole() -> None:
    rng = np.random.default_rng(1)
    arrays = {"table": rng.normal(size=(11, 8)).astype(np.float32)}
    builder = Builder("step", {"table": WeightSpec("table", (11, 8), "embedding")})
    builder.layer = 0
    x = builder.one("embed", weights=["table"])
    attrs: dict[str, Any] = {"heads": 2, "kv_heads": 2, "head_dim": 4, "v_dim": 4, "scale": 0.5, "group": "kv"}
    program = builder.finish(hidden=builder.one("attention", x, x, x, mask="prefix", **attrs))
    group = StateGroup("kv", StateKind.PAGED, (0,), 2, 4, 4, chunkable=False)
    programs = ProgramSet({"step": program}, {"table": WeightSpec("table", (11, 8), "embedding")}, (group,), 11, 64)
    executor = TorchExecutor(programs, arrays)
    executor.allocate({"kv": 4})
    tokens = [1, 2, 3, 4, 5, 6]
    step = Step(
        tokens=ids(*tokens), positions=ids(*range(6)), sequences=ids(*[0] * 6), lengths=ids(6),
        tables={"kv": np.array([[2]], np.int32)}, sampled=ids(), adapters=ids(0), prefixes=ids(4),
    )  # fmt: skip
    hidden = executor.run("step", step)["hidden"]
    values = arrays["table"][tokens]
    for row in range(6):
        keys = values[: max(row + 1, 4)]
        np.testing.assert_allclose(hidden[row], softmax_attention(values[row : row + 1], keys, keys)[0], rtol=1e-5)
    with pytest.raises(UsageError, match="prefix ends beyond"):
        executor.run("step", replace(step, prefixes=ids(7)))
