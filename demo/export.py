"""The model folder: canonical float32 weights to bf16 under Hugging Face names, with its config files.

Knows the files' forms; knows no training. The way back (`load_weights`) is for grading what was really written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from demo.encode import CHAT_TEMPLATE, END, special_id
from inhouse.model.spec import ModelSpec
from inhouse.store.safetensors import open_safetensors, write_safetensors
from inhouse.store.writing import atomic_file, from_bytes

F32 = npt.NDArray[np.float32]
LAYER_NAMES = {
    "attn_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "attn.q.weight": "self_attn.q_proj.weight",
    "attn.k.weight": "self_attn.k_proj.weight",
    "attn.v.weight": "self_attn.v_proj.weight",
    "attn.o.weight": "self_attn.o_proj.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
NAMES = {"embed.weight": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}


def hf_name(canonical: str) -> str:
    """The name of a canonical weight in a Llama checkpoint; raises KeyError for one that Llama has not."""
    if canonical in NAMES:
        return NAMES[canonical]
    _, layer, rest = canonical.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES[rest]}"


def to_bf16(array: F32) -> npt.NDArray[np.uint16]:
    """bfloat16 bit patterns, rounded half to even; finite values only."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: npt.NDArray[np.uint16]) -> F32:
    """The exact float32 of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def config_json(spec: ModelSpec, end: int, pad: int) -> dict[str, Any]:
    """config.json of a Llama of this spec."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": spec.activation,
        "max_position_embeddings": spec.context_length,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope.theta if spec.rope else 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "vocab_size": spec.vocab_size,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def tokenizer_config(context: int) -> dict[str, Any]:
    """tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": END,
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": CHAT_TEMPLATE,
    }


def export(weights: Mapping[str, F32], spec: ModelSpec, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the model folder; each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = []
    for name, array in weights.items():
        raw = to_bf16(array).reshape(-1).view(np.uint8)
        tensors.append(from_bytes(hf_name(name), "BF16", array.shape, raw))
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    end, pad = special_id(tokenizer, END), special_id(tokenizer, "<|pad|>")
    files = {
        "config.json": config_json(spec, end, pad),
        "generation_config.json": {"do_sample": False, "eos_token_id": end, "pad_token_id": pad},
        "tokenizer_config.json": tokenizer_config(spec.context_length),
    }
    for name, content in files.items():
        with atomic_file(folder / name) as file:
            file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    with atomic_file(folder / "tokenizer.json") as file:
        file.write(tokenizer.to_str(pretty=False).encode())


def load_weights(folder: Path, names: Mapping[str, tuple[int, ...]]) -> dict[str, F32]:
    """canonical name -> float32 array of the given shape, from a folder that `export` wrote."""
    source = open_safetensors(folder / "model.safetensors")
    raw = {name: np.asarray(source.raw(hf_name(name))) for name in names}
    return {name: from_bf16(raw[name].view(np.uint16)).reshape(shape) for name, shape in names.items()}
