"""gpt-oss (arXiv 2508.10925): sinks, alternating windows, experts with biases and a clamped gate."""

from collections.abc import Mapping
from dataclasses import replace

from inhouse.model.families import decoder, mixtures
from inhouse.model.families.family import Family, Fused, Place, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.spec import ModelSpec
from inhouse.model.spec_parts import MoeSpec

ALPHA = 1.702  # of the gate's sigmoid: the activation quick_gelu
LIMIT = 7.0


def _mixture(layers: tuple[int, ...], experts: int, top_k: int, ffn: int, limit: float) -> MoeSpec:
    return MoeSpec(
        layers, experts, top_k, ffn, activation="quick_gelu", scoring="softmax_after", router_bias=True,
        expert_bias=True, limit=limit, offset=1.0,
    )  # fmt: skip


def _gptoss(fields: Fields, tensors: Tensors) -> ModelSpec:
    mixtures.skip_inert(fields)
    for key in ("initial_context_length", "experts_per_token"):  # said elsewhere too
        fields.raw(key)
    fields.expect("swiglu_alpha", (ALPHA,))
    layers, bias = mixtures.every_layer(fields), fields.flag("attention_bias", True)
    ffn = fields.integer("intermediate_size")
    moe = _mixture(
        layers, fields.integer("num_local_experts"), fields.integer("num_experts_per_tok"), ffn,
        fields.number("swiglu_limit", LIMIT),
    )  # fmt: skip
    windows = decoder.hf_windows(fields, fields.integer("sliding_window", 128), tuple(i % 2 == 0 for i in layers))
    spec = decoder.from_hf(
        fields, tensors, "gpt_oss", windows=windows, qkv_bias=bias, o_bias=bias, head_dim=64, context=131072
    )
    return mixtures.with_moe(spec, moe, sinks=True)


def _gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    layers = mixtures.every_layer(fields, "block_count")
    ffn = fields.integer("expert_feed_forward_length", fields.raw("feed_forward_length"))
    moe = _mixture(layers, fields.integer("expert_count"), fields.integer("expert_used_count"), ffn, LIMIT)
    window = fields.integer("attention.sliding_window", 128)
    spec = decoder.from_gguf(fields, tensors, "gpt_oss", mixture=True)
    windows = tuple(window if i % 2 == 0 else 0 for i in layers) if window else ()
    rope = replace(spec.rope, truncate=False) if spec.rope is not None else None  # as it was trained; no key says so
    return mixtures.with_moe(spec, moe, sinks=True, windows=windows, rope=rope)


def _hf_names() -> Mapping[str, Place]:
    mlp = "model.layers.{i}.mlp"
    gate_up = (
        Fused(f"{mlp}.experts.gate_up_proj", ("gate", "up"), groups="rows", transpose=True, experts=True),
        Fused(f"{mlp}.experts.gate_up_proj_blocks", ("gate", "up"), groups="rows", experts=True),
    )
    biases = Fused(f"{mlp}.experts.gate_up_proj_bias", ("gate", "up"), groups="rows", experts=True)
    return {
        **decoder.HF_NAMES,
        "layers.{i}.attn.sinks": "model.layers.{i}.self_attn.sinks",
        "layers.{i}.moe.router.weight": f"{mlp}.router.weight",
        "layers.{i}.moe.router.bias": f"{mlp}.router.bias",
        f"{mixtures.EXPERT}.gate.weight": gate_up,
        f"{mixtures.EXPERT}.up.weight": gate_up,
        f"{mixtures.EXPERT}.down.weight": (
            Fused(f"{mlp}.experts.down_proj", transpose=True, experts=True),
            Fused(f"{mlp}.experts.down_proj_blocks", experts=True),
        ),
        f"{mixtures.EXPERT}.gate.bias": biases,
        f"{mixtures.EXPERT}.up.bias": biases,
        f"{mixtures.EXPERT}.down.bias": Fused(f"{mlp}.experts.down_proj_bias", experts=True),
    }


GGUF_NAMES: Mapping[str, Place] = {
    **mixtures.GGUF_NAMES,
    "layers.{i}.attn.sinks": "blk.{i}.attn_sinks.weight",
    "layers.{i}.mlp_norm": "blk.{i}.post_attention_norm.weight",
}

ROWS = (
    Family(
        name="gpt_oss",
        architectures=("GptOssForCausalLM",),
        gguf=("gpt-oss",),
        from_hf=_gptoss,
        from_gguf=_gguf,
        hf_names=_hf_names(),
        gguf_names=GGUF_NAMES,
    ),
)
