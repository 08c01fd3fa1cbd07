"""Models that came with code of their own: Qwen 1, Baichuan 1 and 2, InternLM 2, MiniCPM."""

from typing import Any

from inhouse.model.families import decoder
from inhouse.model.families.decoder import HF_NAMES, Keys
from inhouse.model.families.family import Family, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.families.names import GGUF_QKV, gguf_names, names, qkv
from inhouse.model.spec import ModelSpec

_INERT = ("model_max_length", "gradient_checkpointing", "_from_auto", "bias_dropout_fusion")
_BAICHUAN2_VOCAB = 125696


def _qwen(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2309.16609. Beyond `seq_length` it would stretch its rotary base and its queries; the context ends there,
    so that both change nothing."""
    fields.expect_all({"scale_attn_weights": True, "no_bias": True, "rotary_pct": 1, "kv_channels": _head_dim(fields)})
    trained = fields.integer("seq_length", fields.integer("max_position_embeddings", 2048))
    keys = Keys(kv_heads="", ffn="", context="seq_length", eps="layer_norm_epsilon", activation="")
    return decoder.from_hf(
        fields, tensors, "qwen", keys, ffn=fields.integer("intermediate_size") // 2, context=trained,
        rope={"theta_key": "rotary_emb_base"}, qkv_bias=True,
        inert=("use_dynamic_ntk", "use_logn_attn", "use_flash_attn", "use_cache_*", "softmax_in_fp32", "bf16", "fp16",
               "fp32", "onnx_safe", "*_dropout_prob", "max_position_embeddings", *_INERT),
    )  # fmt: skip


def _head_dim(fields: Fields) -> int:
    return fields.integer("hidden_size") // max(fields.integer("num_attention_heads"), 1)


def _baichuan(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2309.10305: 7B rotates, 13B (whose config bounds no positions) has ALiBi."""
    family = "baichuan2" if _is_second(fields) else "baichuan"
    rotates = fields.raw("max_position_embeddings") is not None
    key = "max_position_embeddings" if rotates else "model_max_length"
    fields.expect("z_loss_weight", (0, 0.0))
    return decoder.from_hf(
        fields, tensors, family, Keys(context=key), context=4096, rope={} if rotates else None,
        alibi=0.0 if rotates else 1.0, inert=_INERT,
    )  # fmt: skip


def _is_second(fields: Fields) -> bool:
    return fields.integer("vocab_size") == _BAICHUAN2_VOCAB


def _baichuan_gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    alibi = fields.integer("block_count") == 40
    return decoder.from_gguf(fields, tensors, "baichuan", alibi=float(alibi), rope=None if alibi else {})


def _internlm2(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2403.17297: q, k and v in groups of one tensor."""
    bias = fields.flag("bias", False)
    return decoder.from_hf(
        fields, tensors, "internlm2", context=2048, head="output.weight", qkv_bias=bias, o_bias=bias, inert=_INERT
    )


def _minicpm(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2404.06395: embedding, residuals and logits are scaled."""
    layers = fields.integer("num_hidden_layers")
    depth, base = fields.number("scale_depth", 1.0), fields.number("dim_model_base", 1.0)
    bias = fields.flag("attention_bias", False)
    return decoder.from_hf(
        fields, tensors, "minicpm", tied=True, embed_scale=fields.number("scale_emb", 1.0),
        residual_scale=depth / max(layers, 1) ** 0.5, logit_scale=base / max(fields.integer("hidden_size"), 1),
        qkv_bias=bias, o_bias=bias, inert=_INERT,
    )  # fmt: skip


def _minicpm_gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    """Files made before the scales were written are those of the 2B model."""
    layers, hidden = fields.integer("block_count"), fields.integer("embedding_length")
    return decoder.from_gguf(
        fields, tensors, "minicpm", embed_scale=fields.number("embedding_scale", 12.0),
        residual_scale=fields.number("residual_scale", 1.4 / max(layers, 1) ** 0.5),
        logit_scale=1.0 / fields.number("logit_scale", hidden / 256),
    )  # fmt: skip


def _gguf(family: str) -> Any:
    def read(fields: Fields, tensors: Tensors) -> ModelSpec:
        ffn = fields.integer("feed_forward_length") // 2 if family == "qwen" else 0
        return decoder.from_gguf(fields, tensors, family, ffn=ffn)

    return read


_OUTER = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_BAICHUAN_NAMES = names("model.layers.{i}.", {
    "attn_norm": "input_layernorm", **qkv("self_attn.W_pack"), "attn.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}, _OUTER)  # fmt: skip

ROWS = (
    Family(
        name="qwen", architectures=("QWenLMHeadModel",), gguf=("qwen",), from_hf=_qwen, from_gguf=_gguf("qwen"),
        hf_names=names("transformer.h.{i}.", {
            "attn_norm": "ln_1", **qkv("attn.c_attn"), "attn.o": "attn.c_proj", "mlp_norm": "ln_2",
            "mlp.gate": "mlp.w2", "mlp.up": "mlp.w1", "mlp.down": "mlp.c_proj",
        }, {"embed": "transformer.wte", "final_norm": "transformer.ln_f", "head": "lm_head"}),
        gguf_names=gguf_names(**GGUF_QKV), ignored=("*.rotary_emb.inv_freq",),
    ),
    Family(
        name="baichuan", architectures=("BaichuanForCausalLM", "BaiChuanForCausalLM"), gguf=("baichuan",),
        from_hf=_baichuan, from_gguf=_baichuan_gguf, hf_names=_BAICHUAN_NAMES, gguf_names=gguf_names(),
        gguf_pairs=True, claims=lambda fields: not _is_second(fields), ignored=("*.rotary_emb.inv_freq",),
    ),
    Family(
        name="baichuan2", architectures=("BaichuanForCausalLM",), gguf=(), from_hf=_baichuan,
        from_gguf=_baichuan_gguf, hf_names=_BAICHUAN_NAMES, gguf_names=gguf_names(), unit_head=True, claims=_is_second,
        ignored=("*.rotary_emb.inv_freq",),
    ),
    Family(
        name="internlm2", architectures=("InternLM2ForCausalLM",), gguf=("internlm2",), from_hf=_internlm2,
        from_gguf=_gguf("internlm2"),
        hf_names=names("model.layers.{i}.", {
            "attn_norm": "attention_norm", **qkv("attention.wqkv", groups="kv_heads"), "attn.o": "attention.wo",
            "mlp_norm": "ffn_norm", "mlp.gate": "feed_forward.w1", "mlp.up": "feed_forward.w3",
            "mlp.down": "feed_forward.w2",
        }, {"embed": "model.tok_embeddings", "final_norm": "model.norm", "head": "output"}),
        gguf_names=gguf_names(), gguf_pairs=True,
    ),
    Family(
        name="minicpm", architectures=("MiniCPMForCausalLM",), gguf=("minicpm",), from_hf=_minicpm,
        from_gguf=_minicpm_gguf, hf_names=HF_NAMES, gguf_names=gguf_names(), gguf_pairs=True,
    ),
)  # fmt: skip
