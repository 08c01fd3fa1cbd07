"""Mixtures of experts and latent attention, against transformers: checkpoints with a tensor for each expert, as they
are published, and with all experts in one, as transformers 5 keeps them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from inhouse.core.errors import FormatError
from tests.families.parity import (
    F32,
    PROMPT,
    TransformersOracle,
    check_parity,
    open_tiny,
    run,
    transformers_oracle,
)
from tests.families.shapes import SHAPE

pytestmark = pytest.mark.torch

E = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
MLA = {"num_key_value_heads": 6, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0, "mscale": 0.7,
    "mscale_all_dim": 0.9, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "short_mscale": 1.3,
    "long_mscale": 1.3,
    "short_factor": [1.0, 2.0, 3.0, 4.0],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}  # fmt: skip  (alike, because transformers takes the short ones for any length)
GRANITE = {
    "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3,
    "num_local_experts": 4,
}  # fmt: skip
V2 = E | MLA | {"n_routed_experts": 8, "n_shared_experts": 2}
GROUPS = {
    "first_k_dense_replace": 1, "q_lora_rank": 32, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
    "routed_scaling_factor": 2.0,
}  # fmt: skip
V3 = E | MLA | {"n_routed_experts": 8, "first_k_dense_replace": 1, "q_lora_rank": 32, "n_group": 4, "topk_group": 2}
OSS = {"num_local_experts": 4, "head_dim": 8, "sliding_window": 6, "num_experts_per_tok": 2}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("mixtral", "Mixtral", {"num_local_experts": 5}),
    "mixtral-window": ("mixtral", "Mixtral", {"num_local_experts": 4, "sliding_window": 7}),
    "qwen2_moe": (
        "qwen2_moe", "Qwen2Moe",
        E | {"num_experts": 6, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": (
        "qwen3_moe", "Qwen3Moe",
        E | {"num_experts": 6, "norm_topk_prob": True, "head_dim": 16, "decoder_sparse_step": 2},
    ),
    "olmoe": ("olmoe", "Olmoe", {"num_experts": 6, "num_experts_per_tok": 3}),
    "granitemoe": ("granitemoe", "GraniteMoe", GRANITE),
    "granitemoe-shared": ("granitemoe", "GraniteMoeShared", GRANITE | {"shared_intermediate_size": 40}),
    "phimoe": (
        "phimoe", "Phimoe", {"attention_bias": True, "lm_head_bias": True, "num_local_experts": 5},
    ),
    "phimoe-longrope": ("phimoe", "Phimoe", {"rope_parameters": LONGROPE, "num_local_experts": 4}),
    "deepseek_v2": ("deepseek_v2", "DeepseekV2", V2 | GROUPS),
    "deepseek_v2-lite": ("deepseek_v2", "DeepseekV2", V2 | {"q_lora_rank": None, "rope_parameters": YARN}),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3", V3),
    "deepseek_v3-yarn": ("deepseek_v3", "DeepseekV3", V3 | {"rope_parameters": YARN, "attention_bias": True}),
    "glm4_moe": (
        "glm4_moe", "Glm4Moe",
        E | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "use_qk_norm": True, "attention_bias": True,
             "routed_scaling_factor": 1.5},
    ),
    "gpt_oss": ("gpt_oss", "GptOss", OSS),
}  # fmt: skip


def oracle_of(case: str, **more: Any) -> tuple[str, TransformersOracle]:
    """(family, a random original); corrections of routers, which begin as zeros, are made to matter."""
    family, name, changes = CASES[case]
    oracle = transformers_oracle(f"{name}ForCausalLM", f"{name}Config", SHAPE | changes | more)
    with torch.no_grad():
        for key, buffer in oracle.model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn(buffer.shape) * 0.3)
    return family, oracle


@pytest.mark.parametrize("case", CASES)
def test_logits_ids_and_batches(case: str, tmp_path: Path) -> None:
    family, oracle = oracle_of(case)
    check_parity(oracle, tmp_path, family, case=case.removeprefix(family).strip("-"))


@dataclass(frozen=True)
class Stacked:
    """An original that is saved under the names that transformers 5 has in memory."""

    original: TransformersOracle

    def save(self, folder: Path) -> None:
        config = self.original.model.config.to_dict() | {"architectures": [type(self.original.model).__name__]}
        (folder / "config.json").write_text(json.dumps(config))
        state = {name: t.detach().contiguous().numpy() for name, t in self.original.model.state_dict().items()}
        save_file(state, folder / "model.safetensors")

    def logits(self, tokens: Sequence[int]) -> F32:
        return self.original.logits(tokens)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "granitemoe", "phimoe", "deepseek_v3"])
def test_all_experts_in_one_tensor(case: str, tmp_path: Path) -> None:
    family, oracle = oracle_of(case)
    check_parity(Stacked(oracle), tmp_path, family, case="stacked")


def test_both_forms_give_the_same_weights(tmp_path: Path) -> None:
    _, oracle = oracle_of("qwen2_moe")
    found = []
    for name, one in (("each", oracle), ("stacked", Stacked(oracle))):
        (tmp_path / name).mkdir()
        one.save(tmp_path / name)
        found.append(open_tiny(tmp_path / name).weights)
    assert list(found[0]) == list(found[1])
    for name, weight in found[0].items():
        ours, theirs = (w if isinstance(w, np.ndarray) else w.dequantize() for w in (weight, found[1][name]))
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_what_chooses_experts_is_never_quantised(tmp_path: Path) -> None:
    _, oracle = oracle_of("qwen2_moe")
    oracle.save(tmp_path)
    for wish, each in (("q8", "q8_0"), ("q4", "q4_0")):
        weights = open_tiny(tmp_path, quantize=wish).weights
        formats = {name: w.format for name, w in weights.items() if not isinstance(w, np.ndarray)}
        assert formats["layers.0.moe.router.weight"] == formats["layers.0.moe.shared_gate.weight"] == "f32"
        assert formats["layers.0.moe.experts.3.up.weight"] == formats["layers.0.moe.shared.down.weight"] == each


@pytest.mark.parametrize("case", ["qwen3_moe", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("wish", ["q8", "q4"])
def test_quantised_experts_agree_between_the_executors(case: str, wish: str, tmp_path: Path) -> None:
    _, oracle = oracle_of(case)
    oracle.save(tmp_path)
    tiny = open_tiny(tmp_path, quantize=wish)
    native, reference = (run(tiny.executor(name), [(PROMPT, 0, 0)]) for name in ("native", "torch"))
    errors = np.abs(native - reference).max(axis=1) / np.abs(reference).max()
    assert np.median(errors) < 1e-5
    assert errors.max() < 1e-1  # an activation at the edge of rounding falls either way, and the tokens after it follow


def test_the_layer_that_predicts_a_token_more_is_left_unread(tmp_path: Path) -> None:
    _, oracle = oracle_of("deepseek_v3")
    oracle.save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    layer = f"model.layers.{SHAPE['num_hidden_layers']}"
    more = {f"{layer}.{name}.weight": np.ones((8, 6), np.float32) for name in ("eh_proj", "mlp.gate")}
    save_file(state | more, tmp_path / "model.safetensors")
    assert not any(name.startswith("layers.3.") for name in open_tiny(tmp_path).weights)
    save_file(state | {"model.layers.0.eh_proj.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"model\.layers\.0\.eh_proj"):
        open_tiny(tmp_path)
