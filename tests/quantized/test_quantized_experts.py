"""gpt-oss as it is published: experts in MXFP4 blocks. The oracle is transformers on its own unpacking of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from inhouse.core.errors import FormatError
from inhouse.runtime.packed import Packed
from tests.families.parity import compare, open_tiny, transformers_oracle
from tests.families.shapes import SHAPE
from tests.families.test_mixtures import OSS

pytestmark = [pytest.mark.torch, pytest.mark.native]


def in_blocks(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Random codes for a float tensor [experts, in, out]."""
    experts, inputs, out = shape
    blocks = torch.from_numpy(rng.integers(0, 256, (experts, out, inputs // 32, 16), dtype=np.uint8))
    scales = torch.from_numpy(rng.integers(122, 126, (experts, out, inputs // 32), dtype=np.uint8))
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def published(folder: Path) -> Any:
    """Writes the checkpoint; returns the original with the values that its blocks mean."""
    oracle = transformers_oracle("GptOssForCausalLM", "GptOssConfig", SHAPE | OSS | WIDE)
    oracle.save(folder)
    rng = np.random.default_rng(0)
    state: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")) and tensor.dim() == 3:
            made = in_blocks(name, tuple(tensor.shape), rng)
            state |= made
            whole = convert_moe_packed_tensors(made[f"{name}_blocks"], made[f"{name}_scales"], dtype=torch.float32)
            meant[name] = whole.cpu()
        else:
            state[name] = tensor
    oracle.model.load_state_dict(meant, strict=False)
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return oracle


WIDE = {"hidden_size": 64, "intermediate_size": 32}


def test_published_experts_are_those_of_the_original(tmp_path: Path) -> None:
    oracle = published(tmp_path)
    tiny = open_tiny(tmp_path, fmt="mxfp4", activations="float")
    experts = [weight for name, weight in tiny.weights.items() if ".experts." in name and name.endswith("weight")]
    assert experts
    assert all(isinstance(weight, Packed) and weight.format == "mxfp4" for weight in experts)
    compare(tiny, oracle)


def test_blocks_without_their_scales_are_refused(tmp_path: Path) -> None:
    published(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if name.endswith("_scales"))
    del state[name]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="no byte of scale"):
        open_tiny(tmp_path)
