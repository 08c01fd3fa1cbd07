"""Every op on the native executor against the torch executor running the same program, at every level."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import pytest

from inhouse.model.rewrite import quantize_activations
from inhouse.runtime.ops import ACTIVATIONS, OPS, POOLINGS, Builder
from inhouse.runtime.packed import Packed, pack_float, quantize
from inhouse.runtime.program import Attr, ProgramSet, WeightSpec
from tests.runtime_native.making import CONTEXT, LEVELS, VOCAB, Model, OneOp, decoder, noise, steps, tokens, worst

pytestmark = [pytest.mark.native, pytest.mark.torch]


def _norm(kind: str, width: int, heads: int = 1, offset: float = 0.0, bias: bool = True) -> Model:
    one = OneOp()
    names = [one.vector("w", noise(1, width // heads))]
    if kind == "rms_norm":
        return one.build(kind, [width], names, {"eps": 1e-5, "heads": heads, "offset": offset})
    names.append(one.vector("b", noise(2, width)) if bias else "")
    return one.build(kind, [width], names, {"eps": 1e-5}, spread=3.0)


def _linears(width: int, outs: tuple[int, ...], bias: bool) -> Model:
    one = OneOp()
    names = [one.matrix(f"w{i}", noise(i, out, width, scale=width**-0.5)) for i, out in enumerate(outs)]
    names += [one.vector(f"b{i}", noise(9 + i, out)) if bias else "" for i, out in enumerate(outs)]
    return one.build("linears", [width], names)


def _plain(kind: str, widths: Sequence[int], spread: float = 1.0, **attrs: Attr) -> Model:
    return OneOp().build(kind, widths, attrs=attrs, spread=spread)


def _rope(rotary: int, interleaved: bool = False) -> Model:
    return OneOp().build("rope", [96], attrs={"head_dim": 32, "interleaved": interleaved}, rotary=rotary)


CASES: dict[str, Callable[[], Model]] = {
    "rms_norm-heads": partial(_norm, "rms_norm", 120, heads=5, offset=1.0),
    "layer_norm-plain": partial(_norm, "layer_norm", 40, bias=False),
    "linears-plain": partial(_linears, 64, (96,), bias=False),
    "scale": partial(_plain, "scale", [40], by=0.37),
    "soft_cap": partial(_plain, "soft_cap", [40], 40.0, cap=30.0),
    "select_rows": partial(_plain, "select_rows", [40]),
    "rope-half": partial(_rope, 32),
    "rope-part": partial(_rope, 20),
    "rope-pairs": partial(_rope, 32, interleaved=True),
}
for _width in (1, 7, 16, 40, 96):
    CASES[f"rms_norm-{_width}"] = partial(_norm, "rms_norm", _width)
    CASES[f"layer_norm-{_width}"] = partial(_norm, "layer_norm", _width)
    CASES[f"add-{_width}"] = partial(_plain, "add", [_width, _width])
    CASES[f"mul-{_width}"] = partial(_plain, "mul", [_width, _width])
    CASES[f"linears-{_width}"] = partial(_linears, _width, (5, 16, 33), bias=True)
for _name in ACTIVATIONS:
    CASES[f"act-{_name}"] = partial(_plain, "act", [40], 3.0, act=_name)
    CASES[f"glu-{_name}"] = partial(_plain, "glu", [40, 40], 2.0, act=_name)
for _mode in POOLINGS:
    CASES[f"pool-{_mode}"] = partial(_plain, "pool", [40], mode=_mode, normalize=False)
    CASES[f"pool-{_mode}-unit"] = partial(_plain, "pool", [40], mode=_mode, normalize=True)


@pytest.mark.parametrize("case", CASES)
def test_op_agrees_with_torch(case: str) -> None:
    model = CASES[case]()
    kind = model.programs.programs["step"].ops[-1].kind
    step = steps(model.programs, [(tokens(1, 30), 3), (tokens(2, 1), 900), (tokens(3, 5), 0)], blocks_each=64)
    expected = model.torch().run("step", step)
    for level in LEVELS:
        found = model.native(isa=level, threads=2).run("step", step)
        assert found.keys() == expected.keys()
        for role in expected:
            assert found[role].shape == expected[role].shape
            assert worst(found[role], expected[role]) <= OPS[kind].tolerance, (level, role)


def test_rotary_is_right_at_far_positions() -> None:
    freq = (np.float32(5e5) ** -(np.arange(64, dtype=np.float32) / 64)).astype(np.float32)
    builder = Builder("step", {"const.f": WeightSpec("const.f", (64,), "vector")})
    program = builder.finish(out=builder.one("rotary", weights=["const.f"], factor=1.3))
    programs = ProgramSet({"step": program}, {}, (), VOCAB, 1 << 20, {"const.f": freq})
    chunks = [([0] * 3, first) for first in (0, 1000, 99_999, (1 << 20) - 3)]
    step = steps(programs, chunks, blocks_each=1 << 16)
    angle = step.positions[:, None].astype(np.float64) * freq.astype(np.float64)
    exact = np.concatenate([np.cos(angle), np.sin(angle)], 1) * 1.3
    for level in LEVELS:
        found = Model(programs, {}).native(isa=level).run("step", step)["out"]
        assert np.abs(found - exact).max() < 2e-7


def _kind(name: str) -> Literal["q8", "q4"]:
    return "q8" if name == "q8" else "q4"


@pytest.mark.parametrize("source", ["tokens", "positions", "types"])
@pytest.mark.parametrize("packing", ["f32", "f16", "bf16", "q8", "q4"])
def test_embedding_is_gathered_exactly(source: str, packing: str) -> None:
    rows = {"tokens": VOCAB, "positions": CONTEXT, "types": 1}[source] + 2
    table = noise(1, rows, 64)
    packed = pack_float(table, packing) if packing in ("f32", "f16", "bf16") else quantize(table, _kind(packing))
    builder = Builder("step", {"table": WeightSpec("table", table.shape, "embedding")})
    out = builder.one("embed", weights=["table"], source=source, offset=2, scale=0.5)
    programs = ProgramSet(
        {"step": builder.finish(out=out)}, {"table": WeightSpec("table", table.shape, "embedding")}, (), VOCAB, CONTEXT
    )
    step = steps(programs, [(tokens(1, 40), 7), (tokens(2, 3), 1000)], blocks_each=64)
    ids = {"tokens": step.tokens, "positions": step.positions, "types": 0 * step.tokens}[source] + 2
    for level in LEVELS:
        found = Model(programs, {"table": packed}).native(isa=level).run("step", step)["out"]
        np.testing.assert_array_equal(found, packed.dequantize()[ids] * np.float32(0.5))


@pytest.mark.parametrize(("kind", "width"), [("q8", 96), ("q4", 96), ("q4", 768)])
def test_quantised_linears_agree_with_torch(kind: str, width: int) -> None:
    """Both executors multiply the same int8 activations: only float rounding of the sums is left."""
    one = OneOp()
    names = [one.packed(f"w{i}", quantize(noise(i, out, width), _kind(kind))) for i, out in enumerate((5, 48))]
    model = one.build("linears", [width], [*names, "", one.vector("b", noise(7, 48))])
    formats = {n: w.format for n, w in model.weights.items() if isinstance(w, Packed) and n in names}
    model = Model(quantize_activations(model.programs, formats), model.weights)
    made = [op.attrs["powers"] for op in model.programs.programs["step"].ops if op.kind == "quantize_rows"]
    assert made == [width >= 768]
    step = steps(model.programs, [(tokens(1, 40), 0)], blocks_each=64)
    expected = model.torch().run("step", step)
    for level in LEVELS:
        found = model.native(isa=level).run("step", step)
        for role in expected:
            assert worst(found[role], expected[role]) <= OPS["linears"].tolerance, level


def test_narrow_linears_agree_with_torch_and_with_every_count_of_rows() -> None:
    """bf16 weights times inputs rounded to bf16: a difference of one rounding would be 200 times the tolerance."""
    one = OneOp()
    names = [one.packed(f"w{i}", pack_float(noise(i, out, 772), "bf16")) for i, out in enumerate((5, 48))]
    model = one.build("linears", [772], [*names, "", one.vector("b", noise(7, 48))])
    model = Model(quantize_activations(model.programs, dict.fromkeys(names, "bf16")), model.weights)
    assert [op.attrs["narrow"] for op in model.programs.programs["step"].ops if op.kind == "linears"] == [True]
    step = steps(model.programs, [(tokens(1, 40), 0)], blocks_each=64)
    expected = model.torch().run("step", step)
    for level in LEVELS:
        native = model.native(isa=level)
        found = native.run("step", step)
        single = native.run("step", steps(model.programs, [(tokens(1, 40)[:1], 0)], blocks_each=64))
        for role in expected:
            assert worst(found[role], expected[role]) <= OPS["linears"].tolerance, level
            np.testing.assert_array_equal(found[role][:1], single[role])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("program", ["step", "embed"])
def test_whole_decoder_agrees_with_torch(tied: bool, program: str) -> None:
    """Over several steps with paged state, in f32."""
    model = decoder(tied=tied, qkv_bias=True, o_bias=True, mlp_bias=True)
    torch = model.torch(kv_dtype="f32")
    natives = [model.native(isa=level, kv_dtype="f32") for level in LEVELS]
    lines = [tokens(n, 150) for n in range(3)]
    for begin, end in ((0, 60), (60, 149), (149, 150)):
        step = steps(model.programs, [(line[begin:end], begin) for line in lines])
        expected = torch.run(program, step)
        for native in natives:
            found = native.run(program, step)
            for role in expected:
                assert worst(found[role], expected[role]) < 2e-5, (native.name, role)


def test_an_empty_step_gives_empty_outputs() -> None:
    model = decoder()
    step = steps(model.programs, [])
    out = model.native().run("step", step)
    assert out["logits"].shape == (0, VOCAB)
