"""What families with mixtures of experts share: their common keys, the names of their tensors, and checks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from inhouse.core.errors import FormatError
from inhouse.model.families import decoder
from inhouse.model.families.family import Fused, Place, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.spec import LIMITS, ModelSpec, check_spec
from inhouse.model.spec_parts import MoeSpec

EXPERT = "layers.{i}.moe.experts.{e}"
MOST_EXPERTS = 4096

# Training's, or what a forward pass may return beside its logits.
INERT = ("router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "router_z_loss_coef", "aux_loss_alpha",
         "seq_aux", "ep_size", "moe_layer_freq", "num_nextn_predict_layers", "num_mtp_layers", "norm_topk_prob",
         "input_jitter_noise")  # fmt: skip


def expert_names(block: str, gate: str, up: str, down: str) -> dict[str, Place]:
    """Places of experts under `block` (`model.layers.{i}.mlp`): a tensor for each, as published checkpoints have them,
    or one for all of them, [experts, gate's rows then up's, hidden], as transformers 5 keeps them."""
    both = Fused(f"{block}.experts.gate_up_proj", ("gate", "up"), experts=True)
    return {
        f"{EXPERT}.gate.weight": (f"{block}.experts.{{e}}.{gate}.weight", both),
        f"{EXPERT}.up.weight": (f"{block}.experts.{{e}}.{up}.weight", both),
        f"{EXPERT}.down.weight": (
            f"{block}.experts.{{e}}.{down}.weight", Fused(f"{block}.experts.down_proj", experts=True),
        ),
    }  # fmt: skip


def shared_names(shared: str) -> dict[str, Place]:
    """Places of the expert that every token takes, under `shared`."""
    parts = ("gate", "up", "down")
    return {f"layers.{{i}}.moe.shared.{part}.weight": f"{shared}.{part}_proj.weight" for part in parts}


def _gguf_experts() -> dict[str, Place]:
    places: dict[str, Place] = {
        "layers.{i}.moe.router.weight": "blk.{i}.ffn_gate_inp.weight",
        "layers.{i}.moe.router.bias": "blk.{i}.ffn_gate_inp.bias",
        "layers.{i}.moe.correction": "blk.{i}.exp_probs_b.bias",
        "layers.{i}.moe.shared_gate.weight": Fused("blk.{i}.ffn_gate_inp_shexp.weight", vector=True),
    }
    for part in ("gate", "up", "down"):
        places[f"layers.{{i}}.moe.shared.{part}.weight"] = f"blk.{{i}}.ffn_{part}_shexp.weight"
        for kind in ("weight", "bias"):
            stacked = Fused(f"blk.{{i}}.ffn_{part}_exps.{kind}", experts=True)
            places[f"{EXPERT}.{part}.{kind}"] = (stacked, f"blk.{{i}}.ffn_{part}.{{e}}.{kind}")
    return places


GGUF_NAMES: Mapping[str, Place] = {**decoder.GGUF_NAMES, **_gguf_experts()}


def skip_inert(fields: Fields) -> None:
    """Marks as read what changes nothing."""
    for key in INERT:
        fields.raw(key)


def every_layer(fields: Fields, key: str = "num_hidden_layers") -> tuple[int, ...]:
    """All layers; as many as a sane model may have, the rest is for check_spec to refuse."""
    return tuple(range(min(fields.integer(key), LIMITS["layers"])))


def from_first(fields: Fields, key: str, default: int, layers: str = "num_hidden_layers") -> tuple[int, ...]:
    """The layers from the one under `key` on."""
    first = fields.integer(key, default)
    return tuple(i for i in every_layer(fields, layers) if i >= first)


def with_moe(spec: ModelSpec, moe: MoeSpec, **switches: Any) -> ModelSpec:
    """`spec` with that mixture and those switches; raises FormatError naming the number that cannot be."""
    _need(1 <= moe.experts <= MOST_EXPERTS, f"{moe.experts} experts, allowed 1..{MOST_EXPERTS}")
    _need(1 <= moe.top_k <= moe.experts, f"{moe.top_k} experts a token of {moe.experts}")
    _need(1 <= moe.ffn <= LIMITS["ffn"], f"experts of width {moe.ffn}")
    _need(0 <= moe.shared_ffn <= LIMITS["ffn"], f"a shared expert of width {moe.shared_ffn}")
    if moe.groups:
        fits = moe.groups > 0 and moe.experts % moe.groups == 0 and 1 <= moe.top_groups <= moe.groups
        _need(fits, f"{moe.top_groups} of {moe.groups} groups of {moe.experts} experts")
        each = moe.experts // moe.groups
        _need(moe.top_k <= each * moe.top_groups, f"{moe.top_k} experts a token of {moe.top_groups} groups of {each}")
        _need(moe.group_score != "top2" or each >= 2, "groups of one expert have no two best")
    _need(0.0 < abs(moe.scale) < 1e6, f"routed experts are scaled by {moe.scale}")
    _need(moe.scoring != "sparsemixer" or moe.top_k == 2, f"sparsemixer chooses two experts, not {moe.top_k}")
    return check_spec(replace(spec, moe=moe, **switches))


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise FormatError(f"the model's config does not hold together: {message}", remedy="Check config.json")


def grouped(groups: int, top_groups: int) -> tuple[int, int]:
    """(groups, top groups), (0, 0) where there is but one group, or all of them are taken."""
    return (0, 0) if groups <= 1 or groups == top_groups else (groups, top_groups)


# Scores by the number that GGUF gives them in expert_gating_func.
GATING: Mapping[int, str] = {0: "", 1: "softmax", 2: "sigmoid", 3: "softmax_after"}


def gguf_moe(fields: Fields, layers: tuple[int, ...], **defaults: object) -> MoeSpec:
    """The mixture of GGUF metadata, over `layers`; `defaults` are what the architecture fixes."""
    gating = fields.integer("expert_gating_func", 0)
    if gating not in GATING:
        raise fields.unsupported("expert_gating_func", gating)
    scoring = GATING[gating] or str(defaults.pop("scoring", "softmax"))
    defaults.pop("scoring", None)
    groups = grouped(fields.integer("expert_group_count", 0), fields.integer("expert_group_used_count", 0))
    moe = MoeSpec(
        layers, fields.integer("expert_count"), fields.integer("expert_used_count"),
        fields.integer("expert_feed_forward_length", fields.raw("feed_forward_length")), scoring=scoring,
        normalize=fields.flag("expert_weights_norm", bool(defaults.pop("normalize", True))),
        scale=fields.number("expert_weights_scale", 1.0) or 1.0, groups=groups[0], top_groups=groups[1],
        group_score="top2" if scoring == "sigmoid" else "max",
    )  # fmt: skip
    return replace(moe, **defaults)  # type: ignore[arg-type]


def gguf_spec(
    fields: Fields, tensors: Tensors, family: str, dense: tuple[int, ...], *, moe: Mapping[str, Any] | None = None,
    qk_norm: bool = False, **switches: Any,
) -> ModelSpec:  # fmt: skip
    """ModelSpec of GGUF metadata whose layers, those in `dense` apart, have a mixture; `moe` fixes fields of it."""
    layers = tuple(i for i in every_layer(fields, "block_count") if i not in dense)
    mixture = gguf_moe(fields, layers, **(moe or {}))
    return with_moe(decoder.from_gguf(fields, tensors, family, qk_norm=qk_norm, mixture=True), mixture, **switches)


def no_gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    """For families that no GGUF architecture leads to."""
    raise fields.unsupported("expert_count", fields.raw("expert_count"))
