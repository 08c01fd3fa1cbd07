"""BLOOM and Falcon: fused q, k, v by head or group, ALiBi in the first and in Falcon-RW."""

from typing import Any

from inhouse.model.families import decoder
from inhouse.model.families.decoder import Keys
from inhouse.model.families.family import Family, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.families.gpt import BIASES, LAYER_NORM
from inhouse.model.families.names import GGUF_QKV, gguf_names, names, qkv
from inhouse.model.spec import ModelSpec

_INERT = ("hidden_dropout", "slow_but_exact", "seq_length", "skip_bias_add", "skip_bias_add_qkv", "unk_token_id",
          "masked_softmax_fusion", "attention_softmax_in_fp32", "bias_dropout_fusion", "n_inner",
          "offset_alibi")  # fmt: skip


def _bloom(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2211.05100; its GELU is the tanh form. Positions are not bounded; the context is that of training."""
    hidden = "hidden_size" if fields.raw("hidden_size") is not None else "n_embed"
    heads = "n_head" if fields.raw("n_head") is not None else "num_attention_heads"
    carry = 1.0 if fields.flag("apply_residual_connection_post_layernorm", False) else 0.0
    keys = Keys(hidden, "n_layer", heads, "", "", context="seq_length", eps="layer_norm_epsilon", activation="")
    return decoder.from_hf(
        fields, tensors, "bloom", keys, ffn=4 * fields.integer(hidden), eps=1e-5, activation="gelu_new", tied=True,
        rope=None, inert=_INERT, alibi=1.0, embed_norm=True, carry=carry, **LAYER_NORM, **BIASES,
    )  # fmt: skip


def _bloom_gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    return decoder.from_gguf(
        fields, tensors, "bloom", activation="gelu_tanh", rope=None, alibi=1.0, embed_norm=True, **LAYER_NORM
    )


def _falcon(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2311.16867: one key-value head (7B), groups and two norms (40B), ALiBi and no parallel parts (RW)."""
    hidden = fields.integer("hidden_size")
    heads_key = "num_attention_heads" if fields.raw("num_attention_heads") is not None else "n_head"
    layers_key = "num_hidden_layers" if fields.raw("num_hidden_layers") is not None else "n_layer"
    heads = fields.integer(heads_key)
    fields.expect("apply_residual_connection_post_layernorm", (False,))
    newer, alibi = fields.flag("new_decoder_architecture", False), fields.flag("alibi", False)
    many, bias = not fields.flag("multi_query", True), fields.flag("bias", False)
    groups = fields.integer("num_kv_heads", fields.integer("n_head_kv", heads))
    norms = fields.integer("num_ln_in_parallel_attn", 2 if newer else 1)
    parallel = norms if newer or fields.flag("parallel_attn", True) else 0
    keys = Keys("hidden_size", layers_key, heads_key, "", "ffn_hidden_size", eps="layer_norm_epsilon",
                activation="activation")  # fmt: skip
    return decoder.from_hf(
        fields, tensors, "falcon", keys, ffn=4 * hidden, eps=1e-5, activation="gelu", tied=True,
        rope=None if alibi else {}, inert=(*_INERT, "rope_scaling", "rope_theta", "n_head_kv",
               "parallel_attn", "num_kv_heads"),
        kv_heads=groups if newer else heads if many else 1, parallel_norms=parallel,
        alibi=(hidden // max(heads, 1)) ** -0.5 if alibi else 0.0, qkv_bias=bias, o_bias=bias, mlp_bias=bias,
        **LAYER_NORM,
    )  # fmt: skip


def _falcon_gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    norms = 2 if "blk.0.attn_norm_2.weight" in tensors.names else 1
    return decoder.from_gguf(fields, tensors, "falcon", activation="gelu", parallel_norms=norms, **LAYER_NORM)


_PARTS: dict[str, Any] = {
    "attn_norm": ("ln_attn", "input_layernorm"), **qkv("self_attention.query_key_value", groups="kv_heads"),
    "attn.o": "self_attention.dense", "mlp_norm": ("ln_mlp", "post_attention_layernorm"),
    "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
}  # fmt: skip
_OUTER = {"embed": "transformer.word_embeddings", "embed_norm": "transformer.word_embeddings_layernorm",
          "final_norm": "transformer.ln_f", "head": "lm_head"}  # fmt: skip
_HF_NAMES = names("transformer.h.{i}.", _PARTS, _OUTER)

ROWS = (
    Family(
        name="bloom", architectures=("BloomForCausalLM", "BloomModel"), gguf=("bloom",), from_hf=_bloom,
        from_gguf=_bloom_gguf, hf_names=_HF_NAMES, gguf_names=gguf_names(**GGUF_QKV), prefix="transformer.",
        ignored=("lm_head.weight",),
    ),
    Family(
        name="falcon", architectures=("FalconForCausalLM", "RWForCausalLM"), gguf=("falcon",), from_hf=_falcon,
        from_gguf=_falcon_gguf, hf_names=_HF_NAMES, prefix="transformer.",
        # GGUF calls the norm of attention attn_norm_2 where there are two, and the one of the MLP then attn_norm
        gguf_names=gguf_names(**GGUF_QKV, attn_norm=("attn_norm_2", "attn_norm"), mlp_norm="attn_norm"),
    ),
)  # fmt: skip
