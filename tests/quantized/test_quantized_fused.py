"""Quantised matrices that hold several weights (GPT-2's c_attn, which as floats lies transposed; Phi-3's qkv and
gate_up): their rows are taken from the codes, and every weight of one matrix has its column order."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from inhouse.runtime.packed import Packed
from tests.families.parity import compare, open_tiny, transformers_oracle
from tests.families.shapes import SHAPE
from tests.quantized import packers
from tests.quantized.folders import tensors

pytestmark = [pytest.mark.torch, pytest.mark.native]

GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 96}
PHI3 = SHAPE | {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...], bool]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, ("c_attn", "c_fc", "c_proj"), True),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", PHI3, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), False),
}


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_rows_of_a_fused_matrix_are_taken_from_its_codes(case: str, act: bool, tmp_path: Path) -> None:
    model, config, settings, linears, transposed = CASES[case]
    oracle = transformers_oracle(model, config, settings)
    oracle.save(tmp_path)
    state: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    rng = np.random.default_rng(0)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        prefix, _, last = name.rpartition(".")
        if last != "weight" or prefix.rpartition(".")[2] not in linears:
            state[name] = tensor
            continue
        weights = (tensor.T if transposed else tensor).numpy()
        order = rng.permutation(weights.shape[1]) if act else None
        codes, scales, zeros = packers.round_to(weights, 4, 32, symmetric=False, kind="f16", order=order)
        zeros = np.maximum(zeros, 1)
        arrays = packers.gptq(codes, scales, zeros, 4, 32, order=order)
        state |= {f"{prefix}.{suffix}": value for suffix, value in tensors(arrays).items()}
        whole = torch.from_numpy(packers.values(codes, scales, zeros, 32, order))
        meant[name] = whole.T.contiguous() if transposed else whole
    missing = oracle.model.load_state_dict(meant, strict=False)
    assert not missing.unexpected_keys
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    said = json.loads((tmp_path / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": act}
    (tmp_path / "config.json").write_text(json.dumps(said))
    tiny = open_tiny(tmp_path, fmt="gptq", activations="float")
    formats = {weight.format for weight in tiny.weights.values() if isinstance(weight, Packed)}
    assert formats == {"f32", "u4_g32"}
    compare(tiny, oracle)
