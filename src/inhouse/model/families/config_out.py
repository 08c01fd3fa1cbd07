"""Specs back to configurations: config.json of Hugging Face, and the key-value table of GGUF.

What is written is read again by the family's own row, and has to mean the same model: what a form cannot say is an
error, never a guess. Knows keys; not tensors' contents.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.model.build import Spec
from inhouse.model.families.family import Derive, Family
from inhouse.model.families.kv_cache import GGUF_KEY, kv_key
from inhouse.model.families.table import resolve
from inhouse.model.rotary import inverse_frequencies
from inhouse.model.spec import ModelSpec, RopeSpec

ROPE_FACTORS = "rope_freqs.weight"
_CALLED = {"mistral": "llama"}  # families whose GGUF files bear another's name
_SAYS_PARALLEL = ("gptneox", "stablelm")  # architectures with a key for parallel parts
_LLAMA3 = (8.0, 32.0)  # factors that Llama 3.1 to 3.3 were published with


class _Names(Collection[str]):
    """Names of a form as if all were there: what a family would read, before anything is written."""

    def __init__(self, family: Family, gguf: bool) -> None:
        self._no = frozenset() if gguf else frozenset({_first(family.gguf_names["embed.weight"])})

    def __contains__(self, name: object) -> bool:
        return name not in self._no

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _first(place: Any) -> str:
    return place if isinstance(place, str) else str(place.name)


def derive_target(family: Family, spec: Spec, gguf: bool) -> dict[str, Derive]:
    """Canonical name -> where it would come from in a file of that form. Raises UnsupportedError if the form has none
    of this family."""
    if not isinstance(spec, ModelSpec):
        raise UnsupportedError(f"{family.name} is no decoder; only decoders are exported")
    table = family.gguf_names if gguf else family.hf_names
    if not table:
        raise UnsupportedError(f"{family.name} has no names in {'GGUF' if gguf else 'Hugging Face'} files")
    try:
        return family.derive(spec, _Names(family, gguf))
    except KeyError as error:
        form = "GGUF" if gguf else "Hugging Face"
        raise UnsupportedError(f"{family.name} has no name for {error.args[0]} in {form} files") from None


def gguf_architecture(family: Family) -> str:
    """`general.architecture` of a family's files. Raises UnsupportedError where GGUF has none."""
    if not family.gguf and family.name not in _CALLED:
        raise UnsupportedError(f"GGUF has no architecture for {family.name} that we read", param="architectures")
    return family.gguf[0] if family.gguf else _CALLED[family.name]


def gguf_norm_offset(spec: ModelSpec) -> float:
    """What GGUF adds to the weights of norms, once and for all (Gemma: 1)."""
    return spec.norm_offset


def rope_factors(rope: RopeSpec | None, context: int) -> np.ndarray | None:
    """float32 [dim / 2]: what GGUF's `rope_freqs.weight` divides each frequency by; None where keys say it all."""
    if rope is None or rope.scaling not in ("llama3", "factors"):
        return None
    plain = inverse_frequencies(RopeSpec(rope.dim, rope.theta), context).astype(np.float64)
    return (plain / inverse_frequencies(rope, context)).astype(np.float32)


def gguf_table(spec: ModelSpec, family: Family, names: Collection[str]) -> dict[str, Any]:
    """The keys of a model's GGUF file that describe its computation.

    Args:
        names: tensor names that the file will hold.

    Raises UnsupportedError naming what GGUF, as this family is read, cannot say.
    """
    arch = gguf_architecture(family)
    rope = spec.rope
    keys: dict[str, Any] = {
        "context_length": _trained(spec),
        "embedding_length": spec.hidden,
        "block_count": spec.layers,
        "feed_forward_length": spec.ffn,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "vocab_size": spec.vocab_size,
    }
    keys["attention.layer_norm_rms_epsilon" if spec.norm == "rms" else "attention.layer_norm_epsilon"] = spec.norm_eps
    if rope is not None:
        keys |= {"rope.dimension_count": rope.dim, "rope.freq_base": rope.theta} | _gguf_rope(rope)
    keys |= {"attention.key_length": spec.head_dim, "attention.value_length": spec.head_dim}
    sliding = {window for window in spec.windows if window}
    if len(sliding) == 1:  # which layers slide is the architecture's own pattern; reading back tells if it is not
        keys["attention.sliding_window"] = sliding.pop()
    keys |= _gguf_scales(spec, arch)
    table = {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in keys.items()}
    if spec.kv_cache:
        table[GGUF_KEY] = spec.kv_cache
    stored = {key: np.float32(value).item() if isinstance(value, float) else value for key, value in table.items()}
    factors = rope_factors(rope, spec.context_length)
    written = replace(spec, norm_offset=spec.norm_offset - gguf_norm_offset(spec))
    require_same(written, stored, names, () if factors is None else factors.tolist(), f"GGUF's {arch}")
    return table


