"""ONNX exports run by onnxruntime: the logits of the original, for every operation that has a form."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest

from inhouse.core.errors import UnavailableError, UnsupportedError
from inhouse.load.export import export_model
from tests.families.parity import PROMPT, TransformersOracle, transformers_oracle, worst
from tests.families.shapes import SHAPE

pytestmark = [pytest.mark.native, pytest.mark.torch]


def onnx_logits(path: Path, batch: int = 1) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ids = np.tile(np.array(PROMPT, np.int64), (batch, 1))
    (found,) = session.run(["logits"], {"input_ids": ids})
    return np.asarray(found)


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("LlamaForCausalLM", "LlamaConfig", {}),
    ("Qwen2ForCausalLM", "Qwen2Config", {}),
    ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 16}),
    ("MistralForCausalLM", "MistralConfig", {"sliding_window": 8}),
    ("BloomForCausalLM", "BloomConfig", {"hidden_size": 48, "n_layer": 2, "n_head": 6, "vocab_size": 97}),
    ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 48, "n_layer": 2, "n_head": 6, "vocab_size": 97, "n_positions": 64}),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", {"rotary_pct": 0.5}),
    ("GPTJForCausalLM", "GPTJConfig", {
        "n_embd": 48, "n_layer": 2, "n_head": 6, "vocab_size": 97, "n_positions": 64, "rotary_dim": 4,
    }),
    ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
]  # fmt: skip


@pytest.mark.parametrize(("model", "config", "more"), CASES, ids=[case[0] for case in CASES])
def test_onnxruntime_gives_the_logits_of_the_original(
    tmp_path: Path, model: str, config: str, more: dict[str, Any]
) -> None:
    known = json.loads(json.dumps(SHAPE)) if "n_embd" not in more and "n_layer" not in more else {}
    oracle = transformers_oracle(model, config, known | more)
    oracle.save(tmp_path / "in")
    try:
        export_model(str(tmp_path / "in"), "onnx", tmp_path / "out.onnx")
    except UnsupportedError as error:
        if "unknown architecture" in error.message:
            pytest.skip(f"{model} is not among the families yet")
        raise
    onnx.checker.check_model(tmp_path / "out.onnx")
    found = onnx_logits(tmp_path / "out.onnx", batch=2)
    assert worst(found[0], oracle.logits(PROMPT)) < 1e-4
    assert np.allclose(found[0], found[1], atol=1e-5)


def test_large_weights_lie_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle: TransformersOracle = transformers_oracle("LlamaForCausalLM", "LlamaConfig", SHAPE)
    oracle.save(tmp_path / "in")
    monkeypatch.setattr("inhouse.load.export_onnx.INLINE_BYTES", 1000)
    report = export_model(str(tmp_path / "in"), "onnx", tmp_path / "out.onnx")
    side = tmp_path / "out.onnx.data"
    assert side.stat().st_size > 4 * 97 * SHAPE["hidden_size"]
    assert report.nbytes == side.stat().st_size + (tmp_path / "out.onnx").stat().st_size
    assert worst(onnx_logits(tmp_path / "out.onnx")[0], oracle.logits(PROMPT)) < 1e-4


def test_without_the_package_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inhouse.load.export_onnx.onnx", None)
    with pytest.raises(UnavailableError, match="onnx is not installed"):
        export_model("demo", "onnx", tmp_path / "out.onnx")
    assert list(tmp_path.glob("*.onnx")) == []
    shutil.rmtree(tmp_path / "inhouse-home", ignore_errors=True)
