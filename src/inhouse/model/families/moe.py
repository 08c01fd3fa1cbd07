"""Mixtures of experts over plain attention: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, Granite-MoE, Phi-MoE, GLM-4-MoE."""

from collections.abc import Mapping

from inhouse.model.families import decoder, mixtures, qwen
from inhouse.model.families.family import Family, Fused, Place, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.spec import ModelSpec
from inhouse.model.spec_parts import MoeSpec


def _mixtral(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2401.04088. The weights of the chosen experts are their softmax alone: the same as normalised ones."""
    mixtures.skip_inert(fields)
    layers, window = mixtures.every_layer(fields), fields.integer("sliding_window", 0)
    moe = MoeSpec(
        layers, fields.integer("num_local_experts", 8), fields.integer("num_experts_per_tok", 2),
        fields.integer("intermediate_size"),
    )  # fmt: skip
    windows = decoder.hf_windows(fields, window, (True,) * len(layers))
    return mixtures.with_moe(decoder.from_hf(fields, tensors, "mixtral", windows=windows, context=131072), moe)


def _sparse_layers(fields: Fields) -> tuple[int, ...]:
    """Every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name."""
    step, dense = fields.integer("decoder_sparse_step", 1), fields.raw("mlp_only_layers", [])
    if step < 1 or not isinstance(dense, list):
        raise fields.unsupported("decoder_sparse_step", step)
    return tuple(i for i in mixtures.every_layer(fields) if (i + 1) % step == 0 and i not in dense)


def _qwen_experts(fields: Fields) -> int:
    return fields.integer("num_experts", fields.raw("num_local_experts"))


def _qwen2_moe(fields: Fields, tensors: Tensors) -> ModelSpec:
    """Qwen1.5-MoE and Qwen2-MoE (arXiv 2407.10671, section 2.2.2)."""
    normalize = fields.flag("norm_topk_prob", False)
    mixtures.skip_inert(fields)
    moe = MoeSpec(
        _sparse_layers(fields), _qwen_experts(fields), fields.integer("num_experts_per_tok"),
        fields.integer("moe_intermediate_size"), normalize=normalize,
        shared_ffn=fields.integer("shared_expert_intermediate_size"), shared_gate=True,
    )  # fmt: skip
    spec = decoder.from_hf(
        fields, tensors, "qwen2_moe", windows=qwen.windows(fields), qkv_bias=fields.flag("qkv_bias", True),
        context=32768,
    )  # fmt: skip
    return mixtures.with_moe(spec, moe)


def _qwen3_moe(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2505.09388."""
    normalize, bias = fields.flag("norm_topk_prob", False), fields.flag("attention_bias", False)
    mixtures.skip_inert(fields)
    moe = MoeSpec(
        _sparse_layers(fields), _qwen_experts(fields), fields.integer("num_experts_per_tok"),
        fields.integer("moe_intermediate_size"), normalize=normalize,
    )  # fmt: skip
    window = decoder.hf_window(fields) if fields.flag("use_sliding_window", False) else 0
    fields.raw("sliding_window")
    fields.raw("max_window_layers")
    windows = decoder.hf_windows(fields, window, (True,) * len(mixtures.every_layer(fields)))
    spec = decoder.from_hf(
        fields, tensors, "qwen3_moe", windows=windows, qkv_bias=bias, o_bias=bias, qk_norm=True, context=32768
    )
    return mixtures.with_moe(spec, moe)


def _olmoe(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2409.02060: q and k are normalised over all heads at once."""
    normalize, bias = fields.flag("norm_topk_prob", False), fields.flag("attention_bias", False)
    mixtures.skip_inert(fields)
    fields.expect("clip_qkv", ())
    moe = MoeSpec(
        mixtures.every_layer(fields), _qwen_experts(fields), fields.integer("num_experts_per_tok"),
        fields.integer("intermediate_size"), normalize=normalize,
    )  # fmt: skip
    spec = decoder.from_hf(fields, tensors, "olmoe", qkv_bias=bias, o_bias=bias, context=4096)
    return mixtures.with_moe(spec, moe, qk_norm_width=True)


def _granite_moe(fields: Fields, tensors: Tensors) -> ModelSpec:
    """Granite 3.x, 1B-A400M and 3B-A800M: weights are the softmax of the chosen logits; four multipliers."""
    bias = fields.flag("attention_bias", False)
    mixtures.skip_inert(fields)
    moe = MoeSpec(
        mixtures.every_layer(fields), fields.integer("num_local_experts", 8), fields.integer("num_experts_per_tok", 2),
        fields.integer("intermediate_size"), scoring="softmax_after",
        shared_ffn=fields.integer("shared_intermediate_size", 0),
    )  # fmt: skip
    divisor = fields.number("logits_scaling", 1.0)
    switches = {
        "embed_scale": fields.number("embedding_multiplier", 1.0), "logit_scale": 1.0 / divisor if divisor else 0.0,
        "residual_scale": fields.number("residual_multiplier", 1.0),
        "attention_scale": fields.number("attention_multiplier", 1.0),
    }  # fmt: skip
    spec = decoder.from_hf(fields, tensors, "granitemoe", qkv_bias=bias, o_bias=bias, context=2048)
    return mixtures.with_moe(spec, moe, **switches)


def _phimoe(fields: Fields, tensors: Tensors) -> ModelSpec:
    """Phi-3.5-MoE (arXiv 2404.14219): layer norms, and two experts chosen in turn (arXiv 2409.12136)."""
    bias, jitter = fields.flag("attention_bias", False), fields.number("router_jitter_noise", 0.01)
    mixtures.skip_inert(fields)
    moe = MoeSpec(
        mixtures.every_layer(fields), fields.integer("num_local_experts", 16),
        fields.integer("num_experts_per_tok", 2), fields.integer("intermediate_size"), scoring="sparsemixer",
        jitter=jitter,
    )  # fmt: skip
    windows = decoder.hf_windows(fields, fields.integer("sliding_window", 0), (True,) * len(moe.layers))
    head_bias = fields.flag("lm_head_bias", False)
    spec = decoder.from_hf(fields, tensors, "phimoe", windows=windows, qkv_bias=bias, o_bias=bias, context=131072)
    return mixtures.with_moe(spec, moe, norm="layer", norm_bias=True, head_bias=head_bias)


def _glm4_moe(fields: Fields, tensors: Tensors) -> ModelSpec:
    """GLM-4.5 (arXiv 2508.06471): sigmoid scores with a correction, as in DeepSeek-V3, over plain attention."""
    normalize, bias = fields.flag("norm_topk_prob", True), fields.flag("attention_bias", False)
    mixtures.skip_inert(fields)
    groups = mixtures.grouped(fields.integer("n_group", 1), fields.integer("topk_group", 1))
    ffn = fields.integer("moe_intermediate_size")
    moe = MoeSpec(
        mixtures.from_first(fields, "first_k_dense_replace", 1), fields.integer("n_routed_experts"),
        fields.integer("num_experts_per_tok"), ffn, scoring="sigmoid", normalize=normalize,
        scale=fields.number("routed_scaling_factor", 1.0), groups=groups[0], top_groups=groups[1], group_score="top2",
        correction=True, shared_ffn=ffn * fields.integer("n_shared_experts", 1),
    )  # fmt: skip
    qk_norm = fields.flag("use_qk_norm", False)
    spec = decoder.from_hf(
        fields, tensors, "glm4_moe", qkv_bias=bias, qk_norm=qk_norm, context=131072, rope={"partial": 0.5}
    )
    return mixtures.with_moe(spec, moe)


def _qwen_names() -> Mapping[str, Place]:
    shared = "model.layers.{i}.mlp.shared_expert"
    return {
        **decoder.HF_NAMES,
        "layers.{i}.moe.router.weight": "model.layers.{i}.mlp.gate.weight",
        "layers.{i}.moe.shared_gate.weight": "model.layers.{i}.mlp.shared_expert_gate.weight",
        **mixtures.expert_names("model.layers.{i}.mlp", "gate_proj", "up_proj", "down_proj"),
        **mixtures.shared_names(shared),
    }


def _mixtral_names(block: str, router: str) -> Mapping[str, Place]:
    old = mixtures.expert_names(f"model.layers.{{i}}.{block}", "w1", "w3", "w2")
    new = mixtures.expert_names("model.layers.{i}.mlp", "w1", "w3", "w2")
    return {
        **decoder.HF_NAMES,
        "layers.{i}.moe.router.weight": (
            f"model.layers.{{i}}.{block}.gate.weight", f"model.layers.{{i}}.mlp.{router}.weight"
        ),
        **{key: (*_places(old[key]), *_places(new[key])) for key in old},
    }  # fmt: skip


def _places(place: Place) -> tuple[str | Fused, ...]:
    return place if isinstance(place, tuple) else (place,)


def _granite_names() -> Mapping[str, Place]:
    block = "model.layers.{i}.block_sparse_moe"
    both = (
        Fused(f"{block}.input_linear.weight", ("gate", "up"), experts=True),
        Fused(f"{block}.experts.gate_up_proj", ("gate", "up"), experts=True),
    )
    down = (
        Fused(f"{block}.output_linear.weight", experts=True),
        Fused(f"{block}.experts.down_proj", experts=True),
    )
    shared = Fused("model.layers.{i}.shared_mlp.input_linear.weight", ("shared.gate", "shared.up"))
    return {
        **decoder.HF_NAMES,
        "layers.{i}.moe.router.weight": (f"{block}.router.layer.weight", f"{block}.router.weight"),
        f"{mixtures.EXPERT}.gate.weight": both,
        f"{mixtures.EXPERT}.up.weight": both,
        f"{mixtures.EXPERT}.down.weight": down,
        "layers.{i}.moe.shared.gate.weight": shared,
        "layers.{i}.moe.shared.up.weight": shared,
        "layers.{i}.moe.shared.down.weight": "model.layers.{i}.shared_mlp.output_linear.weight",
    }


def _glm4_names() -> Mapping[str, Place]:
    mlp = "model.layers.{i}.mlp"
    return {
        **decoder.HF_NAMES,
        "layers.{i}.moe.router.weight": f"{mlp}.gate.weight",
        "layers.{i}.moe.correction": f"{mlp}.gate.e_score_correction_bias",
        **mixtures.expert_names(mlp, "gate_proj", "up_proj", "down_proj"),
        **mixtures.shared_names(f"{mlp}.shared_experts"),
    }


_NORM_BIASES: Mapping[str, Place] = {
    "layers.{i}.attn_norm_bias": "model.layers.{i}.input_layernorm.bias",
    "layers.{i}.mlp_norm_bias": "model.layers.{i}.post_attention_layernorm.bias",
    "final_norm_bias": "model.norm.bias",
    "head.bias": "lm_head.bias",
}


def _gguf_llama(fields: Fields, tensors: Tensors) -> ModelSpec:
    """Mixtral, which GGUF calls llama."""
    spec = mixtures.gguf_spec(fields, tensors, "mixtral", ())
    if spec.rope is not None and spec.rope.dim != spec.head_dim:  # its q and k rows are paired over the whole head
        raise fields.unsupported("rope.dimension_count", spec.rope.dim)
    return spec


def _gguf_qwen2(fields: Fields, tensors: Tensors) -> ModelSpec:
    shared = fields.integer("expert_shared_feed_forward_length")
    return mixtures.gguf_spec(
        fields, tensors, "qwen2_moe", (), moe={"normalize": False, "shared_ffn": shared, "shared_gate": True}
    )


ROWS = (
    Family(
        name="mixtral",
        architectures=("MixtralForCausalLM",),
        gguf=("llama",),
        mixture=True,
        from_hf=_mixtral,
        from_gguf=_gguf_llama,
        hf_names=_mixtral_names("block_sparse_moe", "gate"),
        gguf_names=mixtures.GGUF_NAMES,
        gguf_pairs=True,
    ),
    Family(
        name="qwen2_moe",
        architectures=("Qwen2MoeForCausalLM",),
        gguf=("qwen2moe",),
        from_hf=_qwen2_moe,
        from_gguf=_gguf_qwen2,
        hf_names=_qwen_names(),
        gguf_names=mixtures.GGUF_NAMES,
    ),
    Family(
        name="qwen3_moe",
        architectures=("Qwen3MoeForCausalLM",),
        gguf=("qwen3moe",),
        from_hf=_qwen3_moe,
        from_gguf=lambda fields, tensors: mixtures.gguf_spec(fields, tensors, "qwen3_moe", (), qk_norm=True),
        hf_names=_qwen_names(),
        gguf_names=mixtures.GGUF_NAMES,
    ),
    Family(
        name="olmoe",
        architectures=("OlmoeForCausalLM",),
        gguf=("olmoe",),
        from_hf=_olmoe,
        from_gguf=lambda fields, tensors: mixtures.gguf_spec(
            fields, tensors, "olmoe", (), moe={"normalize": False}, qk_norm_width=True
        ),
        hf_names=_qwen_names(),
        gguf_names=mixtures.GGUF_NAMES,
    ),
    Family(
        name="granitemoe",
        architectures=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        gguf=(),
        from_hf=_granite_moe,
        from_gguf=mixtures.no_gguf,
        hf_names=_granite_names(),
        gguf_names=mixtures.GGUF_NAMES,
    ),
    Family(
        name="phimoe",
        architectures=("PhimoeForCausalLM", "PhiMoEForCausalLM"),
        gguf=(),
        from_hf=_phimoe,
        from_gguf=mixtures.no_gguf,
        hf_names={**_mixtral_names("block_sparse_moe", "router"), **_NORM_BIASES},
        gguf_names=mixtures.GGUF_NAMES,
    ),
    Family(
        name="glm4_moe",
        architectures=("Glm4MoeForCausalLM",),
        gguf=(),
        from_hf=_glm4_moe,
        from_gguf=mixtures.no_gguf,
        hf_names=_glm4_names(),
        gguf_names=mixtures.GGUF_NAMES,
        ignored=("model.layers.{layers}.*",),  # the layer that predicts a token more
    ),
)
