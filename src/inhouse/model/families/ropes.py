"""Reading rotary settings, in the three forms that are about: `rope_scaling`, `rope_parameters`, GGUF keys."""

from collections.abc import Mapping
from typing import Any

from inhouse.core.errors import FormatError
from inhouse.model.families.family import Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.rotary import yarn_attention_factor
from inhouse.model.spec import RopeSpec

_STRETCHED = ("linear", "yarn")  # scalings whose factor says how far the context goes


def rope_from_hf(fields: Fields, head_dim: int, trained: int) -> RopeSpec:
    """RopeSpec of a Hugging Face config; `trained` is its max_position_embeddings. Raises UnsupportedError for a rope
    type or key that is not known, FormatError where `rope_scaling`, `rope_parameters` and `rope_theta` contradict one
    another (transformers 5 would take `rope_scaling`, older ones and other readers differ)."""
    theta = _theta(fields, 10000.0)
    fields.expect("partial_rotary_factor", (1, 1.0))  # the original ignores it for some rope types and not for others
    outer_original = fields.raw("original_max_position_embeddings")
    scaling = _one_of_two(fields, theta)
    if scaling is None:
        return RopeSpec(dim=head_dim, theta=theta)
    inner = _theta(scaling, theta)
    if fields.raw("rope_theta") is not None and inner != theta:
        raise FormatError(
            f"config.json has rope_theta = {theta:g}, and rope_theta = {inner:g} beside the rope type",
            remedy="Remove the one that the model was not trained with", param="rope_theta",
        )  # fmt: skip
    theta = inner
    scaling.expect("partial_rotary_factor", (1, 1.0))
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    scaling.expect("type", (kind,))
    original = scaling.integer("original_max_position_embeddings", outer_original or trained)
    rope = _hf_kinds(scaling, kind, RopeSpec(dim=head_dim, theta=theta), original, trained)
    scaling.refuse_rest(("finetuned",))
    return rope


def _theta(fields: Fields, default: float) -> float:
    theta = fields.number("rope_theta", default)
    if theta <= 0:
        raise FormatError(f"config.json has rope_theta = {theta:g}, expected more than 0", param="rope_theta")
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
    dim, theta = plain.dim, plain.theta
    match kind:
        case "default":
            scaling.raw("factor")  # without effect for this type
            return plain
        case "linear":
            return RopeSpec(dim, theta, scaling="linear", factor=scaling.number("factor"), original_context=trained)
        case "dynamic":
            return RopeSpec(dim, theta, scaling="dynamic", factor=scaling.number("factor"), original_context=trained)
        case "llama3":
            return RopeSpec(
                dim, theta, scaling="llama3", factor=scaling.number("factor"), original_context=original,
                low_freq_factor=scaling.number("low_freq_factor"), high_freq_factor=scaling.number("high_freq_factor"),
            )  # fmt: skip
        case "yarn":
            return _hf_yarn(scaling, plain, original, trained)
    raise scaling.unsupported("rope_type", kind)


def _hf_yarn(scaling: Fields, plain: RopeSpec, original: int, trained: int) -> RopeSpec:
    factor = scaling.number("factor", trained / max(original, 1))
    mscale, all_dim = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    attention = yarn_attention_factor(factor)
    if min(mscale, all_dim) < 0.0:
        raise scaling.unsupported("mscale", min(mscale, all_dim))
    if mscale and all_dim:
        attention = yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, all_dim)
    return RopeSpec(
        plain.dim, plain.theta, scaling="yarn", factor=factor, original_context=original,
        beta_fast=scaling.number("beta_fast", 32.0), beta_slow=scaling.number("beta_slow", 1.0),
        attention_factor=scaling.number("attention_factor", attention), truncate=scaling.flag("truncate", True),
    )  # fmt: skip


def rope_from_gguf(fields: Fields, head_dim: int, trained: int, tensors: Tensors, *, latent: bool = False) -> RopeSpec:
    """RopeSpec of GGUF metadata; per-frequency factors (Llama 3.1) come from the tensor `rope_freqs.weight`. `latent`:
    the caller takes YaRN's multiplier of the scores into their scale."""
    dim, theta = fields.integer("rope.dimension_count", head_dim), fields.number("rope.freq_base", 10000.0)
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
        return RopeSpec(dim, theta, scaling="factors", factors=tensors.rope_factors)
    if kind == "yarn":
        attention = yarn_attention_factor(factor) * extra
        return RopeSpec(
            dim, theta, scaling="yarn", factor=factor, original_context=original, beta_fast=fast, beta_slow=slow,
            attention_factor=attention,
        )  # fmt: skip
    if kind not in ("none", "linear"):
        raise fields.unsupported("rope.scaling.type", kind)
    if extra != 1.0:
        raise fields.unsupported("rope.scaling.attn_factor", extra)
    if factor == 1.0:
        return RopeSpec(dim, theta)
    return RopeSpec(dim, theta, scaling="linear", factor=factor, original_context=trained)


def context_length(rope: RopeSpec, trained: int) -> int:
    """Positions that the model is good for: stretched scalings reach `factor` times what they were trained on.

    Dynamic NTK stays at the trained length, where it changes nothing: beyond it the frequencies would follow each
    sequence's length, and we fix them at load.
    """
    if rope.scaling in _STRETCHED:
        return max(trained, round(rope.original_context * rope.factor))
    return trained
