"""Mixtures of experts and matrices by head on the native executor: against torch, and the promise that a token's bits
do not depend on which others are in the batch, on threads, or on how many rows an expert happens to have."""

from dataclasses import replace

import numpy as np
import pytest

from inhouse.core.errors import UnsupportedError
from inhouse.model.moe import moe_block, moe_weights
from inhouse.model.rewrite import quantize_activations
from inhouse.model.spec_parts import MoeSpec
from inhouse.runtime.executor import Weight
from inhouse.runtime.ops import OPS, Builder
from inhouse.runtime.packed import pack_float, quantize
from inhouse.runtime.program import ProgramSet, WeightSpec
from tests.runtime_native.making import CONTEXT, F32, LEVELS, VOCAB, Model, OneOp, noise, steps, tokens, worst

pytestmark = pytest.mark.native
HIDDEN = 64
SPECS = {
    "softmax": MoeSpec((0,), experts=8, top_k=2, ffn=96, shared_ffn=32, shared_gate=True),
    "unnormalised": MoeSpec((0,), experts=5, top_k=3, ffn=40, normalize=False, scale=2.5),
    "sigmoid": MoeSpec(
        (0,), experts=16, top_k=5, ffn=32, scoring="sigmoid", scale=2.5, groups=4, top_groups=2, group_score="top2",
        correction=True, shared_ffn=32,
    ),
    "groups": MoeSpec((0,), experts=12, top_k=3, ffn=32, normalize=False, groups=6, top_groups=2),
    "gpt-oss": MoeSpec(
        (0,), experts=6, top_k=4, ffn=48, scoring="softmax_after", router_bias=True, expert_bias=True,
        activation="quick_gelu", limit=1.5, offset=1.0,
    ),
    "sparsemixer": MoeSpec((0,), experts=9, top_k=2, ffn=33, scoring="sparsemixer", jitter=0.1),
    "every expert": MoeSpec((0,), experts=3, top_k=3, ffn=32),
    "one of many": MoeSpec((0,), experts=130, top_k=1, ffn=32, normalize=False),
}  # fmt: skip


def packed(array: F32, form: str) -> Weight:
    if form in ("q8", "q4"):
        shape = (array.shape[0], array.shape[1])
        return quantize([array], form, shape=shape)  # type: ignore[arg-type]
    return pack_float(array, form)


def block(moe: MoeSpec, form: str = "f32", activations: str = "int8") -> Model:
    """Tokens embedded, then one mixture; its experts in `form`. The output of every token is an output."""
    specs = {"table": WeightSpec("table", (VOCAB, HIDDEN), "embedding")}
    specs |= {weight.name: weight for weight in moe_weights(moe, 0, HIDDEN)}
    weights: dict[str, Weight] = {}
    for i, (name, spec) in enumerate(specs.items()):
        array = noise(i, *spec.shape, scale=0.4 if ".experts." in name or ".shared." in name else 1.0)
        is_expert = ".experts." in name or ".shared." in name
        weights[name] = array if spec.kind == "vector" else packed(array, form if is_expert else "f32")
    builder = Builder("step", specs)
    x = builder.one("embed", weights=["table"])
    builder.layer = 0
    program = builder.finish(out=moe_block(builder, moe, 0, x))
    programs = ProgramSet({"step": program}, specs, (), VOCAB, CONTEXT)
    if activations == "int8":
        names = {"q8": "q8_0", "q4": "q4_0"}
        programs = quantize_activations(
            programs,
            {n: names.get(form, form) for n in specs if ".weight" in n and (".experts." in n or ".shared." in n)},
        )
    return Model(programs, weights)


def run(model: Model, ids: list[int], **options: object) -> F32:
    executor = model.native(**options)  # type: ignore[arg-type]
    return executor.run("step", steps(model.programs, [(ids, 0)]))["out"].copy()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", list(SPECS))
def test_every_way_to_route_agrees_with_torch(name: str, level: str) -> None:
    model = block(SPECS[name])
    step = steps(model.programs, [(list(range(VOCAB)), 0)])
    expected = model.torch().run("step", step)["out"]
    assert worst(run(model, list(range(VOCAB)), isa=level), expected) < OPS["expert_linears"].tolerance


@pytest.mark.parametrize("form", ["f16", "bf16", "q8", "q4"])
@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("name", ["softmax", "gpt-oss"])
def test_experts_of_every_kind_of_format(name: str, form: str, activations: str) -> None:
    model = block(replace(SPECS[name], ffn=64), form, activations)
    kinds = [op.kind for op in model.programs.programs["step"].ops]
    assert ("quantize_rows" in kinds) == (activations == "int8" and form in ("q8", "q4"))
    step = steps(model.programs, [(list(range(VOCAB)), 0)])
    expected = model.torch().run("step", step)["out"]
    assert worst(run(model, list(range(VOCAB))), expected) < 1e-4  # a code at the edge of rounding may fall either way


