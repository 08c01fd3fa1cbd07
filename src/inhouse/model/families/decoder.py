"""What the families of plain decoders share: their common keys, the keys that change nothing, and tensor names."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from inhouse.core.errors import FormatError
from inhouse.model.families.family import Fused, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.families.ropes import context_length, rope_from_gguf, rope_from_hf
from inhouse.model.spec import LIMITS, ModelSpec, RopeSpec, check_spec

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "quick_gelu": "quick_gelu",
}  # fmt: skip

# Keys of config.json that name, train, save or sample a model, and never change its forward pass.
INERT_HF = (
    "_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_internal",
    "_attn_implementation_autoset", "_flash_attn_2_enabled", "_experts_implementation", "_from_model_config",
    "_auto_class", "_original_object_hash", "_diffusers_version",
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "auto_map", "use_cache",
    "*_token_id", "initializer_range", "*_dropout", "*_dropout_prob", "*_pdrop", "pretraining_tp", "output_attentions",
    "output_hidden_states", "return_dict", "return_dict_in_generate", "output_scores", "torchscript", "use_bfloat16",
    "task_specific_params", "id2label", "label2id", "problem_type", "finetuning_task", "prefix", "tokenizer_class",
    "unsloth_fixed", "unsloth_version", "unsloth_template", "max_length",
    "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
    "is_matryoshka", "matryoshka_dimensions", "tf_legacy_loss", "rope_parameters", "attn_implementation",
    "max_new_tokens", "transformers.js_config", "_num_labels",
)  # fmt: skip

# Keys that would change the forward pass, with the values at which they do not.
NEUTRAL_HF: Mapping[str, tuple[object, ...]] = {
    "is_decoder": (False, True), "is_encoder_decoder": (False,), "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,), "pruned_heads": ({},), "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (), "use_bidirectional_attention": (False,),
}  # fmt: skip

INERT_GGUF = ("rope.scaling.finetuned", "tensor_data_layout", "expert_used_count")
NEUTRAL_GGUF: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,), "pooling_type": (0,), "expert_count": (0,), "attention.max_alibi_bias": (0, 0.0),
    "attention.clamp_kqv": (0, 0.0), "logit_scale": (1, 1.0), "residual_scale": (1, 1.0), "embedding_scale": (1, 1.0),
    "attn_logit_softcapping": (0, 0.0), "final_logit_softcapping": (0, 0.0), "use_parallel_residual": (False,),
}  # fmt: skip

HF_NAMES: Mapping[str, str | Fused] = {
    "embed.weight": "model.embed_tokens.weight",
    "layers.{i}.attn_norm": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.attn.q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.attn.q.bias": "model.layers.{i}.self_attn.q_proj.bias",
    "layers.{i}.attn.k.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.attn.k.bias": "model.layers.{i}.self_attn.k_proj.bias",
    "layers.{i}.attn.v.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.attn.v.bias": "model.layers.{i}.self_attn.v_proj.bias",
    "layers.{i}.attn.o.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "layers.{i}.attn.o.bias": "model.layers.{i}.self_attn.o_proj.bias",
    "layers.{i}.attn.q_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "layers.{i}.attn.k_norm": "model.layers.{i}.self_attn.k_norm.weight",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp.gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "layers.{i}.mlp.gate.bias": "model.layers.{i}.mlp.gate_proj.bias",
    "layers.{i}.mlp.up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "layers.{i}.mlp.up.bias": "model.layers.{i}.mlp.up_proj.bias",
    "layers.{i}.mlp.down.weight": "model.layers.{i}.mlp.down_proj.weight",
    "layers.{i}.mlp.down.bias": "model.layers.{i}.mlp.down_proj.bias",
    "final_norm": "model.norm.weight",
    "head.weight": "lm_head.weight",
}

GGUF_NAMES: Mapping[str, str | Fused] = {
    "embed.weight": "token_embd.weight",
    "layers.{i}.attn_norm": "blk.{i}.attn_norm.weight",
    "layers.{i}.attn.q.weight": "blk.{i}.attn_q.weight",
    "layers.{i}.attn.q.bias": "blk.{i}.attn_q.bias",
    "layers.{i}.attn.k.weight": "blk.{i}.attn_k.weight",
    "layers.{i}.attn.k.bias": "blk.{i}.attn_k.bias",
    "layers.{i}.attn.v.weight": "blk.{i}.attn_v.weight",
    "layers.{i}.attn.v.bias": "blk.{i}.attn_v.bias",
    "layers.{i}.attn.o.weight": "blk.{i}.attn_output.weight",
    "layers.{i}.attn.o.bias": "blk.{i}.attn_output.bias",
    "layers.{i}.attn.q_norm": "blk.{i}.attn_q_norm.weight",
    "layers.{i}.attn.k_norm": "blk.{i}.attn_k_norm.weight",
    "layers.{i}.mlp_norm": "blk.{i}.ffn_norm.weight",
    "layers.{i}.mlp.gate.weight": "blk.{i}.ffn_gate.weight",
    "layers.{i}.mlp.gate.bias": "blk.{i}.ffn_gate.bias",
    "layers.{i}.mlp.up.weight": "blk.{i}.ffn_up.weight",
    "layers.{i}.mlp.up.bias": "blk.{i}.ffn_up.bias",
    "layers.{i}.mlp.down.weight": "blk.{i}.ffn_down.weight",
    "layers.{i}.mlp.down.bias": "blk.{i}.ffn_down.bias",
    "final_norm": "output_norm.weight",
    "head.weight": "output.weight",
    "head.bias": "output.bias",
}


@dataclass(frozen=True, slots=True)
class Keys:
    """What a config.json calls the numbers that every decoder has."""

    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    ffn: str = "intermediate_size"
    vocab: str = "vocab_size"
    context: str = "max_position_embeddings"
    eps: str = "rms_norm_eps"
    activation: str = "hidden_act"


def from_hf(
    fields: Fields,
    tensors: Tensors,
    family: str,
    keys: Keys = Keys(),
    *,
    head_dim: int = 0,
    ffn: int = 0,
    context: int = 2048,
    eps: float = 1e-6,
    activation: str = "silu",
    tied: bool = False,
    head: str = "lm_head.weight",
    rope: Mapping[str, Any] | RopeSpec | None = MappingProxyType({}),
    inert: tuple[str, ...] = (),
    **switches: Any,
) -> ModelSpec:
    """ModelSpec of a config.json. Refuses every key left unread.

    Args:
        head_dim (0: hidden / heads), ffn (0: required), context, eps, activation, tied: the family's defaults where the
            config is silent.
        head: name of the head's tensor; a tied model that brings it keeps it.
        rope: options of `rope_from_hf`, or the rotation itself.
        inert: further keys that change nothing in this family.
        switches: fields of ModelSpec that the family has read or fixes; they win.
    """
    hidden, heads = fields.integer(keys.hidden), fields.integer(keys.heads)
    head_dim = fields.integer("head_dim", head_dim or hidden // max(heads, 1))
    trained = fields.integer(keys.context, context)
    if isinstance(rope, Mapping):
        rope = rope_from_hf(fields, head_dim, trained, **rope)
    is_tied = fields.flag("tie_word_embeddings", tied)
    brings_head = bool({head, head.removeprefix("model.")} & set(tensors.names))
    saved_bare = bool(tensors.names) and str(fields.raw("architectures", [""])[0]).endswith("Model")
    headless = not is_tied and not brings_head and saved_bare
    read: dict[str, Any] = {
        "family": family, "hidden": hidden, "layers": fields.integer(keys.layers), "heads": heads,
        "kv_heads": fields.integer(keys.kv_heads, heads), "head_dim": head_dim,
        "ffn": fields.integer(keys.ffn, ffn) if ffn else fields.integer(keys.ffn),
        "vocab_size": fields.integer(keys.vocab), "context_length": context_length(rope, trained), "rope": rope,
        "norm_eps": fields.number(keys.eps, eps), "activation": _activation(fields, keys.activation, activation),
        "tied": headless or is_tied and not brings_head,
        "headless": headless,
    }  # fmt: skip
    spec = ModelSpec(**read | switches)
    for key, allowed in NEUTRAL_HF.items():
        fields.expect(key, allowed)
    fields.refuse_rest((*INERT_HF, *inert))
    return check_spec(spec)


def _activation(fields: Fields, key: str, default: str) -> str:
    name = fields.text(key, default)
    if name not in ACTIVATIONS:
        raise fields.unsupported(key, name)
    return ACTIVATIONS[name]


def hf_window(fields: Fields) -> int:
    """The key `sliding_window`: 4096 where it is absent, 0 where it is null. Raises FormatError where it is negative,
    also if no layer slides."""
    window = fields.integer("sliding_window", 0 if fields.has("sliding_window") else 4096)
    if window < 0:
        raise FormatError(f"config.json has sliding_window = {window}, expected 0 or more", param="sliding_window")
    return window


def hf_windows(fields: Fields, window: int, sliding: tuple[bool, ...]) -> tuple[int, ...]:
    """[layers] from the sliding window and which layers slide; `layer_types` decides where the config has it.
    () where no layer slides. Raises FormatError for a list of another length."""
    types = fields.raw("layer_types")
    if types is not None:
        known = {"full_attention": False, "sliding_attention": True}
        if not isinstance(types, list) or not all(isinstance(t, str) and t in known for t in types):
            raise fields.unsupported("layer_types", types)
        if len(types) != (layers := fields.integer("num_hidden_layers")):
            raise FormatError(f"config.json has {len(types)} layer_types for {layers} layers", param="layer_types")
        sliding = tuple(known[t] for t in types)
        if any(sliding) and not window:
            raise fields.unsupported("layer_types", types)
    return tuple(window if slides else 0 for slides in sliding) if window and any(sliding) else ()


def from_gguf(
    fields: Fields,
    tensors: Tensors,
    family: str,
    *,
    head_dim: int = 0,
    activation: str = "silu",
    rope: Mapping[str, Any] | RopeSpec | None = MappingProxyType({}),
    ffn: int = 0,
    mixture: bool = False,
    **switches: Any,
) -> ModelSpec:
    """ModelSpec of GGUF metadata under `{architecture}.`; biases and a head of its own are there if their tensors are.
    The arguments are those of `from_hf`; `mixture`: the caller has read what there is of experts. Refuses every key
    left unread."""
    layers, hidden = fields.integer("block_count"), fields.integer("embedding_length")
    heads = _uniform(fields, "attention.head_count")
    kv_heads = _uniform(fields, "attention.head_count_kv", heads)
    head_dim = fields.integer("attention.key_length", head_dim or hidden // max(heads, 1))
    fields.expect("attention.value_length", (head_dim,))
    scale = fields.number("attention.scale", 0.0)
    if head_dim > 0 and math.isclose(scale, head_dim**-0.5, rel_tol=1e-6):
        scale = 0.0
    trained = fields.integer("context_length")
    if isinstance(rope, Mapping):
        rope = rope_from_gguf(fields, head_dim, trained, tensors, **rope)
    else:
        fields.raw("rope.dimension_count")  # written for every model, used by none of these
    window = fields.integer("attention.sliding_window", 0)
    layer_norm = switches.get("norm") == "layer"
    read: dict[str, Any] = {
        "family": family, "hidden": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn": ffn or _uniform(fields, "feed_forward_length"),
        "vocab_size": fields.integer("vocab_size", 0), "context_length": context_length(rope, trained), "rope": rope,
        "norm_eps": fields.number("attention.layer_norm_epsilon" if layer_norm else "attention.layer_norm_rms_epsilon"),
        "activation": activation, "attention_scale": scale,
        "qkv_bias": _first(tensors, "attn_q.bias") or _first(tensors, "attn_qkv.bias"),
        "o_bias": _first(tensors, "attn_output.bias"), "mlp_bias": _first(tensors, "ffn_up.bias"),
        "head_bias": "output.bias" in tensors.names, "tied": "output.weight" not in tensors.names,
        "windows": (window,) * layers if window and layers <= LIMITS["layers"] else (),
    }  # fmt: skip
    spec = ModelSpec(**read | switches)
    for key, allowed in NEUTRAL_GGUF.items():
        if not (fields.was_read(key) or (mixture and key == "expert_count")):
            fields.expect(key, allowed)
    fields.refuse_rest(INERT_GGUF)
    return check_spec(spec)


def _first(tensors: Tensors, name: str) -> bool:
    return f"blk.0.{name}" in tensors.names


def _uniform(fields: Fields, key: str, default: int | None = None) -> int:
    """A number that GGUF may give for each layer; raises UnsupportedError where layers differ."""
    value = fields.raw(key)
    if not isinstance(value, (list, tuple)):
        return fields.integer(key) if default is None else fields.integer(key, default)
    if not value or any(item != value[0] for item in value) or not isinstance(value[0], int):
        raise fields.unsupported(key, value)
    return value[0]
