"""Latent attention of a float8 checkpoint: the heads' k is transposed for absorption, which codes cannot be, so it is
kept as the floats that they mean."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from inhouse.runtime.packed import Packed
from tests.families.parity import open_tiny
from tests.families.test_mixtures import oracle_of

pytestmark = pytest.mark.torch
NAME = "model.layers.1.self_attn.kv_b_proj.weight"
HEADS, NOPE, VALUES, RANK = 6, 16, 16, 32


def test_k_is_what_its_codes_mean(tmp_path: Path) -> None:
    _, oracle = oracle_of("deepseek_v3")
    oracle.save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    scale = torch.tensor([[0.5], [0.25]])  # of blocks of 128 by 128
    spread = scale.repeat_interleave(128, 0)[: len(state[NAME])]
    coded = (state[NAME] / spread).to(torch.float8_e4m3fn)
    save_file(state | {NAME: coded, f"{NAME}_scale_inv": scale}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    others = [n.removesuffix(".weight") for n in state if n.endswith("_proj.weight") and n != NAME]
    said = {
        "quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
        "modules_to_not_convert": others,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    tiny = open_tiny(tmp_path, fmt="FP8")
    k, v = (tiny.weights[f"layers.1.attn.{part}.weight"] for part in ("k_b", "v_b"))
    assert isinstance(k, Packed)
    assert isinstance(v, Packed)
    assert k.format == "f32"
    assert v.format.startswith("f8")
    meant = (coded.float() * spread).numpy().reshape(HEADS, NOPE + VALUES, RANK)
    np.testing.assert_array_equal(k.dequantize(), meant[:, :NOPE].swapaxes(1, 2).reshape(-1, NOPE))
    np.testing.assert_array_equal(v.dequantize(), meant[:, NOPE:].reshape(-1, RANK))
