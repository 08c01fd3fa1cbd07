"""Phi-3 and Phi-4, and GLM-4: fused gate and up."""

from typing import Any

from inhouse.model.families import decoder
from inhouse.model.families.family import Family, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.families.names import GGUF_GATE_UP, GGUF_QKV, gate_up, gguf_names, names, qkv
from inhouse.model.spec import LIMITS, ModelSpec


def _phi3(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2404.14219, 2412.08905."""
    window = fields.integer("sliding_window", 0)
    layers = min(fields.integer("num_hidden_layers"), LIMITS["layers"])
    bias = fields.flag("attention_bias", False)
    fields.expect_all({"mlp_bias": False, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False})
    return decoder.from_hf(
        fields, tensors, "phi3", context=4096, eps=1e-5, rope={"partial": 1.0}, qkv_bias=bias, o_bias=bias,
        windows=decoder.hf_windows(fields, window, (True,) * layers), inert=("embd_layer",),
    )  # fmt: skip


def _phi3_gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    return decoder.from_gguf(fields, tensors, "phi3")


def _glm(fields: Fields, tensors: Tensors, family: str = "glm", **switches: Any) -> ModelSpec:
    """arXiv 2406.12793, as transformers writes GLM-4 (`glm`) and GLM-4-0414 (`glm4`)."""
    bias = fields.flag("attention_bias", False)
    return decoder.from_hf(
        fields, tensors, family, head_dim=128, context=131072, eps=1.5625e-07,
        rope={"partial": 0.5, "interleaved": True}, qkv_bias=bias, **switches,
    )  # fmt: skip


def _glm4(fields: Fields, tensors: Tensors) -> ModelSpec:
    return _glm(fields, tensors, "glm4", post_norm=True)


def _glm4_gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    post = "blk.0.post_attention_norm.weight" in tensors.names
    return decoder.from_gguf(fields, tensors, "glm4" if post else "glm", rope={"interleaved": True}, post_norm=post)


_PARTS: dict[str, Any] = {
    "attn_norm": "input_layernorm", "attn.o": "self_attn.o_proj", **gate_up("mlp.gate_up_proj"),
    "mlp.down": "mlp.down_proj",
}  # fmt: skip
_SPLIT: dict[str, Any] = {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj"}
_OUTER = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}

ROWS = (
    Family(
        name="phi3", architectures=("Phi3ForCausalLM",), gguf=("phi3",), from_hf=_phi3, from_gguf=_phi3_gguf,
        hf_names=names("model.layers.{i}.", {
            **_PARTS, **qkv("self_attn.qkv_proj"), "mlp_norm": "post_attention_layernorm",
        }, _OUTER),
        gguf_names=gguf_names(**GGUF_QKV, **GGUF_GATE_UP),
    ),
    Family(
        name="glm", architectures=("GlmForCausalLM",), gguf=(), from_hf=_glm, from_gguf=_glm4_gguf,
        hf_names=names("model.layers.{i}.", {
            **_PARTS, **_SPLIT, "mlp_norm": "post_attention_layernorm",
        }, _OUTER),
        gguf_names=gguf_names(**GGUF_GATE_UP), ignored=("*.rotary_emb.inv_freq",),
    ),
    Family(
        name="glm4", architectures=("Glm4ForCausalLM",), gguf=("glm4",), from_hf=_glm4, from_gguf=_glm4_gguf,
        hf_names=names("model.layers.{i}.", {
            **_PARTS, **_SPLIT, "attn_post_norm": "post_self_attn_layernorm",
            "mlp_norm": "post_attention_layernorm", "mlp_post_norm": "post_mlp_layernorm",
        }, _OUTER),
        gguf_names=gguf_names(**GGUF_GATE_UP),
    ),
)  # fmt: skip
