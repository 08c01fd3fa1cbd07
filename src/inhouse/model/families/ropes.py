"""Reading rotary settings, in the three forms that are about: `rope_scaling`, `rope_parameters`, GGUF keys."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from inhouse.core.errors import FormatError
from inhouse.model.families.family import Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.rotary import yarn_attention_factor
from inhouse.model.spec import RopeSpec

_STRETCHED = ("linear", "yarn")  # scalings whose factor says how far the context goes


def rope_from_hf(
    fields: Fields,
    head_dim: int,
    trained: int,
    *,
    theta: float = 10000.0,
    theta_key: str = "rope_theta",
    partial: float = 0.0,
    partial_key: str = "partial_rotary_factor",
    interleaved: bool = False,
) -> RopeSpec:
    """RopeSpec of a Hugging Face config; `trained` is its max_position_embeddings. Raises UnsupportedError for a rope
    type or key that is not known, FormatError where `rope_scaling`, `rope_parameters` and `rope_theta` contradict one
    another (transformers 5 would take `rope_scaling`, older ones and other readers differ).

    `partial`: the part of a head that is rotated where the config is silent; 0: the whole head, and a config that says
    otherwise is refused, because the original ignores it for some rope types and not for others."""
    theta = _theta(fields, theta, theta_key)
    part = _partial(fields, partial, partial_key)
    outer_original = fields.raw("original_max_position_embeddings")
    scaling = _one_of_two(fields, theta)
    if scaling is None:
        return RopeSpec(dim=int(head_dim * part), theta=theta, interleaved=interleaved)
    inner = _theta(scaling, theta, "rope_theta")
    if fields.raw(theta_key) is not None and inner != theta:
        raise FormatError(
            f"config.json has rope_theta = {theta:g}, and rope_theta = {inner:g} beside the rope type",
            remedy="Remove the one that the model was not trained with", param="rope_theta",
        )  # fmt: skip
    part = _partial(scaling, part if partial else 0.0, "partial_rotary_factor")
    plain = RopeSpec(dim=int(head_dim * part), theta=inner, interleaved=interleaved)
    return _rope_of(scaling, plain, outer_original or trained, trained)


def _rope_of(scaling: Fields, plain: RopeSpec, original: int, trained: int) -> RopeSpec:
    """The rotation `plain`, stretched as a `rope_parameters` says; every key of it is read or refused."""
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    scaling.expect("type", (kind,))
    original = scaling.integer("original_max_position_embeddings", original)
    rope = _hf_kinds(scaling, kind, plain, original, trained)
    scaling.refuse_rest(("finetuned",))
    return rope


def ropes_by_layer(
    fields: Fields, head_dim: int, trained: int, *, theta: float, sliding_theta: float, sliding_key: str = ""
) -> tuple[RopeSpec, RopeSpec]:
    """The rotations of full and of sliding layers: `rope_parameters` with one entry for each (transformers 5), or
    `rope_theta` and `rope_scaling` for full layers and the base under `sliding_key` for sliding ones."""
    both = fields.nested("rope_parameters")
    if both is None or not both.has("full_attention"):
        sliding = fields.number(sliding_key, sliding_theta) if sliding_key else sliding_theta
        return rope_from_hf(fields, head_dim, trained, theta=theta), RopeSpec(head_dim, sliding)
    made = []
    for key, default in (("full_attention", theta), ("sliding_attention", sliding_theta)):
        one = both.nested(key)
        plain = RopeSpec(head_dim, _theta(one, default, "rope_theta") if one else default)
        made.append(_rope_of(one, plain, trained, trained) if one else plain)
    both.refuse_rest()
    fields.raw("rope_scaling")
    return made[0], made[1]


def _partial(fields: Fields, default: float, key: str) -> float:
    if not default:
        fields.expect(key, (1, 1.0))
        return 1.0
    part = fields.number(key, default)
    if not 0.0 < part <= 1.0:
        raise FormatError(f"config.json has {key} = {part:g}, expected above 0, at most 1", param=key)
    return part


def _theta(fields: Fields, default: float, key: str) -> float:
    theta = fields.number(key, default)
    if theta <= 0:
        raise FormatError(f"config.json has {key} = {theta:g}, expected more than 0", param=key)
    return theta


def _one_of_two(fields: Fields, theta: float) -> Fields | None:
    """The settings under `rope_parameters` (transformers 5) or `rope_scaling` (before); both may be there and agree."""
    newer, older = fields.nested("rope_parameters"), fields.nested("rope_scaling")
    if newer and older:
        ours, theirs = (_meaning(fields.raw(key), theta) for key in ("rope_parameters", "rope_scaling"))
        if ours != theirs:
            key = min(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            raise FormatError(
                f"config.json has both rope_parameters and rope_scaling, and they differ in {key}: "
                f"{ours.get(key)!r:.40} and {theirs.get(key)!r:.40}",
                remedy="Remove the one that the model was not trained with", param="rope_scaling",
            )  # fmt: skip
    return newer or older


def _meaning(settings: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """Settings in one spelling, without what says nothing."""
    plain = {str(key): value for key, value in settings.items() if value is not None and key != "finetuned"}
    kind = plain.pop("type", "default")
    plain.setdefault("rope_type", kind)
    plain.setdefault("rope_theta", theta)
    return plain


def _hf_kinds(scaling: Fields, kind: str, plain: RopeSpec, original: int, trained: int) -> RopeSpec:
    match kind:
        case "default":
            scaling.raw("factor")  # without effect for this type
            return plain
        case "linear" | "dynamic":
            return replace(plain, scaling=kind, factor=scaling.number("factor"), original_context=trained)
        case "llama3":
            return replace(
                plain, scaling="llama3", factor=scaling.number("factor"), original_context=original,
                low_freq_factor=scaling.number("low_freq_factor"), high_freq_factor=scaling.number("high_freq_factor"),
            )  # fmt: skip
        case "yarn":
            return _hf_yarn(scaling, plain, original, trained)
        case "longrope" | "su":
            return _hf_longrope(scaling, plain, original, trained)
    raise scaling.unsupported("rope_type", kind)


def _hf_longrope(scaling: Fields, plain: RopeSpec, original: int, trained: int) -> RopeSpec:
    """arXiv 2402.13753, as Phi-3 has it; Phi-3.5-MoE says what multiplies cos and sin, for short and long sequences."""
    scaling.raw("factor")  # what counts is how far the context goes
    short, long = scaling.number("short_mscale", 0.0), scaling.number("long_mscale", 0.0)
    if short != long:
        raise scaling.unsupported("short_mscale", short)
    return longrope(
        plain, original, trained, _floats(scaling, "short_factor"), _floats(scaling, "long_factor"),
        short or scaling.number("attention_factor", 0.0),
    )  # fmt: skip


def longrope(
    plain: RopeSpec, original: int, trained: int, short: tuple[float, ...], long: tuple[float, ...], attention: float
) -> RopeSpec:
    """The rotation `plain` with a factor for each frequency; `attention` (0: by the lengths) multiplies cos and sin."""
    stretch = trained / max(original, 1)
    if not attention:
        attention = math.sqrt(1.0 + math.log(stretch) / math.log(original)) if stretch > 1.0 and original > 1 else 1.0
    return replace(
        plain, scaling="longrope", original_context=original, factors=short, long_factors=long,
        attention_factor=attention,
    )  # fmt: skip


def _floats(fields: Fields, key: str) -> tuple[float, ...]:
    values = fields.raw(key)
    if not isinstance(values, list) or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise fields.unsupported(key, values)
    return tuple(float(value) for value in values)


def _hf_yarn(scaling: Fields, plain: RopeSpec, original: int, trained: int) -> RopeSpec:
    factor = scaling.number("factor", trained / max(original, 1))
    mscale, all_dim = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    attention = yarn_attention_factor(factor)
    if min(mscale, all_dim) < 0.0:
        raise scaling.unsupported("mscale", min(mscale, all_dim))
    if mscale and all_dim:
        attention = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, all_dim)
    return replace(
        plain, scaling="yarn", factor=factor, original_context=original,
        beta_fast=scaling.number("beta_fast", 32.0), beta_slow=scaling.number("beta_slow", 1.0),
        attention_factor=scaling.number("attention_factor", attention), truncate=scaling.flag("truncate", True),
    )  # fmt: skip


def rope_from_gguf(
    fields: Fields,
    head_dim: int,
    trained: int,
    tensors: Tensors,
    *,
    interleaved: bool = False,
    theta: float = 10000.0,
    latent: bool = False,
) -> RopeSpec:
    """RopeSpec of GGUF metadata; per-frequency factors (Llama 3.1) come from the tensor `rope_freqs.weight`. `latent`:
    the caller takes YaRN's multiplier of the scores into their scale."""
    dim, theta = fields.integer("rope.dimension_count", head_dim), fields.number("rope.freq_base", theta)
    plain = RopeSpec(dim, theta, interleaved=interleaved)
    kind = fields.text("rope.scaling.type", "linear")  # absent: a factor alone is linear; "none" says not to scale
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    original = fields.integer("rope.scaling.original_context_length", trained)
    if not latent:
        fields.expect("rope.scaling.yarn_log_multiplier", (0, 0.0))
    extra = fields.number("rope.scaling.attn_factor", fields.number("rope.scaling.yarn_attn_factor", 1.0))
    fields.expect("rope.scaling.yarn_ext_factor", (1, 1.0, -1, -1.0))
    fast, slow = fields.number("rope.scaling.yarn_beta_fast", 32.0), fields.number("rope.scaling.yarn_beta_slow", 1.0)
    if kind == "none":
        factor = 1.0
    if "rope_freqs.weight" in tensors.names or tensors.rope_factors:
        if kind not in ("none", "linear") or factor != 1.0:
            raise fields.unsupported("rope.scaling.type", kind)
        return replace(plain, scaling="factors", factors=tensors.rope_factors)
    if tensors.longrope[0]:
        return longrope(plain, original, trained, *tensors.longrope, extra if extra != 1.0 else 0.0)
    if kind == "yarn":
        attention = yarn_attention_factor(factor) * extra
        return replace(
            plain, scaling="yarn", factor=factor, original_context=original, beta_fast=fast, beta_slow=slow,
            attention_factor=attention,
        )  # fmt: skip
    if kind not in ("none", "linear"):
        raise fields.unsupported("rope.scaling.type", kind)
    if extra != 1.0:
        raise fields.unsupported("rope.scaling.attn_factor", extra)
    if factor == 1.0:
        return plain
    return replace(plain, scaling="linear", factor=factor, original_context=trained)


def context_length(rope: RopeSpec | None, trained: int) -> int:
    """Positions that the model is good for: stretched scalings reach `factor` times what they were trained on.

    Dynamic NTK stays at the trained length, where it changes nothing: beyond it the frequencies would follow each
    sequence's length, and we fix them at load.
    """
    if rope is not None and rope.scaling in _STRETCHED:
        return max(trained, round(rope.original_context * rope.factor))
    return trained
