"""Quantised checkpoints as whole models: both executors against transformers on the weights that the file means, and
with int8 activations against each other; batched bits are those alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from inhouse.load.importer import verify_model
from inhouse.runtime.program import Program
from tests.families.parity import PROMPT, TransformersOracle, check_batched, compare, open_tiny, run, worst
from tests.quantized.folders import write_folder
from tests.quantized.packers import F32
from tests.quantized.schemes import CASES

pytestmark = [pytest.mark.torch, pytest.mark.native, pytest.mark.realdata]

WHOLE = (
    "gptq-2bit-g32-asym", "gptq-3bit-g64-sym", "gptq-4bit-g32-asym", "gptq-4bit-g64-sym", "gptq-4bit-g128-asym",
    "gptq-8bit-g-1-sym", "gptq-4bit-g48-asym", "gptq-4bit-g32-act", "gptq-3bit-g32-act-unlike", "gptq-8bit-g32-act",
    "awq-gemm-g32", "awq-gemv-row", "ct-4bit-g64-asym", "ct-5bit-g32-sym", "ct-8bit-g0-sym", "ct-4bit-act", "ct-w8a8",
    "ct-fp8-channel", "fp8-block", "fp8-tensor", "fp8-channel-e5m2",
    "ct-nvfp4", "ct-mxfp4", "bnb-nf4", "bnb-fp4-nested", "bnb-int8",
)  # fmt: skip
INTEGER = ("gptq-4bit-g32-act", "gptq-3bit-g32-act-unlike", "gptq-8bit-g64-sym", "awq-gemm-g32", "ct-w8a8")


def original(stories: Path, meant: dict[str, F32]) -> TransformersOracle:
    """transformers' own Llama on the values that the file means."""
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(**json.loads((stories / "hf" / "config.json").read_text()))
    config.tie_word_embeddings = False
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config)
    model.train(False)
    state = {name: torch.from_numpy(np.array(value)) for name, value in meant.items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    return TransformersOracle(model)


@pytest.mark.parametrize("name", WHOLE)
def test_logits_with_float_activations(stories: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    meant = write_folder(stories, tmp_path / "model", case.config, case.writer, skip=case.skip)
    tiny = open_tiny(tmp_path / "model", fmt=name, activations="float")
    compare(tiny, original(stories, meant))


@pytest.mark.parametrize("name", INTEGER)
def test_int8_activations(stories: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    meant = write_folder(stories, tmp_path / "model", case.config, case.writer, skip=case.skip)
    tiny = open_tiny(tmp_path / "model", fmt=name)
    found = {}
    for executor in ("native", "torch"):
        made = tiny.executor(executor)
        found[executor] = run(made, [(PROMPT, 0, 0)])
        check_batched(made, found[executor], PROMPT)
        made.close()
    # An activation at the edge of rounding falls either way, and the tokens after it follow: the rows
    # before the first such one agree closely.
    errors = np.abs(found["native"] - found["torch"]).max(axis=1) / np.abs(found["torch"]).max()
    assert np.quantile(errors, 0.2) < 1e-4
    assert errors.max() < 3e-2
    # Rounding activations to 8 bits moves the logits a little, and no more than that.
    assert worst(found["native"], original(stories, meant).logits(PROMPT)) < 0.1


def kinds(program: Program, kind: str) -> list[dict[str, object]]:
    return [dict(op.attrs) for op in program.ops if op.kind == kind]


def test_activations_of_w8a8_have_one_scale_a_token(stories: Path, tmp_path: Path) -> None:
    case = CASES["ct-w8a8"]()
    write_folder(stories, tmp_path / "model", case.config, case.writer)
    program = open_tiny(tmp_path / "model").programs.programs["step"]
    assert {op.outputs[0].group == op.inputs[0].width for op in program.ops if op.kind == "quantize_rows"} == {True}


def test_linears_of_one_order_share_their_input(stories: Path, tmp_path: Path) -> None:
    """q, k and v of one act-order: one reordering for three; of unlike orders: one each."""
    for name, each in (("gptq-4bit-g32-act", 4), ("gptq-8bit-g32-act", 7)):
        case = CASES[name]()
        write_folder(stories, tmp_path / name, case.config, case.writer)
        program = open_tiny(tmp_path / name).programs.programs["step"]
        assert len(kinds(program, "select_columns")) == 5 * each, program.format()


def test_a_whole_import_reads_it(stories: Path, tmp_path: Path) -> None:
    case = CASES["fp8-tensor"]()
    write_folder(stories, tmp_path / "model", case.config, case.writer)
    verified = verify_model(tmp_path / "model")
    verified.described.source.close()
    assert any("35 static scales of activations" in note for note in verified.notes)
