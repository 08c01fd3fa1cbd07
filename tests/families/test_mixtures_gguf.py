"""Mixtures of experts from GGUF files, written by the gguf package under the names that its own tables give."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from inhouse.runtime.packed import Packed
from tests.families.parity import F32, TransformersOracle, compare, open_tiny
from tests.families.shapes import SHAPE
from tests.families.test_mixtures import YARN, oracle_of

pytestmark = pytest.mark.torch
LAYERS, HEADS, KV_HEADS = SHAPE["num_hidden_layers"], SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
State = dict[str, F32]


def split_experts(state: State, part: str, array: F32) -> State:
    """gate_up [E, 2f, h] as gate and up, down as it is; under the names that published checkpoints stack to."""
    prefix = state_prefix(part)
    if part.endswith("gate_up_proj"):
        half = array.shape[1] // 2
        return {f"{prefix}gate_proj.weight": array[:, :half], f"{prefix}up_proj.weight": array[:, half:]}
    return {f"{prefix}down_proj.weight": array}


def state_prefix(part: str) -> str:
    return part[: part.rindex(".") + 1]


def pairs(array: F32, heads: int) -> F32:
    """Rows of q or k as GGUF has them for llama: rotary pairs side by side."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)


def plain(oracle: TransformersOracle) -> State:
    """The original's tensors with gate and up apart."""
    state: State = {}
    for name, tensor in oracle.model.state_dict().items():
        array = tensor.float().numpy()
        part = ".experts." in name and not name.endswith("_bias")
        state |= split_experts(state, name, array) if part else {name: array}
    return state


def llama(oracle: TransformersOracle) -> State:
    state = plain(oracle)
    for name in list(state):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            state[name] = pairs(state[name], HEADS if "q_proj" in name else KV_HEADS)
    return state


def deepseek(oracle: TransformersOracle) -> State:
    """The heads' k transposed and v apart."""
    state, spec = plain(oracle), oracle.model.config
    for name in [n for n in state if n.endswith("kv_b_proj.weight")]:
        both = state.pop(name).reshape(HEADS, spec.qk_nope_head_dim + spec.v_head_dim, spec.kv_lora_rank)
        prefix = name.removesuffix("kv_b_proj.weight")
        state[f"{prefix}k_b_proj.weight"] = np.ascontiguousarray(both[:, : spec.qk_nope_head_dim].swapaxes(1, 2))
        state[f"{prefix}v_b_proj.weight"] = np.ascontiguousarray(both[:, spec.qk_nope_head_dim :])
    return state


def gpt_oss(oracle: TransformersOracle) -> State:
    """Alternating rows of gate and up apart, [in, out] turned."""
    state: State = {}
    for name, tensor in oracle.model.state_dict().items():
        array, prefix = tensor.float().numpy(), state_prefix(name)
        if name.endswith("gate_up_proj"):
            state[f"{prefix}gate_proj.weight"] = array[..., 0::2].swapaxes(1, 2)
            state[f"{prefix}up_proj.weight"] = array[..., 1::2].swapaxes(1, 2)
        elif name.endswith("gate_up_proj_bias"):
            state[f"{prefix}gate_proj.bias"], state[f"{prefix}up_proj.bias"] = array[:, 0::2], array[:, 1::2]
        elif name.endswith("experts.down_proj"):
            state[f"{prefix}down_proj.weight"] = array.swapaxes(1, 2)
        elif name.endswith("down_proj_bias"):
            state[f"{prefix}down_proj.bias"] = array
        else:
            state[f"{name}.weight" if name.endswith("sinks") else name] = array
    return state


def common(arch: str, config: Any, **more: Any) -> dict[str, Any]:
    """The keys that every one of these files has."""
    rope = config.rope_parameters
    values: dict[str, Any] = {
        "block_count": LAYERS, "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "context_length": 64,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": rope["rope_theta"],
        "vocab_size": config.vocab_size,
    }  # fmt: skip
    return {f"{arch}.{key}": value for key, value in (values | more).items()}


