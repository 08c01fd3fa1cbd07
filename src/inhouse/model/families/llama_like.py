"""Families that are Llama but for a switch or two: SmolLM3, Granite, OLMo 2 and 3, Cohere, StableLM, EXAONE 4, Helium,
Seed-OSS, ERNIE 4.5."""

from typing import Any

from inhouse.core.errors import FormatError
from inhouse.model.families import decoder
from inhouse.model.families.decoder import HF_NAMES, Keys
from inhouse.model.families.family import Family, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.families.names import gguf_names
from inhouse.model.families.ropes import ropes_by_layer
from inhouse.model.spec import LIMITS, ModelSpec


def _layers(fields: Fields) -> range:
    return range(min(fields.integer("num_hidden_layers"), LIMITS["layers"]))


def _bias(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("attention_bias", False)
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": fields.flag("mlp_bias", False)}


def _smollm3(fields: Fields, tensors: Tensors) -> ModelSpec:
    """huggingface.co/blog/smollm3: every fourth layer has no positions."""
    every = fields.integer("no_rope_layer_interval", 4)
    rotates = fields.raw("no_rope_layers")  # 1: it rotates, whatever the name says
    if rotates is None:
        rotates = [int((i + 1) % max(every, 1) != 0) for i in _layers(fields)]
    if not isinstance(rotates, list) or any(one not in (0, 1) for one in rotates):
        raise fields.unsupported("no_rope_layers", rotates)
    window = decoder.hf_window(fields) if fields.flag("use_sliding_window", False) else 0
    slides = tuple(bool(one) for one in rotates)
    return decoder.from_hf(
        fields, tensors, "smollm3", context=32768, tied=True, rope={"theta": 2e6},
        inert=("sliding_window", "max_window_layers"),
        rope_layers=tuple(0 if one else -1 for one in rotates), windows=decoder.hf_windows(fields, window, slides),
        **_bias(fields),
    )  # fmt: skip


def _smollm3_gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    layers = min(fields.integer("block_count"), LIMITS["layers"])
    return decoder.from_gguf(
        fields, tensors, "smollm3", rope_layers=tuple(0 if (i + 1) % 4 else -1 for i in range(layers))
    )


def _granite(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2407.13739; its multipliers come from maximal update parametrisation."""
    return decoder.from_hf(
        fields, tensors, "granite", attention_scale=fields.number("attention_multiplier", 1.0),
        embed_scale=fields.number("embedding_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_scale=1.0 / (fields.number("logits_scaling", 1.0) or 1.0), **_bias(fields),
    )  # fmt: skip


def _granite_gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    return decoder.from_gguf(
        fields, tensors, "granite", attention_scale=fields.number("attention.scale", 0.0),
        embed_scale=fields.number("embedding_scale", 1.0), residual_scale=fields.number("residual_scale", 1.0),
        logit_scale=1.0 / (fields.number("logit_scale", 1.0) or 1.0),
    )  # fmt: skip


_POST: dict[str, Any] = {"pre_norm": False, "post_norm": True}


def _olmo2(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2501.00656: norms after the parts alone, and of q and k over their whole width."""
    return decoder.from_hf(fields, tensors, "olmo2", eps=1e-5, qk_norm_width=True, **_POST, **_bias(fields))


def _olmo3(fields: Fields, tensors: Tensors) -> ModelSpec:
    """OLMo 2 with three of four layers sliding, whose rotation is not stretched."""
    window = decoder.hf_window(fields)
    windows = decoder.hf_windows(fields, window, tuple((i + 1) % 4 != 0 for i in _layers(fields)))
    heads = max(fields.integer("num_attention_heads"), 1)
    head_dim, trained = fields.integer("hidden_size") // heads, fields.integer("max_position_embeddings", 2048)
    base = fields.number("rope_theta", 500000.0)
    full, sliding = ropes_by_layer(fields, head_dim, trained, theta=base, sliding_theta=base)
    return decoder.from_hf(
        fields, tensors, "olmo3", eps=1e-5, qk_norm_width=True, windows=windows, rope=full, ropes=(sliding,),
        rope_layers=tuple(int(window > 0) for window in windows), **_POST, **_bias(fields),
    )  # fmt: skip


def _exaone4(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2507.11407: norms after the parts; where layers slide, the full ones have no positions."""
    window = fields.integer("sliding_window", 0)
    pattern = fields.raw("sliding_window_pattern", 4)
    every = len(pattern) if isinstance(pattern, str) else fields.integer("sliding_window_pattern", 4)
    slides = tuple(bool((i + 1) % max(every, 1)) for i in _layers(fields))
    windows = decoder.hf_windows(fields, window, slides)
    return decoder.from_hf(
        fields, tensors, "exaone4", eps=1e-5, qk_norm=True, windows=windows,
        rope_layers=tuple(0 if one else -1 for one in windows), **_POST,
    )  # fmt: skip


def _cohere(fields: Fields, tensors: Tensors, family: str = "cohere", **switches: Any) -> ModelSpec:
    """Command-R: attention and MLP side by side behind one layer norm without a bias."""
    fields.expect_all({
        "use_qk_norm": False, "use_parallel_embedding": False, "use_parallel_block": True, "use_gated_activation": True,
        "use_embedding_sharing": True, "rotary_pct": 1,
    })  # fmt: skip
    return decoder.from_hf(
        fields, tensors, family, Keys(eps="layer_norm_eps"), context=8192, eps=1e-5, tied=True, norm="layer",
        rope={"interleaved": True}, parallel_norms=1, logit_scale=fields.number("logit_scale", 0.0625),
        inert=("model_max_length", "position_embedding_type", "layer_switch", "order_of_interleaved_layers",
               "cache_implementation"),
        **switches, **_bias(fields),
    )  # fmt: skip


def _cohere2(fields: Fields, tensors: Tensors) -> ModelSpec:
    """Command R7B: three of four layers slide, the fourth has no positions."""
    window, pattern = decoder.hf_window(fields), fields.integer("sliding_window_pattern", 4)
    windows = decoder.hf_windows(fields, window, tuple((i + 1) % max(pattern, 1) != 0 for i in _layers(fields)))
    return _cohere(fields, tensors, "cohere2", windows=windows, rope_layers=tuple(0 if one else -1 for one in windows))


def _cohere_gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    return decoder.from_gguf(
        fields, tensors, "cohere", norm="layer", parallel_norms=1, rope={"interleaved": True},
        logit_scale=fields.number("logit_scale", 0.0625),
    )  # fmt: skip


def _stablelm(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2402.17834."""
    fields.expect_all({
        "qk_layernorm": False, "num_heads": fields.integer("num_attention_heads"), "rotary_scaling_factor": 1,
    })  # fmt: skip
    parallel = 1 if fields.flag("use_parallel_residual", False) else 0
    eps = "norm_eps" if fields.has("norm_eps") else "layer_norm_eps"  # the first is of its own code, as is rope_pct
    rope = {"partial": 0.25} | ({"partial_key": "rope_pct"} if fields.has("rope_pct") else {})
    return decoder.from_hf(
        fields, tensors, "stablelm", Keys(eps=eps), context=4096, eps=1e-5, rope=rope,
        norm="layer", norm_bias=True, parallel_norms=parallel, qkv_bias=fields.flag("use_qkv_bias", False),
    )  # fmt: skip


def _stablelm_gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    parallel = 1 if fields.flag("use_parallel_residual", False) else 0
    return decoder.from_gguf(fields, tensors, "stablelm", norm="layer", norm_bias=True, parallel_norms=parallel)


def _helium(fields: Fields, tensors: Tensors) -> ModelSpec:
    """kyutai.org: Llama with interleaved rotary pairs."""
    return decoder.from_hf(
        fields, tensors, "helium", head_dim=128, context=4096, eps=1e-8, rope={"interleaved": True, "theta": 1e5},
        **_bias(fields),
    )  # fmt: skip


def _seed_oss(fields: Fields, tensors: Tensors) -> ModelSpec:
    """github.com/ByteDance-Seed/seed-oss: the biases of q, k, v and of the output each on their own."""
    return decoder.from_hf(
        fields, tensors, "seed_oss", head_dim=128, context=524288, qkv_bias=fields.flag("attention_bias", True),
        o_bias=fields.flag("attention_out_bias", False), mlp_bias=fields.flag("mlp_bias", False),
    )  # fmt: skip


def _ernie(fields: Fields, tensors: Tensors) -> ModelSpec:
    """ERNIE 4.5 (dense): interleaved rotary pairs."""
    bias = fields.flag("use_bias", False)
    return decoder.from_hf(
        fields, tensors, "ernie4_5", head_dim=128, context=131072, eps=1e-5, tied=True,
        rope={"interleaved": True, "theta": 5e5}, qkv_bias=bias, o_bias=bias, mlp_bias=bias,
    )  # fmt: skip


def _gguf(family: str, **switches: Any) -> Any:
    def read(fields: Fields, tensors: Tensors) -> ModelSpec:
        return decoder.from_gguf(fields, tensors, family, **switches)

    return read


def _no_gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    raise FormatError("GGUF has no such architecture")


_BIASES = {"attn_norm_bias": "model.layers.{i}.input_layernorm.bias",
           "mlp_norm_bias": "model.layers.{i}.post_attention_layernorm.bias"}  # fmt: skip
_STABLELM_NAMES = {**HF_NAMES, **{f"layers.{{i}}.{key}": name for key, name in _BIASES.items()},
                   "final_norm_bias": "model.norm.bias"}  # fmt: skip
_POST_NAMES = {
    **HF_NAMES, "layers.{i}.attn_post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}  # fmt: skip
_GGUF = gguf_names()

ROWS = (
    Family("smollm3", ("SmolLM3ForCausalLM",), ("smollm3",), _smollm3, _smollm3_gguf, HF_NAMES, _GGUF,
           gguf_pairs=True),
    Family("granite", ("GraniteForCausalLM",), ("granite",), _granite, _granite_gguf, HF_NAMES, _GGUF, gguf_pairs=True),
    Family("olmo2", ("Olmo2ForCausalLM",), ("olmo2",), _olmo2, _gguf("olmo2", qk_norm_width=True, **_POST),
           _POST_NAMES, _GGUF),
    Family("olmo3", ("Olmo3ForCausalLM",), (), _olmo3, _no_gguf, _POST_NAMES, _GGUF),
    Family("exaone4", ("Exaone4ForCausalLM",), (), _exaone4, _no_gguf, _POST_NAMES, _GGUF),
    Family("cohere", ("CohereForCausalLM",), ("command-r",), _cohere, _cohere_gguf, HF_NAMES, _GGUF),
    Family("cohere2", ("Cohere2ForCausalLM",), (), _cohere2, _no_gguf, HF_NAMES, _GGUF),
    Family("stablelm", ("StableLmForCausalLM", "StableLMEpochForCausalLM"), ("stablelm",), _stablelm, _stablelm_gguf,
           _STABLELM_NAMES, _GGUF, ignored=("*.rotary_emb.inv_freq",)),
    Family("helium", ("HeliumForCausalLM",), (), _helium, _no_gguf, HF_NAMES, _GGUF),
    Family("seed_oss", ("SeedOssForCausalLM",), ("seed_oss",), _seed_oss, _gguf("seed_oss", head_dim=128), HF_NAMES,
           gguf_names(mlp_norm="post_attention_norm")),
    Family("ernie4_5", ("Ernie4_5ForCausalLM",), ("ernie4_5",), _ernie,
           _gguf("ernie4_5", rope={"interleaved": True}), HF_NAMES, _GGUF),
)  # fmt: skip
