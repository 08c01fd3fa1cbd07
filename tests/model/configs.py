"""Configs to read, as their models' files have them."""

from typing import Any

import numpy as np

from inhouse.model.families.family import Family
from inhouse.model.families.table import resolve as resolve_any
from inhouse.model.spec import ModelSpec, RopeSpec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 172,
    "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": 1,
}  # fmt: skip
QWEN2: dict[str, Any] = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28,
}  # fmt: skip
QWEN3: dict[str, Any] = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
MISTRAL: dict[str, Any] = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 32}


def gguf(arch: str, **changes: Any) -> dict[str, Any]:
    """GGUF metadata of the model of LLAMA, numbers as float32 as the format keeps them."""
    return {
        "general.architecture": arch, "general.name": "tiny", f"{arch}.block_count": 5,
        f"{arch}.embedding_length": 64, f"{arch}.feed_forward_length": 172, f"{arch}.attention.head_count": 8,
        f"{arch}.attention.head_count_kv": np.full(5, 4, np.int32), f"{arch}.context_length": 512,
        f"{arch}.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)), f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.rope.dimension_count": 8, "tokenizer.ggml.tokens": ["x"] * 512,
    } | {f"{arch}.{key.replace('__', '.')}": value for key, value in changes.items()}  # fmt: skip


def resolve(config: dict[str, Any], *args: Any) -> tuple[ModelSpec, Family]:
    """The spec and family of a decoder."""
    spec, family = resolve_any(config, *args)
    assert isinstance(spec, ModelSpec)
    return spec, family


def rope_of(spec: ModelSpec) -> RopeSpec:
    """The rotation of a decoder that has one."""
    assert spec.rope is not None
    return spec.rope
