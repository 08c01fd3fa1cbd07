"""Qwen2, Qwen2.5 and Qwen3 (dense)."""

from inhouse.model.families import decoder
from inhouse.model.families.family import Family, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.spec import LIMITS, ModelSpec


def windows(fields: Fields) -> tuple[int, ...]:
    """Layers from `max_window_layers` on slide, where `use_sliding_window` is on."""
    layers = min(fields.integer("num_hidden_layers"), LIMITS["layers"])
    first = fields.integer("max_window_layers", 28)
    window = decoder.hf_window(fields)
    if not fields.flag("use_sliding_window", False):
        window = 0
    return decoder.hf_windows(fields, window, tuple(i >= first for i in range(layers)))


def _qwen2(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2407.10671: q, k and v have biases, always."""
    return decoder.from_hf(fields, tensors, "qwen2", windows=windows(fields), qkv_bias=True, context=32768)


def _qwen3(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2505.09388: RMS norm of each head of q and k, heads of 128 unless stated."""
    bias = fields.flag("attention_bias", False)
    return decoder.from_hf(
        fields,
        tensors,
        "qwen3",
        windows=windows(fields),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        head_dim=128,
        context=32768,
    )


ROWS = (
    Family(
        name="qwen2",
        architectures=("Qwen2ForCausalLM", "Qwen2Model"),
        gguf=("qwen2",),
        from_hf=_qwen2,
        from_gguf=lambda fields, tensors: decoder.from_gguf(fields, tensors, "qwen2"),
        hf_names=decoder.HF_NAMES,
        prefix="model.",
        gguf_names=decoder.GGUF_NAMES,
    ),
    Family(
        name="qwen3",
        architectures=("Qwen3ForCausalLM", "Qwen3Model"),
        gguf=("qwen3",),
        from_hf=_qwen3,
        from_gguf=lambda fields, tensors: decoder.from_gguf(fields, tensors, "qwen3", qk_norm=True),
        hf_names=decoder.HF_NAMES,
        prefix="model.",
        gguf_names=decoder.GGUF_NAMES,
    ),
)
