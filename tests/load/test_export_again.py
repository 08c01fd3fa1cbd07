"""Integer forms that we wrote, opened by our own readers of them, and written once more."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from inhouse.load.export import export_model
from inhouse.model.build import build
from inhouse.runtime.packed import Packed
from inhouse.store.source import open_source
from tests.families.parity import PROMPT, TransformersOracle, open_tiny, run, worst

from .test_export import llama as llama
from .test_export import logits, set_eval

pytestmark = [pytest.mark.native, pytest.mark.torch]
CASES = [("gptq", "q4_0"), ("awq", "q4_0"), ("compressed-tensors", "q4_0"), ("gptq", "q8_0"),
         ("compressed-tensors", "q8_0")]  # fmt: skip


@pytest.mark.parametrize(("form", "kind"), CASES)
def test_a_gguf_in_another_form_gives_the_same_logits(
    llama: tuple[Path, TransformersOracle], tmp_path: Path, form: str, kind: str
) -> None:
    export_model(str(llama[0]), "gguf", tmp_path / "in.gguf", wish=kind)
    export_model(str(tmp_path / "in.gguf"), form, tmp_path / "out")
    assert worst(logits(tmp_path / "out"), logits(tmp_path / "in.gguf")) < 2e-3  # embedding and head become F16
    tiny = open_tiny(tmp_path / "out")
    linears = [w for name, w in tiny.weights.items() if isinstance(w, Packed) and name.startswith("layers.")]
    assert {weight.format[1:3] for weight in linears} == {f"{kind[1]}_"}


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed-tensors"])
def test_fresh_roundings_open_and_go_out_again_unchanged(
    llama: tuple[Path, TransformersOracle], tmp_path: Path, form: str
) -> None:
    export_model(str(llama[0]), form, tmp_path / "one")
    report = export_model(str(tmp_path / "one"), form, tmp_path / "two")
    assert all(tensor.exact for tensor in report.tensors)
    first, second = open_source(tmp_path / "one"), open_source(tmp_path / "two")
    assert list(first) == list(second)
    assert all(np.array_equal(first.raw(name), second.raw(name)) for name in first)
    served, plain = (run_on(tmp_path / "one", name) for name in ("native", "torch"))
    assert worst(served, plain) < 1e-4


@pytest.mark.parametrize("kind", ["", "q4_0", "q8_0"])
def test_transformers_reads_compressed_tensors(
    llama: tuple[Path, TransformersOracle], tmp_path: Path, kind: str
) -> None:
    """Fresh roundings have zero points, which transformers 5 opens only with `dequantize`."""
    base = llama[0]
    if kind:
        base = tmp_path / "in.gguf"
        export_model(str(llama[0]), "gguf", base, wish=kind)
    export_model(str(base), "compressed-tensors", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["symmetric"] == bool(kind)
    how = {} if kind else {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **how)
    assert worst(logits(tmp_path / "out"), TransformersOracle(set_eval(model)).logits(PROMPT)) < 2e-3


def test_codes_are_kept_beside_linears_that_fit_nowhere(stories: Path, tmp_path: Path) -> None:
    """172 inputs are no groups: those linears are F16 in the GGUF already."""
    for form in ("gptq", "awq", "compressed-tensors"):
        report = export_model(str(stories / "stories260K-Q4_0.gguf"), form, tmp_path / form)
        coded = [tensor for tensor in report.tensors if form in tensor.became]
        assert len(coded) == 20
        assert all(tensor.exact and tensor.became.endswith("int4 g32") for tensor in coded)
    config = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert config["sym"] is True


def run_on(path: Path, executor: str) -> np.ndarray:
    tiny = open_tiny(path)
    made = replace(tiny, programs=build(tiny.spec)).executor(executor)
    out = run(made, [(PROMPT, 0, 0)])
    made.close()
    return out
