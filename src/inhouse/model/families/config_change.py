"""config.json of a model whose shape was changed: the old one with other numbers, read again to prove it.

Knows the keys that families call the same numbers by; not what changed them.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from inhouse.core.errors import UnsupportedError
from inhouse.model.build import Spec
from inhouse.model.families.config_out import hf_config, require_same
from inhouse.model.families.family import Family
from inhouse.model.families.kv_cache import KEY as KV_KEY
from inhouse.model.families.kv_cache import kv_key
from inhouse.model.families.sparse_attention import attention_key
from inhouse.model.spec import ModelSpec

# Field of the spec -> what families call it.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"),
    "ffn": ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim", "hidden_dim"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "context_length": ("max_position_embeddings", "n_positions", "seq_length"),
    "head_dim": ("head_dim",),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "layernorm_epsilon"),
}
_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")  # one item a layer


def changed_config(
    config: Mapping[str, Any],
    spec: Spec,
    family: Family,
    names: Collection[str] = (),
    kept_layers: Collection[int] | None = None,
) -> dict[str, Any]:
    """config.json that means `spec`.

    Args:
        config: that of the model before; a GGUF key table, or {}, to write a plain one.
        names: what the reader will know of the tensors (`StoredSource.hints`).
        kept_layers: numbers of the layers that are left, where some are gone; None: all, or the first.

    Raises UnsupportedError naming what config.json cannot say of the model.
    """
    if "architectures" not in config:
        if not isinstance(spec, ModelSpec):
            raise UnsupportedError(f"{family.name} has no config.json and is no decoder")
        return _from_nothing(spec, family, names)
    left_out = ("quantization_config", "compression_config", KV_KEY)
    whole = {key: value for key, value in config.items() if key not in left_out} | kv_key(spec)
    try:
        require_same(spec, whole, names, (), "config.json")
        return whole
    except UnsupportedError:
        changed = _changed(whole, spec, kept_layers)
    try:
        require_same(spec, changed, names, (), "config.json")
    except UnsupportedError:
        if not isinstance(spec, ModelSpec) or not any(spec.windows):
            raise
        changed |= _narrowing(spec)
        require_same(spec, changed, names, (), "config.json")
    return changed


def _narrowing(spec: ModelSpec) -> dict[str, Any]:
    return attention_key(max(spec.windows), spec.window_sink, spec.window_stride)


def _from_nothing(spec: ModelSpec, family: Family, names: Collection[str]) -> dict[str, Any]:
    """A config.json of its own, with the narrowed attention beside it where that is what it cannot say."""
    try:
        return hf_config(spec, family, names)
    except UnsupportedError:
        if not any(spec.windows):
            raise
    config = hf_config(replace(spec, windows=(), window_sink=0, window_stride=0), family, names) | _narrowing(spec)
    require_same(spec, config, names, (), "config.json")
    return config


def _changed(config: dict[str, Any], spec: Spec, kept_layers: Collection[int] | None) -> dict[str, Any]:
    out = dict(config)
    for name, keys in _KEYS.items():
        value = getattr(spec, name, None)
        if value is None:
            continue
        present = [key for key in keys if key in out]
        if name == "context_length" and (not present or out.get("rope_scaling") or out.get("rope_parameters")):
            continue  # what was trained on, not what is allowed now
        if name == "norm_eps" and not present:
            continue
        if name == "head_dim" and not present and spec.hidden == getattr(spec, "heads", 0) * value:
            continue
        for key in present or keys[:1]:
            out[key] = value
    layers = getattr(spec, "layers", 0)
    for key in _LAYER_LISTS:
        if isinstance(out.get(key), list) and len(out[key]) != layers:
            out[key] = _layer_list(key, out[key], spec, kept_layers)
    if hasattr(spec, "tied") and out.get("tie_word_embeddings") != spec.tied:
        out["tie_word_embeddings"] = spec.tied
    return out


def _layer_list(key: str, before: list[Any], spec: Spec, kept_layers: Collection[int] | None) -> list[Any]:
    """The items of the layers that are left; without their numbers, what the spec says of them where it does."""
    layers = getattr(spec, "layers", 0)
    if kept_layers is None and isinstance(spec, ModelSpec):
        if key == "layer_types" and set(before) <= {"full_attention", "sliding_attention"}:
            return ["sliding_attention" if spec.window(i) else "full_attention" for i in range(layers)]
        if key == "no_rope_layers":
            return [int(spec.rope_of(i) is not None) for i in range(layers)]
    which = sorted(kept_layers) if kept_layers is not None else range(layers)
    return [before[i] for i in which if i < len(before)]
