"""What the builder writes and what rewrites make of it."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from inhouse.core.errors import UnsupportedError
from inhouse.model.build import build
from inhouse.model.rewrite import Rewriter, known_weights, quantize_activations
from inhouse.model.spec import ModelSpec
from inhouse.runtime.ops import Builder
from inhouse.runtime.program import DType, Op, Program, ProgramSet, StateKind, WeightSpec
from tests.model.configs import LLAMA, QWEN3, resolve

pytestmark = pytest.mark.null


def spec_of(config: dict[str, Any] = LLAMA, **changes: Any) -> ModelSpec:
    return replace(resolve(config)[0], **changes)


def formats_of(programs: ProgramSet, name: str) -> dict[str, str]:
    return {w.name: name for w in programs.weights.values() if w.kind != "vector"}


def kinds(program: Program) -> list[str]:
    return [op.kind for op in program.ops]


LAYER = ["rms_norm", "linears", "rope", "rope", "attention", "linears", "add", "rms_norm", "linears", "glu", "linears",
         "add"]  # fmt: skip


def test_the_step_of_a_llama() -> None:
    programs = build(spec_of(layers=2))
    step = programs.programs["step"]
    assert kinds(step) == ["embed", "rotary", *LAYER, *LAYER, "select_rows", "rms_norm", "linears"]
    assert {role: str(value) for role, value in step.outputs.items()} == {"logits": "%34[S, 512]"}
    assert [op.layer for op in step.ops] == [-1] * 2 + [0] * 12 + [1] * 12 + [-1] * 3
    assert step.ops[-1].weights == ("embed.weight", "")  # tied
    assert "head.weight" not in programs.weights


def test_norms_of_heads_come_before_the_rotation() -> None:
    step = build(spec_of(QWEN3, layers=1)).programs["step"]
    assert kinds(step)[3:8] == ["linears", "rms_norm", "rms_norm", "rope", "rope"]
    assert [op.attrs["heads"] for op in step.ops[4:6]] == [8, 4]


def test_every_named_weight_is_used_and_every_used_one_is_named() -> None:
    programs = build(spec_of(QWEN3, tied=False, qkv_bias=True, o_bias=True, mlp_bias=True))
    for program in programs.programs.values():
        used = {name for op in program.ops for name in op.weights if name}
        assert used - {"const.inv_freq"} == set(programs.weights) - (
            {"head.weight"} if program.name == "embed" else set()
        )


def test_windows_make_groups_of_state() -> None:
    programs = build(spec_of(windows=(0, 4, 0, 4, 4)))
    assert [(g.name, g.kind, g.layers, g.window) for g in programs.groups] == [
        ("full", StateKind.PAGED, (0, 2), 0),
        ("window4", StateKind.WINDOW, (1, 3, 4), 4),
    ]
    attention = [op for op in programs.programs["step"].ops if op.kind == "attention"]
    assert [op.attrs["window"] for op in attention] == [0, 4, 0, 4, 4]
    assert all(op.layer in programs.group(str(op.attrs["group"])).layers for op in attention)


def test_a_program_prints_one_op_a_line() -> None:
    text = build(spec_of(layers=1)).programs["step"].format()
    assert "  layer 0:\n    %2[T, 64] = rms_norm(%0, layers.0.attn_norm, eps=1e-05, heads=1)\n" in text
    assert text.endswith("  return logits: %19[S, 512]")
    assert all(len(line) <= 160 for line in text.splitlines())


def test_quantised_inputs_are_made_once_and_shared() -> None:
    programs = build(spec_of(layers=1))
    rewritten = quantize_activations(programs, formats_of(programs, "q8_0"))
    assert kinds(rewritten.programs["step"]) == [
        "embed", "rotary", "rms_norm", "quantize_rows", "linears", "rope", "rope", "attention", "quantize_rows",
        "linears", "add", "rms_norm", "quantize_rows", "linears", "glu", "quantize_rows", "linears", "add",
        "select_rows", "rms_norm", "quantize_rows", "linears",
    ]  # fmt: skip
    for op in rewritten.programs["step"].ops:
        assert op.kind != "linears" or op.inputs[0].dtype is DType.I8
    assert rewritten.weights == programs.weights


def test_float_weights_keep_float_inputs() -> None:
    programs = build(spec_of())
    assert quantize_activations(programs, formats_of(programs, "bf16")) == programs
    assert quantize_activations(programs, {}) == programs


def test_mixed_linears_are_split() -> None:
    programs = build(spec_of(layers=1, qkv_bias=True))
    formats = {"layers.0.attn.q.weight": "q4_0", "layers.0.attn.k.weight": "f16", "layers.0.attn.v.weight": "q6_k"}
    ops = quantize_activations(programs, formats).programs["step"].ops
    first, second = [op for op in ops if op.kind == "linears"][:2]
    assert [re.sub(r"layers.0.attn.", "", w) for w in first.weights] == ["q.weight", "v.weight", "q.bias", "v.bias"]
    assert [re.sub(r"layers.0.attn.", "", w) for w in second.weights] == ["k.weight", "k.bias"]
    assert (first.inputs[0].dtype, second.inputs[0].dtype) == (DType.I8, DType.F32)
    attention = next(op for op in ops if op.kind == "attention")
    rope_q, rope_k = [op for op in ops if op.kind == "rope"]
    assert rope_q.inputs[0] == first.outputs[0]
    assert rope_k.inputs[0] == second.outputs[0]
    assert attention.inputs[2] == first.outputs[1]


def rewritten_linears(width: int, *formats: str) -> Sequence[Op]:
    """Ops of one `linears` op over `width` inputs, a weight of each format, rewritten for them."""
    names = [f"w{i}" for i in range(len(formats))]
    weights = {name: WeightSpec(name, (64, width), "linear") for name in names}
    weights["table"] = WeightSpec("table", (9, width), "embedding")
    builder = Builder("step", weights)
    builder.op("linears", builder.one("embed", weights=["table"]), weights=[*names, *[""] * len(names)])
    programs = ProgramSet({"step": builder.finish()}, weights, (), 9, 8)
    return quantize_activations(programs, dict(zip(names, formats, strict=True))).programs["step"].ops


def test_wide_rows_of_narrow_weights_take_powers_of_two() -> None:
    """Where every weight of the op has at most 6 bits; formats with finer codes, or with one scale a row, do not."""

    def powers(width: int, *formats: str) -> list[bool]:
        return [bool(op.attrs["powers"]) for op in rewritten_linears(width, *formats) if op.kind == "quantize_rows"]

    assert powers(768, "q4_0", "q6_0", "u4_g128_bf16") == [True]
    assert powers(736, "q4_0") == [False]
    assert powers(1024, "q4_0", "q8_0") == [False]
    assert powers(1024, "i8_token") == [False]


def test_wide_floats_in_front_of_bf16_weights_are_narrowed() -> None:
    def narrow(width: int, *formats: str) -> list[bool]:
        return [bool(op.attrs["narrow"]) for op in rewritten_linears(width, *formats) if op.kind == "linears"]

    assert narrow(768, "bf16", "bf16") == [True]
    assert narrow(768, "bf16", "f16", "bf16") == [True, False]
    assert narrow(764, "bf16") == [False]
    assert narrow(770, "bf16") == [False]
    assert narrow(20480, "bf16") == [False]
    assert narrow(1024, "f32", "q8_0") == [False, False]


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="q9_z"):
        quantize_activations(build(spec_of()), {"embed.weight": "q9_z"})


def test_experts_of_one_format_get_quantised_rows_and_others_floats() -> None:
    weights = {n: WeightSpec(n, shape, "linear") for n, shape in
               {"router": (2, 64), "e0": (64, 64), "e1": (64, 64)}.items()}  # fmt: skip
    weights["table"] = WeightSpec("table", (9, 64), "embedding")
    builder = Builder("step", weights)
    x = builder.one("embed", weights=["table"])
    routing = builder.one("route", builder.one("linears", x, weights=["router", ""]), top_k=1)
    rows = builder.one("dispatch", x, routing)
    y = builder.one("expert_linears", rows, routing, weights=["e0", "e1", "", ""], experts=2)
    program = builder.finish(hidden=builder.one("combine", y, routing))
    programs = ProgramSet({"step": program}, weights, (), 9, 8)
    both = quantize_activations(programs, {"e0": "q8_0", "e1": "q4_0"}).programs["step"]
    assert kinds(both) == ["embed", "linears", "route", "dispatch", "quantize_rows", "expert_linears", "combine"]
    assert quantize_activations(programs, {"e0": "q8_0"}).programs["step"] == program


def test_a_rewrite_may_drop_and_add_ops() -> None:
    class Doubled(Rewriter):
        """Every residual sum is followed by a scale."""

        def rewrite(self, op: Op) -> None:
            self.copy(op)
            if op.kind == "add":
                (new,) = self._builder.op("scale", self._new[op.outputs[0].id], by=2.0)
                self.bind(op.outputs, (new,))

    programs = build(spec_of(layers=2))
    step = Doubled(programs.programs["step"], known_weights(programs)).run()
    assert kinds(step).count("scale") == 4
    assert len(step.ops) == len(programs.programs["step"].ops) + 4
