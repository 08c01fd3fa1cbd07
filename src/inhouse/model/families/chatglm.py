"""ChatGLM-6B, and ChatGLM2, ChatGLM3 and GLM-4 in the form that came with code of its own."""

from typing import Any

from inhouse.model.families import decoder
from inhouse.model.families.decoder import Keys
from inhouse.model.families.family import Family, Fused, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.families.names import GATE_UP, GGUF_GATE_UP, GGUF_QKV, gguf_names, names, qkv
from inhouse.model.spec import ModelSpec, RopeSpec

_INERT = (
    "pre_seq_len", "prefix_projection", "quantization_bit", "quantization_embeddings", "gmask_token_id",
    "mask_token_id", "hidden_dropout", "attention_dropout", "bias_dropout_fusion", "classifier_dropout",
    "attention_softmax_in_fp32", "apply_query_key_layer_scaling", "fp32_residual_connection", "kv_channels",
    "interleaved_qkv",
)  # fmt: skip


def _is_first(fields: Fields) -> bool:
    return fields.has("position_encoding_2d") or fields.has("inner_hidden_size")


def _first(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2210.02414 and its modelling code. A prompt (all before its last token, `<sop>`) sees itself; half of each
    head is rotated by the position within the prompt, half by the position after it; the residual is the normalised
    input times sqrt(2 layers)."""
    fields.expect_all({"position_encoding_2d": True, "pre_seq_len": None, "quantization_bit": 0})
    layers, hidden = fields.integer("num_layers"), fields.integer("hidden_size")
    head_dim = hidden // max(fields.integer("num_attention_heads"), 1)
    keys = Keys(layers="num_layers", kv_heads="", ffn="inner_hidden_size", context="max_sequence_length",
                eps="layernorm_epsilon", activation="")  # fmt: skip
    return decoder.from_hf(
        fields, tensors, "chatglm", keys, eps=1e-5, activation="gelu_new", rope=RopeSpec(head_dim, source="two_part"),
        norm="layer", norm_bias=True, gated=False, qkv_bias=True, o_bias=True, mlp_bias=True,
        carry=(2 * max(layers, 1)) ** 0.5, prefix_token=fields.integer("bos_token_id", 130004), inert=_INERT,
    )  # fmt: skip


def _second(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2406.12793: half of each head rotates in interleaved pairs, key-value heads in groups."""
    fields.expect_all({
        "rmsnorm": True, "post_layer_norm": True, "original_rope": True, "pre_seq_len": None, "quantization_bit": 0,
        "apply_residual_connection_post_layernorm": False,
    })  # fmt: skip
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    head_dim = fields.integer("kv_channels", hidden // max(heads, 1))
    linear = fields.flag("add_bias_linear", False)
    groups = fields.integer("multi_query_group_num", 1) if fields.flag("multi_query_attention", False) else heads
    theta = 10000.0 * fields.number("rope_ratio", 1.0)
    keys = Keys(layers="num_layers", kv_heads="", ffn="ffn_hidden_size", vocab="padded_vocab_size",
                context="seq_length", eps="layernorm_epsilon", activation="")  # fmt: skip
    return decoder.from_hf(
        fields, tensors, "chatglm2", keys, eps=1e-5, head_dim=head_dim, kv_heads=groups,
        rope=RopeSpec(head_dim // 2, theta, interleaved=True), head="transformer.output_layer.weight",
        qkv_bias=linear or fields.flag("add_qkv_bias", False), o_bias=linear, mlp_bias=linear,
        inert=(*_INERT, "multi_query_group_num", "vocab_size"),
    )  # fmt: skip


def _gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    return decoder.from_gguf(fields, tensors, "chatglm2", rope={"interleaved": True})


_FIRST: dict[str, Any] = {
    "attn_norm": "input_layernorm", **qkv("attention.query_key_value", groups="kv_heads"), "attn.o": "attention.dense",
    "mlp_norm": "post_attention_layernorm", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
}  # fmt: skip
_SECOND: dict[str, Any] = {
    "attn_norm": "input_layernorm", **qkv("self_attention.query_key_value"), "attn.o": "self_attention.dense",
    "mlp_norm": "post_attention_layernorm", "mlp.gate": Fused("mlp.dense_h_to_4h", GATE_UP),
    "mlp.up": Fused("mlp.dense_h_to_4h", GATE_UP), "mlp.down": "mlp.dense_4h_to_h",
}  # fmt: skip
_NAMES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")

ROWS = (
    Family(
        name="chatglm", architectures=_NAMES, gguf=(), from_hf=_first, from_gguf=_gguf, claims=_is_first,
        hf_names=names("transformer.layers.{i}.", _FIRST, {
            "embed": "transformer.word_embeddings", "final_norm": "transformer.final_layernorm", "head": "lm_head",
        }),
        gguf_names=gguf_names(), hf_order="two_part", ignored=("*.attention.rotary_emb.inv_freq",),
    ),
    Family(
        name="chatglm2", architectures=_NAMES, gguf=("chatglm",), from_hf=_second, from_gguf=_gguf,
        claims=lambda fields: not _is_first(fields),
        hf_names=names("transformer.encoder.layers.{i}.", _SECOND, {
            "embed": "transformer.embedding.word_embeddings", "final_norm": "transformer.encoder.final_layernorm",
            "head": "transformer.output_layer",
        }),
        gguf_names=gguf_names(**GGUF_QKV, **GGUF_GATE_UP), ignored=("transformer.rotary_pos_emb.inv_freq",),
    ),
)  # fmt: skip
