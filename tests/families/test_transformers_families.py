"""Every dense decoder family that transformers has, against it."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.families.parity import PROMPT, check_parity, transformers_oracle
from tests.families.shapes import GPT, SHAPE

pytestmark = pytest.mark.torch

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.3, 1.7, 2.1], "long_factor": [1.5, 2.5, 4.0, 7.0],
    "rope_theta": 10000.0,
}  # fmt: skip
FALCON = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
SLIDES = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

# Case -> family, transformers' prefix, settings over SHAPE (or over GPT, where they are so called).
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}),
    "llama-3": ("llama", "Llama", {"rope_parameters": LLAMA3}),
    "llama-tied": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", "Mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", "Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 16}),
    "smollm3": ("smollm3", "SmolLM3", {"no_rope_layer_interval": 2}),
    "granite": ("granite", "Granite", {"attention_multiplier": 0.3, "embedding_multiplier": 1.7,
                                       "residual_multiplier": 0.4, "logits_scaling": 3.0}),
    "olmo2": ("olmo2", "Olmo2", {}),
    "olmo3": ("olmo3", "Olmo3", SLIDES),
    "exaone4": ("exaone4", "Exaone4", SLIDES),
    "cohere": ("cohere", "Cohere", {}),
    "cohere2": ("cohere2", "Cohere2", SLIDES | {"head_dim": 8}),
    "stablelm": ("stablelm", "StableLm", {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", "StableLm", {"partial_rotary_factor": 0.5, "use_parallel_residual": True}),
    "helium": ("helium", "Helium", {"head_dim": 8}),
    "seed_oss": ("seed_oss", "SeedOss", {"head_dim": 8}),
    "ernie4_5": ("ernie4_5", "Ernie4_5", {"head_dim": 8, "use_bias": True}),
    "phi3": ("phi3", "Phi3", {}),
    "phi3-window": ("phi3", "Phi3", {"sliding_window": 7}),
    "phi3-short": ("phi3", "Phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 48}),
    "phi4-partial": ("phi3", "Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                          "partial_rotary_factor": 0.5}}),
    "glm": ("glm", "Glm", {"head_dim": 8}),
    "glm4": ("glm4", "Glm4", {"head_dim": 8}),
    "gemma": ("gemma", "Gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", "Gemma2", SLIDES | {"head_dim": 16, "query_pre_attn_scalar": 24}),
    "gemma3": ("gemma3", "Gemma3", SLIDES | {"head_dim": 16, "query_pre_attn_scalar": 24}),
    "starcoder2": ("starcoder2", "Starcoder2", {}),
    "phi": ("phi", "Phi", {"num_key_value_heads": 6}),
    "gpt_neox": ("gpt_neox", "GPTNeoX", {"partial_rotary_factor": 0.5}),
    "gpt_neox-serial": ("gpt_neox", "GPTNeoX", {"use_parallel_residual": False}),
    "opt": ("opt", "OPT", {"ffn_dim": 80, "word_embed_proj_dim": 48}),
    "bloom": ("bloom", "Bloom", {"n_layer": 3, "n_head": 6}),
    "bloom-post": ("bloom", "Bloom", {"n_layer": 3, "n_head": 8, "apply_residual_connection_post_layernorm": True}),
    "falcon-7b": ("falcon", "Falcon", FALCON),
    "falcon-40b": ("falcon", "Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": ("falcon", "Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2,
                                                 "num_ln_in_parallel_attn": 1}),
    "falcon-rw": ("falcon", "Falcon", FALCON | {"alibi": True, "bias": True, "parallel_attn": False,
                                                "multi_query": False, "num_attention_heads": 8}),
    "gpt2": ("gpt2", "GPT2", {}),
    "gpt_bigcode": ("gpt_bigcode", "GPTBigCode", {}),
    "gpt_bigcode-heads": ("gpt_bigcode", "GPTBigCode", {"multi_query": False}),
    "gptj": ("gptj", "GPTJ", {"rotary_dim": 4}),
}  # fmt: skip


def settings(prefix: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What the config class is made with."""
    if prefix.startswith("GPT") and prefix != "GPTNeoX":
        return GPT | changes
    if prefix in ("Falcon", "Bloom"):
        return {"vocab_size": 97, "hidden_size": 48, "pad_token_id": 0} | changes
    if prefix == "OPT":
        return {
            key: value for key, value in SHAPE.items() if key not in ("intermediate_size", "num_key_value_heads")
        } | changes
    return SHAPE | changes


@pytest.mark.parametrize("case", CASES)
def test_logits_ids_and_batches(case: str, tmp_path: Path) -> None:
    family, prefix, changes = CASES[case]
    model = "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    config = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    attention = "sdpa" if case == "falcon-rw" else "eager"  # transformers 5.23 adds Falcon's ALiBi twice when eager
    check_parity(
        transformers_oracle(model, config, settings(prefix, changes), attention), tmp_path, family,
        case=case.removeprefix(family).strip("-"), context=48 if case == "phi3-short" else None,
    )  # fmt: skip


def test_longrope_beyond_the_original_context(tmp_path: Path) -> None:
    """The long factors, fixed at load; the original changes over where a sequence grows beyond the original length."""
    changes = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}
    oracle = transformers_oracle("Phi3ForCausalLM", "Phi3Config", SHAPE | changes)
    check_parity(oracle, tmp_path, "phi3", case="long")
    assert len(PROMPT) > 16


@pytest.mark.parametrize(("case", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer.")])
def test_checkpoints_that_leave_the_prefix_out(case: str, prefix: str, tmp_path: Path) -> None:
    """The files of GPT-2 and BLOOM on the hub were saved from the model without its head."""
    from safetensors.numpy import load_file, save_file

    family, name, changes = CASES[case]
    oracle = transformers_oracle(
        "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM", f"{name}Config", settings(name, changes)
    )

    class Bare:
        def save(self, folder: Path) -> None:
            oracle.save(folder)
            file = folder / "model.safetensors"
            save_file({key.removeprefix(prefix): value for key, value in load_file(file).items()}, file)
            assert prefix not in json.dumps(list(load_file(file)))

        logits = oracle.logits

    check_parity(Bare(), tmp_path, family, case="bare names")
