"""Gemma 1, 2 and 3 (text): norms with 1 + weight, scaled embeddings, and from 2 on norms around each part."""

from typing import Any

from inhouse.model.families import decoder
from inhouse.model.families.decoder import Keys
from inhouse.model.families.family import Family, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.families.names import gguf_names, names
from inhouse.model.families.ropes import rope_from_gguf, ropes_by_layer
from inhouse.model.spec import LIMITS, ModelSpec, RopeSpec

_HIDDEN_ACT = ("hidden_act", "hidden_activation")
GGUF_LOCAL_THETA = 10000.0


def _common(fields: Fields, tensors: Tensors, family: str, **switches: Any) -> ModelSpec:
    """Gemma 1 and 2's released configs give `hidden_act` gelu beside `hidden_activation`; the tanh form is meant."""
    if fields.raw("hidden_activation") is not None:
        fields.raw("hidden_act")
        key = "hidden_activation"
    else:
        fields.expect("hidden_act", ("gelu", "gelu_pytorch_tanh"))
        key = "hidden_activation"
    bias = fields.flag("attention_bias", False)
    return decoder.from_hf(
        fields, tensors, family, Keys(activation=key), head_dim=256, context=8192, activation="gelu_pytorch_tanh",
        tied=True, qkv_bias=bias, o_bias=bias, norm_offset=1.0, embed_scale=float(fields.integer("hidden_size")) ** 0.5,
        **switches,
    )  # fmt: skip


def _gemma(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2403.08295."""
    return _common(fields, tensors, "gemma")


def _layers(fields: Fields) -> range:
    return range(min(fields.integer("num_hidden_layers"), LIMITS["layers"]))


def _windows(fields: Fields, pattern: int) -> tuple[int, ...]:
    """All layers but every `pattern`-th slide."""
    window = decoder.hf_window(fields)
    return decoder.hf_windows(fields, window, tuple(bool((i + 1) % pattern) for i in _layers(fields)))


def _capped(fields: Fields) -> dict[str, Any]:
    return {
        "attention_softcap": fields.number("attn_logit_softcapping", 0.0),
        "logit_softcap": fields.number("final_logit_softcapping", 0.0),
        "attention_scale": fields.number("query_pre_attn_scalar", 256.0) ** -0.5, "post_norm": True,
    }  # fmt: skip


def _gemma2(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2408.00118: soft caps, every other layer slides."""
    caps = _capped(fields)
    if not fields.has("attn_logit_softcapping"):
        caps["attention_softcap"] = 50.0
    if not fields.has("final_logit_softcapping"):
        caps["logit_softcap"] = 30.0
    return _common(fields, tensors, "gemma2", windows=_windows(fields, 2), inert=("cache_implementation",), **caps)


def _gemma3(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2503.19786: sliding layers rotate by a base of their own; norms of the heads of q and k."""
    pattern = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
    fields.raw("_sliding_window_pattern")
    head_dim, trained = fields.integer("head_dim", 256), fields.integer("max_position_embeddings", 131072)
    full, sliding = ropes_by_layer(
        fields, head_dim, trained, theta=1e6, sliding_theta=1e4, sliding_key="rope_local_base_freq"
    )
    windows = _windows(fields, pattern)
    return _common(
        fields, tensors, "gemma3", windows=windows, rope=full, inert=("cache_implementation",), qk_norm=True,
        **_two_ropes(sliding, windows), **_capped(fields),
    )  # fmt: skip


def _two_ropes(sliding: RopeSpec, windows: tuple[int, ...]) -> dict[str, Any]:
    return {"ropes": (sliding,), "rope_layers": tuple(int(window > 0) for window in windows)}


def _gguf(fields: Fields, tensors: Tensors, family: str, **switches: Any) -> ModelSpec:
    """GGUF keeps the norms with the 1 added."""
    return decoder.from_gguf(
        fields, tensors, family, head_dim=256, activation="gelu_tanh",
        embed_scale=float(fields.integer("embedding_length")) ** 0.5, **switches,
    )  # fmt: skip


def _gemma2_gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    """The scale of attention is not in the file: it is that of the heads, but of hidden / heads in the 27B model."""
    layers, window = fields.integer("block_count"), fields.integer("attention.sliding_window", 4096)
    wide = layers == 46
    return _gguf(
        fields, tensors, "gemma2", post_norm=True,
        windows=tuple(window if i % 2 == 0 else 0 for i in range(min(layers, LIMITS["layers"]))),
        attention_softcap=fields.number("attn_logit_softcapping", 50.0),
        logit_softcap=fields.number("final_logit_softcapping", 30.0),
        attention_scale=(fields.integer("embedding_length") // fields.integer("attention.head_count")) ** -0.5
        if wide else 0.0,
    )  # fmt: skip


def _gemma3_gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    layers, window = fields.integer("block_count"), fields.integer("attention.sliding_window", 0)
    windows = tuple(window if (i + 1) % 6 else 0 for i in range(min(layers, LIMITS["layers"])))
    head_dim = fields.integer("attention.key_length", 256)
    full = rope_from_gguf(fields, head_dim, fields.integer("context_length"), tensors, theta=1e6)
    sliding = RopeSpec(head_dim, fields.number("rope.freq_base_swa", GGUF_LOCAL_THETA))
    wide = layers == 62
    return _gguf(
        fields, tensors, "gemma3", post_norm=True, qk_norm=True, windows=windows, rope=full,
        logit_softcap=fields.number("final_logit_softcapping", 0.0),
        attention_scale=(fields.integer("embedding_length") // fields.integer("attention.head_count")) ** -0.5
        if wide else 0.0, **_two_ropes(sliding, windows),
    )  # fmt: skip


_SANDWICH = names(
    "model.layers.{i}.",
    {
        "attn_norm": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm",
        "attn.k_norm": "self_attn.k_norm", "attn_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj", "mlp_post_norm": "post_feedforward_layernorm",
    },
    {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"},
)  # fmt: skip

ROWS = (
    Family(
        name="gemma", architectures=("GemmaForCausalLM",), gguf=("gemma",), from_hf=_gemma,
        from_gguf=lambda fields, tensors: _gguf(fields, tensors, "gemma"),
        hf_names=decoder.HF_NAMES, gguf_names=gguf_names(), ignored=("*.rotary_emb.inv_freq",),
    ),
    Family(
        name="gemma2", architectures=("Gemma2ForCausalLM",), gguf=("gemma2",), from_hf=_gemma2,
        from_gguf=_gemma2_gguf, hf_names=_SANDWICH, gguf_names=gguf_names(),
    ),
    Family(
        name="gemma3", architectures=("Gemma3ForCausalLM",), gguf=("gemma3",), from_hf=_gemma3,
        from_gguf=_gemma3_gguf, hf_names=_SANDWICH, gguf_names=gguf_names(),
    ),
)  # fmt: skip