@pytest.mark.parametrize("form", ["f32", "q4"])
@pytest.mark.parametrize("name", ["softmax", "sigmoid", "gpt-oss"])
def test_a_token_alone_has_the_bits_it_has_among_others(name: str, form: str) -> None:
    model = block(replace(SPECS[name], ffn=64), form)
    together = run(model, list(range(VOCAB)), threads=1)
    for token in range(0, VOCAB, 9):
        np.testing.assert_array_equal(run(model, [token], threads=1)[0], together[token])
    many = tokens(3, 300)
    for threads in (1, 2, 5):
        np.testing.assert_array_equal(run(model, many, threads=threads), together[many])


def test_no_rows_are_no_trouble() -> None:
    model = block(SPECS["softmax"])
    assert model.native().run("step", steps(model.programs, []))["out"].shape == (0, HIDDEN)


def test_ties_go_to_the_lower_expert() -> None:
    model = block(replace(SPECS["every expert"], top_k=1))
    weights = dict(model.weights) | {"layers.0.moe.router.weight": pack_float(np.zeros((3, HIDDEN), np.float32), "f32")}
    tied = Model(model.programs, weights)
    only = {
        name: pack_float(np.zeros(spec.shape, np.float32), "f32")
        for name, spec in model.programs.weights.items()
        if ".experts.1." in name or ".experts.2." in name
    }
    np.testing.assert_array_equal(run(tied, [1, 2, 3]), run(Model(model.programs, weights | only), [1, 2, 3]))
    assert np.abs(run(tied, [1])).max() > 0


def test_a_nan_router_harms_nobody_else() -> None:
    model = block(SPECS["softmax"])
    table = noise(0, VOCAB, HIDDEN)
    clean = run(model, [0, 1, 2])
    table[1] = np.nan
    harmed = Model(model.programs, dict(model.weights) | {"table": pack_float(table, "f32")})
    found = run(harmed, [0, 1, 2])
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("level", LEVELS)
def test_heads_have_matrices_of_their_own(level: str) -> None:
    one = OneOp(3)
    model = one.build("head_linears", [3 * 24], [one.matrix("w", noise(7, 3 * 32, 24))], {"heads": 3})
    step = steps(model.programs, [(tokens(1, 70), 0)])
    found = model.native(isa=level).run("step", step)["out0"]
    assert worst(found, model.torch().run("step", step)["out0"]) < OPS["head_linears"].tolerance


def test_heads_take_quantised_rows() -> None:
    one = OneOp(3)
    weight = quantize([noise(7, 4 * 16, 64)], "q8", shape=(64, 64))
    plain = one.build("head_linears", [4 * 64], [one.packed("w", weight)], {"heads": 4})
    model = Model(quantize_activations(plain.programs, {"w": "q8_0"}), plain.weights)
    assert [op.kind for op in model.programs.programs["step"].ops][-2:] == ["quantize_rows", "head_linears"]
    step = steps(model.programs, [(tokens(1, 20), 0)])
    found = model.native().run("step", step)["out0"].copy()
    assert worst(found, model.torch().run("step", step)["out0"]) < 2e-5
    for i in (0, 7):
        alone = model.native().run("step", steps(model.programs, [(tokens(1, 20)[i : i + 1], 0)]))["out0"]
        np.testing.assert_array_equal(alone[0], found[i])


def test_heads_that_do_not_fill_tiles_are_refused() -> None:
    one = OneOp(3)
    model = one.build("head_linears", [3 * 24], [one.matrix("w", noise(7, 3 * 20, 24))], {"heads": 3})
    with pytest.raises(UnsupportedError, match="20 outputs a head"):
        model.native()


@pytest.mark.parametrize(
    ("kind", "widths", "attrs"),
    [
        ("concat", [3 * 5, 3 * 4], {"heads": 3}),
        ("scale_rows", [37, 1], {}),
        ("glu", [37, 37], {"act": "quick_gelu", "limit": 0.7, "offset": 1.0}),
        ("glu", [37, 37], {"act": "gelu", "offset": 1.0}),
    ],
)
def test_rows_joined_scaled_and_gated(kind: str, widths: list[int], attrs: dict[str, object]) -> None:
    model = OneOp(5).build(kind, widths, attrs=attrs)  # type: ignore[arg-type]
    step = steps(model.programs, [(tokens(2, 40), 0)])
    expected = model.torch().run("step", step)["out0"]
    for level in LEVELS:
        found = model.native(isa=level).run("step", step)["out0"]
        assert worst(found, expected) <= OPS[kind].tolerance