def _gguf_scales(spec: ModelSpec, arch: str) -> dict[str, Any]:
    """Keys of what is scaled, capped or side by side, where that is not the usual."""
    keys: dict[str, Any] = {}
    if spec.logit_softcap:
        keys["final_logit_softcapping"] = spec.logit_softcap
    if spec.attention_softcap:
        keys["attn_logit_softcapping"] = spec.attention_softcap
    if arch == "granite":
        keys |= {"embedding_scale": spec.embed_scale, "residual_scale": spec.residual_scale}
        keys |= {"logit_scale": 1.0 / spec.logit_scale, "attention.scale": spec.scale}
    elif spec.logit_scale != 1.0:
        keys["logit_scale"] = spec.logit_scale
    if arch in _SAYS_PARALLEL:
        keys["use_parallel_residual"] = spec.parallel_norms > 0
    return keys


def _gguf_rope(rope: RopeSpec) -> dict[str, Any]:
    if rope.scaling == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    if rope.scaling == "yarn":
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope.factor,
            "rope.scaling.original_context_length": rope.original_context,
        }
    return {}


def _trained(spec: ModelSpec) -> int:
    """The context length that the config states: stretched scalings state what they were trained on."""
    rope = spec.rope
    stretched = rope is not None and rope.scaling in ("linear", "yarn") and rope.original_context
    return rope.original_context if stretched and rope is not None else spec.context_length


def hf_config(spec: ModelSpec, family: Family, names: Collection[str]) -> dict[str, Any]:
    """config.json of a model that came without one (GGUF).

    Raises UnsupportedError naming what it cannot say for this family.
    """
    config: dict[str, Any] = {
        "architectures": [family.architectures[0]],
        "model_type": family.name,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": _trained(spec),
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(spec.activation, spec.activation),
        "tie_word_embeddings": spec.tied,
    }
    if spec.head_dim * spec.heads != spec.hidden or family.name == "qwen3":
        config["head_dim"] = spec.head_dim
    if spec.qkv_bias and family.name != "qwen2":
        config["attention_bias"] = True
    if spec.mlp_bias:
        config["mlp_bias"] = True
    if len(set(spec.windows)) == 1 and spec.windows[0]:
        config |= {"sliding_window": spec.windows[0]}
    if spec.rope is not None:
        config |= {"rope_theta": spec.rope.theta} | _hf_rope(spec.rope, spec.context_length)
    config |= kv_key(spec)
    require_same(spec, config, names, (), "config.json")
    return config


def _hf_rope(rope: RopeSpec, context: int) -> dict[str, Any]:
    match rope.scaling:
        case "none":
            return {}
        case "linear":
            return {"rope_scaling": {"rope_type": "linear", "factor": rope.factor}}
        case "yarn":
            return {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": rope.factor,
                    "original_max_position_embeddings": rope.original_context,
                    "attention_factor": rope.attention_factor,
                    "beta_fast": rope.beta_fast,
                    "beta_slow": rope.beta_slow,
                }
            }
        case "factors":
            wanted = inverse_frequencies(rope, context)
            for factor in _LLAMA3:
                guess = RopeSpec(rope.dim, rope.theta, scaling="llama3", factor=factor, original_context=8192)
                if np.allclose(inverse_frequencies(guess, context), wanted, rtol=1e-5):
                    return {
                        "rope_scaling": {
                            "rope_type": "llama3",
                            "factor": factor,
                            "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 8192,
                        }
                    }
    raise UnsupportedError(f"config.json has no words for the rope scaling {rope.scaling!r} of this model")


def require_same(spec: Spec, config: Mapping[str, Any], names: Collection[str], factors: Any, what: str) -> None:
    """Raises UnsupportedError unless the config, read again, means `spec`."""
    try:
        found, _ = resolve(config, set(names), factors)
    except FormatError as error:
        raise UnsupportedError(f"{what} cannot hold this model: {error.message}") from None
    if type(found) is not type(spec):
        raise UnsupportedError(f"{what} cannot hold this model")
    differ = [
        name
        for name in spec.__dataclass_fields__
        if name not in ("rope", "family") and not _alike(getattr(spec, name), getattr(found, name))
    ]
    if isinstance(spec, ModelSpec) and isinstance(found, ModelSpec) and not _same_rope(spec, found):
        differ.append("rope")
    if differ:
        text = ", ".join(f"{name} ({getattr(spec, name)!r:.40})" for name in differ[:4])
        raise UnsupportedError(f"{what} cannot say this of the model: {text}", param=differ[0])


def _alike(ours: Any, theirs: Any) -> bool:
    """Equal, or as near as f32 keeps a fraction."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return abs(ours - theirs) <= 1e-6 * max(abs(ours), abs(theirs))
    return bool(ours == theirs)


def _same_rope(spec: ModelSpec, found: ModelSpec) -> bool:
    ours, theirs = spec.rope, found.rope
    if ours is None or theirs is None:
        return ours is theirs
    alike = {"scaling": "none", "factor": 1.0, "original_context": 0, "factors": (), "long_factors": (), "theta": 2.0}
    alike |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if replace(ours, **alike) != replace(theirs, **alike):  # type: ignore[arg-type]
        return False
    a, b = (inverse_frequencies(rope, spec.context_length) for rope in (ours, theirs))
    return bool(np.allclose(a, b, rtol=1e-5, atol=0))