def oss_keys(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return {
        "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": config.intermediate_size,
        "attention.key_length": 8, "attention.value_length": 8, "attention.sliding_window": 6,
        "rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
    }  # fmt: skip


def deepseek_keys(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    keys = {
        "expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32, "attention.key_length": 40,
        "attention.value_length": 32, "attention.key_length_mla": 24, "attention.value_length_mla": 16,
        "attention.head_count_kv": 1, "attention.kv_lora_rank": 32, "rope.dimension_count": 8,
        "expert_shared_count": config.n_shared_experts, "expert_weights_scale": float(config.routed_scaling_factor),
        "leading_dense_block_count": config.first_k_dense_replace,
    }  # fmt: skip
    if config.q_lora_rank:
        keys["attention.q_lora_rank"] = config.q_lora_rank
    if rope["rope_type"] == "yarn":
        keys |= {
            "rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
        }  # fmt: skip
    return keys


def v3_keys(config: Any) -> dict[str, Any]:
    return deepseek_keys(config) | {
        "expert_gating_func": 2, "expert_weights_norm": True, "expert_group_count": 4, "expert_group_used_count": 2,
    }  # fmt: skip


def qwen2_keys(config: Any) -> dict[str, Any]:
    return {
        "expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 32,
        "expert_shared_feed_forward_length": 40,
    }  # fmt: skip


File = tuple[str, Callable[[TransformersOracle], State], Callable[[Any], Mapping[str, Any]]]
FILES: Mapping[str, File] = {
    "mixtral": ("llama", llama, lambda c: {"expert_count": 5, "expert_used_count": 2, "rope.dimension_count": 8}),
    "qwen3_moe": (
        "qwen3moe", plain,
        lambda c: {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 32,
                   "attention.key_length": 16, "attention.value_length": 16},
    ),
    "qwen2_moe": ("qwen2moe", plain, qwen2_keys),
    "olmoe": ("olmoe", plain, lambda c: {"expert_count": 6, "expert_used_count": 3}),
    "deepseek_v2-lite": ("deepseek2", deepseek, deepseek_keys),
    "deepseek_v3": ("deepseek2", deepseek, v3_keys),
    "gpt_oss": ("gpt-oss", gpt_oss, oss_keys),
}  # fmt: skip
# GGUF has no dense layers among those with experts, and no difference between mscale and mscale_all_dim.
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {"decoder_sparse_step": 1},
    "qwen2_moe": {"mlp_only_layers": []},
    "deepseek_v2-lite": {"rope_parameters": YARN | {"mscale": 0.9}, "first_k_dense_replace": 1},
}


def write(
    path: Path, case: str, kind: str = "F32", file: File | None = None, quantized: str = "_exps.", **more: Any
) -> TransformersOracle:
    """The original of a case as a GGUF file, matrices with `quantized` in their names as `kind`."""
    _, oracle = oracle_of(case, **CHANGES.get(case, {}), **more)
    arch, tensors, keys = file or FILES[case]
    writer = gguf.GGUFWriter(path, arch)
    for key, value in common(arch, oracle.model.config, **keys(oracle.model.config)).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, LAYERS)
    for name, array in tensors(oracle).items():
        bias = name.endswith("_correction_bias")  # GGUF calls it a bias of the scores
        found = names.get_name(name.removesuffix("_bias") if bias else name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        found, data = f"{found}.bias" if bias else found, np.ascontiguousarray(array)
        if found.endswith("ffn_gate_inp_shexp.weight"):
            data = data.reshape(-1)
        if kind != "F32" and quantized in found:
            which = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(found, gguf.quants.quantize(data, which), raw_dtype=which)
        else:
            writer.add_tensor(found, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return oracle


@pytest.mark.parametrize("case", FILES)
def test_logits_ids_and_batches(case: str, tmp_path: Path) -> None:
    oracle = write(tmp_path / "model.gguf", case)
    tiny = open_tiny(tmp_path / "model.gguf", fmt="gguf F32")
    compare(tiny, oracle, case=case)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_experts_keep_the_blocks_of_their_file(kind: str, tmp_path: Path) -> None:
    oracle = write(tmp_path / "model.gguf", "qwen3_moe", kind, hidden_size=64)
    down = plain(oracle)["model.layers.1.mlp.experts.down_proj.weight"]
    weights = open_tiny(tmp_path / "model.gguf").weights
    for expert in (0, 5):
        weight = weights[f"layers.1.moe.experts.{expert}.down.weight"]
        assert isinstance(weight, Packed)
        which = gguf.GGMLQuantizationType[kind]
        meant = gguf.quants.dequantize(gguf.quants.quantize(down, which), which)
        np.testing.assert_array_equal(weight.dequantize(), meant[expert])


def older_keys(config: Any) -> dict[str, Any]:
    """Before latent attention had keys of its own."""
    keys = {key: value for key, value in v3_keys(config).items() if not key.endswith("_mla")}
    return keys | {"attention.key_length": 24, "attention.value_length": 16, "attention.head_count_kv": HEADS}


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_older_files_keep_k_and_v_of_the_heads_in_one(kind: str, tmp_path: Path) -> None:
    """k is transposed for absorption, which codes cannot be: it becomes the floats that they mean."""
    file = ("deepseek2", plain, older_keys)
    oracle = write(tmp_path / "model.gguf", "deepseek_v3", kind, file, "attn_kv_b")
    tiny = open_tiny(tmp_path / "model.gguf", fmt="gguf F32")
    if kind == "F32":
        return compare(tiny, oracle, case="older")
    name, which = "model.layers.1.self_attn.kv_b_proj.weight", gguf.GGMLQuantizationType.Q8_0
    meant = gguf.quants.dequantize(gguf.quants.quantize(plain(oracle)[name], which), which).reshape(HEADS, 32, 32)
    k, v = (tiny.weights[f"layers.1.attn.{part}.weight"] for part in ("k_b", "v_b"))
    assert isinstance(k, Packed)
    assert isinstance(v, Packed)
    assert (k.format, v.format) == ("f32", "q8_0")
    np.testing.assert_array_equal(k.dequantize(), meant[:, :16].swapaxes(1, 2).reshape(-1, 16))
    np.testing.assert_array_equal(v.dequantize(), meant[:, 16:].reshape(-1, 32))
    return None
