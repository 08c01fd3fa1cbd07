"""The bits of a token's outputs depend on weights and its own context alone: not on batch, chunks or threads."""

from collections.abc import Sequence

import numpy as np
import pytest

from inhouse.model.rewrite import quantize_activations
from inhouse.runtime.executor import KV_DTYPES, Weight
from inhouse.runtime.kv_codes import KV_TYPES
from inhouse.runtime.native import NativeExecutor
from inhouse.runtime.packed import Packed, quantize
from tests.runtime_native.making import F32, LEVELS, Model, decoder, noise, steps, tokens

pytestmark = pytest.mark.native

LINE = tokens(42, 600)  # the sequence under test: three partitions, and a window that has moved on
# Cuts at odd positions leave a last position without its neighbour.
CUTS: dict[str, Sequence[int]] = {
    "in two": [300],
    "ragged": [1, 2, 19, 255, 256, 257, 512, 599],
    "token by token at the end": list(range(560, 600)),
}
STRANGERS = ((70, 90), (1, 3), (17, 0))  # tokens of the sequence before and behind, in turn


def run(executor: NativeExecutor, cuts: Sequence[int] = (), strangers: bool = False) -> F32:
    """Logits [600, vocab] of LINE, cut into steps at `cuts`, alone or between two strangers."""
    parts, begin = [], 0
    for number, end in enumerate([*cuts, len(LINE)]):
        chunks, at = [(LINE[begin:end], begin)], 0
        if strangers:
            before, behind = STRANGERS[number % len(STRANGERS)]
            chunks, at = [(tokens(number, before), 0), *chunks, (tokens(50 + number, behind), 0)], before
        step = steps(executor.programs, chunks, blocks_each=40)
        parts.append(executor.run("step", step)["logits"][at : at + end - begin].copy())
        begin = end
    return np.concatenate(parts)


def same(a: F32, b: F32) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def quantised() -> Model:
    """The decoder with q8 and q4 matrices and int8 activations."""
    plain = decoder(hidden=64, ffn=96)
    weights: dict[str, Weight] = {}
    for i, (name, weight) in enumerate(plain.weights.items()):
        matrix = isinstance(weight, Packed)
        weights[name] = quantize(weight.dequantize(), "q8" if i % 2 else "q4") if isinstance(weight, Packed) else weight
        assert matrix == isinstance(weights[name], Packed)
    formats = {name: weight.format for name, weight in weights.items() if isinstance(weight, Packed)}
    return Model(quantize_activations(plain.programs, formats), weights)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kv_dtype", KV_TYPES)
def test_alone_batched_chunked_and_threaded_are_one(level: str, kv_dtype: str) -> None:
    model = decoder()
    expected = run(model.native(threads=1, isa=level, kv_dtype=kv_dtype))
    assert np.isfinite(expected).all()
    for cuts in CUTS.values():
        assert same(run(model.native(threads=1, isa=level, kv_dtype=kv_dtype), cuts), expected), cuts
    assert same(run(model.native(threads=1, isa=level, kv_dtype=kv_dtype), CUTS["ragged"], strangers=True), expected)
    for threads in (2, 3, 4):
        assert same(run(model.native(threads=threads, isa=level, kv_dtype=kv_dtype), strangers=True), expected), threads
        assert same(run(model.native(threads=threads, isa=level, kv_dtype=kv_dtype), CUTS["ragged"]), expected), threads


@pytest.mark.parametrize("level", LEVELS)
def test_quantised_bits_too(level: str) -> None:
    model = quantised()
    expected = run(model.native(threads=1, isa=level))
    assert same(run(model.native(threads=3, isa=level), CUTS["ragged"], strangers=True), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_gate_and_up_of_many_rows_are_one_op_with_the_bits_of_three(level: str) -> None:
    executor = quantised().native(threads=2, isa=level)
    kinds = [op.kind for op in executor.programs.programs["step"].ops]
    glu = [i for i, kind in enumerate(kinds) if kind == "glu"]
    logits, times = {}, {}
    for rows in (8, 9, 200):  # up to eight rows they run one after the other
        executor.op_seconds("step")
        chunks = [(LINE[at : at + rows], at) for at in range(0, 200, rows)]
        parts = [
            executor.run("step", steps(executor.programs, [chunk], blocks_each=40))["logits"].copy() for chunk in chunks
        ]
        logits[rows], times[rows] = np.concatenate(parts)[:200], executor.op_seconds("step")
    assert same(logits[8], logits[200])
    assert same(logits[9], logits[200])
    assert all(times[8][i] > 0 for i in glu)
    assert not any(times[200][i] > 0 for i in glu)
    assert all(times[200][i - 1] > 0 for i in glu)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kv_dtype", ["f32", "bf16", "int4"])
def test_stale_memory_is_never_touched(level: str, kv_dtype: str) -> None:
    """NaN in every block beforehand changes nothing: what a row may not see is not multiplied."""
    model = decoder()
    expected = run(model.native(isa=level, kv_dtype=kv_dtype))
    poisoned = model.native(isa=level, kv_dtype=kv_dtype)
    for group in poisoned.programs.groups:
        ids = np.arange(160, dtype=np.int32)
        poisoned.write_blocks(group.name, ids, np.full_like(poisoned.read_blocks(group.name, ids), 0xFF))
    assert same(run(poisoned, CUTS["ragged"]), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_static_blocks_beside_a_window_too(level: str, kv_dtype: str) -> None:
    model = decoder(windows=(40, 40), window_sink=32, window_stride=5)
    expected = run(model.native(threads=1, isa=level, kv_dtype=kv_dtype))
    for cuts in CUTS.values():
        assert same(run(model.native(threads=1, isa=level, kv_dtype=kv_dtype), cuts), expected), cuts
    for threads in (2, 3):
        assert same(run(model.native(threads=threads, isa=level, kv_dtype=kv_dtype), strangers=True), expected), threads


@pytest.mark.parametrize("kv_dtype", ["f16", "bf16", "int4"])
def test_blocks_are_copied_saved_and_restored(kv_dtype: str) -> None:
    """A sequence goes on from copied or restored blocks with the same bits."""
    model = decoder()
    executor = model.native(kv_dtype=kv_dtype)
    expected = run(executor)[400:]
    names = [group.name for group in executor.programs.groups]
    ids = np.arange(40, dtype=np.int32)
    moved = ids + 40
    for name in names:
        executor.copy_blocks(name, ids, moved)
    other = model.native(kv_dtype=kv_dtype)
    for name in names:
        other.write_blocks(name, moved, executor.read_blocks(name, ids))
    for taker in (executor, other):
        step = steps(taker.programs, [([], 0), (LINE[400:], 400)], blocks_each=40)
        assert same(taker.run("step", step)["logits"], expected)


def test_many_threads_on_few_processors() -> None:
    """Sixteen threads give the bits of one."""
    model = decoder(seed=3)
    expected = run(model.native(threads=1), CUTS["in two"])
    assert same(run(model.native(threads=16), CUTS["in two"]), expected)


def test_noise_differs_between_seeds() -> None:
    """The comparison above could fail: other weights give other bits."""
    assert not same(noise(1, 4, 4), noise(2, 4, 4))
    assert not same(run(decoder(seed=0).native()), run(decoder(seed=7).native()))
