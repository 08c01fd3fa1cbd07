"""Llama 1, 2, 3.x and Mistral, with the many models that call themselves so, and Yi under its first name."""

from inhouse.model.families import decoder
from inhouse.model.families.family import Family, Place, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.spec import LIMITS, ModelSpec


def _llama(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2302.13971, 2307.09288, 2407.21783."""
    bias = fields.flag("attention_bias", False)
    windows = decoder.hf_windows(fields, 0, ())
    mlp_bias = fields.flag("mlp_bias", False)
    fields.expect("rope_interleaved", (False,))
    return decoder.from_hf(
        fields, tensors, "llama", windows=windows, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias, context=2048,
        inert=("is_llama_config", "max_sequence_length"),
    )  # fmt: skip


def _mistral(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2310.06825: every layer slides unless `sliding_window` is null."""
    window = decoder.hf_window(fields)
    layers = min(fields.integer("num_hidden_layers"), LIMITS["layers"])
    windows = decoder.hf_windows(fields, window, (True,) * layers)
    return decoder.from_hf(fields, tensors, "mistral", windows=windows, context=131072)


def _gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    spec = decoder.from_gguf(fields, tensors, "llama")
    if spec.rope is not None and spec.rope.dim != spec.head_dim:  # its q and k rows are paired over the whole head
        raise fields.unsupported("rope.dimension_count", spec.rope.dim)
    return spec


# Yi's own code, before it was called Llama, had these names.
_YI_NORMS = {"attn_norm": ("input_layernorm", "ln1"), "mlp_norm": ("post_attention_layernorm", "ln2")}
_NAMES: dict[str, Place] = {
    f"layers.{{i}}.{ours}": tuple(f"model.layers.{{i}}.{name}.weight" for name in theirs)
    for ours, theirs in _YI_NORMS.items()
}

ROWS = (
    Family(
        name="llama",
        architectures=("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel", "YiForCausalLM"),
        gguf=("llama",),
        from_hf=_llama,
        from_gguf=_gguf,
        hf_names={**decoder.HF_NAMES, **_NAMES},
        prefix="model.",
        gguf_names=decoder.GGUF_NAMES,
        gguf_pairs=True,
        ignored=("model.layers.*.self_attn.rotary_emb.inv_freq",),
    ),
    Family(
        name="mistral",
        architectures=("MistralForCausalLM", "MistralModel"),
        gguf=(),  # GGUF calls it llama
        from_hf=_mistral,
        from_gguf=_gguf,
        hf_names=decoder.HF_NAMES,
        prefix="model.",
        gguf_names=decoder.GGUF_NAMES,
        gguf_pairs=True,
    ),
)
