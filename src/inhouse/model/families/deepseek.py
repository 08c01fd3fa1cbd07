"""DeepSeek-V2 and V3: latent attention, and mixtures of experts chosen by groups."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from inhouse.core.errors import FormatError
from inhouse.model.build import Spec
from inhouse.model.families import decoder, mixtures
from inhouse.model.families.family import Derive, Family, Fused, Place, Rows, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.families.ropes import context_length, rope_from_gguf
from inhouse.model.rotary import yarn_attention_factor
from inhouse.model.spec import LIMITS, ModelSpec, RopeSpec, check_spec
from inhouse.model.spec_parts import MlaSpec, MoeSpec
from inhouse.runtime.program import WeightSpec


@dataclass(frozen=True, slots=True)
class KeysAndValues(Fused):
    """The tensor that makes the heads' k and v of the compressed kv: [heads, k's rows then v's, kv_rank]. What is kept
    of k is each head's matrix transposed, since q is what it multiplies."""

    def derive(self, spec: Spec, canonical: str, source: str, weights: Mapping[str, WeightSpec]) -> Derive:
        """See Fused.derive."""
        assert isinstance(spec, ModelSpec)
        assert spec.mla is not None
        mla, shape = spec.mla, weights[canonical].shape
        each = mla.nope_dim + mla.v_dim
        whole = (spec.heads * each, mla.kv_rank)
        if re.fullmatch(r".*\.v_b\.weight", canonical):
            return Derive(source, whole, shape, rows=Rows(spec.heads, each, mla.nope_dim, mla.v_dim))
        part = Rows(spec.heads, each, 0, mla.nope_dim)
        return Derive(source, whole, shape, part=part, transpose=True, heads=spec.heads)


@dataclass(frozen=True, slots=True)
class ByHead(Fused):
    """A tensor [heads, rows, columns] of what is canonically [heads * rows, columns]."""

    def derive(self, spec: Spec, canonical: str, source: str, weights: Mapping[str, WeightSpec]) -> Derive:
        """See Fused.derive."""
        assert isinstance(spec, ModelSpec)
        rows, columns = weights[canonical].shape
        return Derive(source, (spec.heads, rows // spec.heads, columns), (rows, columns))


def _mla(fields: Fields, scaling: Fields | None) -> MlaSpec:
    return MlaSpec(
        q_rank=fields.integer("q_lora_rank", 0), kv_rank=fields.integer("kv_lora_rank"),
        nope_dim=fields.integer("qk_nope_head_dim"), rope_dim=fields.integer("qk_rope_head_dim"),
        v_dim=fields.integer("v_head_dim"), bias=fields.flag("attention_bias", False), mscale=_mscale(scaling),
    )  # fmt: skip


def _mscale(scaling: Fields | None) -> float:
    """What YaRN with `mscale_all_dim` multiplies the scale of the scores by."""
    if scaling is None or scaling.text("rope_type", scaling.text("type", "default")) == "default":
        return 1.0
    all_dim = scaling.number("mscale_all_dim", 0.0)
    return yarn_attention_factor(scaling.number("factor", 1.0), all_dim) ** 2 if all_dim else 1.0


def _spec(fields: Fields, tensors: Tensors, family: str, moe: MoeSpec, interleaved: bool, context: int) -> ModelSpec:
    """What both have in common; `moe` has been read."""
    mla = _mla(fields, fields.nested("rope_parameters") or fields.nested("rope_scaling"))
    fields.expect("head_dim", (mla.rope_dim,))  # as transformers 5 writes it
    fields.expect("qk_head_dim", (mla.nope_dim + mla.rope_dim,))
    fields.expect("mlp_bias", (False,))
    spec = decoder.from_hf(fields, tensors, family, head_dim=mla.rope_dim, context=context)
    return mixtures.with_moe(_latent(spec, mla, interleaved), moe)


def _latent(spec: ModelSpec, mla: MlaSpec, interleaved: bool) -> ModelSpec:
    """`spec` with latent attention; raises FormatError naming the number that cannot be."""
    for name in ("kv_rank", "nope_dim", "rope_dim", "v_dim"):
        value = getattr(mla, name)
        if not 1 <= value <= LIMITS["head_dim"]:
            raise FormatError(f"the model's config does not hold together: {name} is {value}")
    if not 0 <= mla.q_rank <= LIMITS["hidden"]:
        raise FormatError(f"the model's config does not hold together: q_lora_rank is {mla.q_rank}")
    assert spec.rope is not None
    rope: RopeSpec = replace(spec.rope, interleaved=interleaved)
    return check_spec(replace(spec, mla=mla, rope=rope, kv_heads=spec.heads, head_dim=mla.nope_dim + mla.rope_dim))


def _v2(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2405.04434; V2-Lite has neither a compressed q nor groups."""
    fields.expect("norm_topk_prob", (False,))  # the original never normalises
    fields.expect("moe_layer_freq", (1,))
    fields.expect("scoring_func", ("softmax",))
    mixtures.skip_inert(fields)
    method = fields.text("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise fields.unsupported("topk_method", method)
    groups = mixtures.grouped(fields.integer("n_group", 0), fields.integer("topk_group", 0))
    groups = groups if method == "group_limited_greedy" else (0, 0)
    ffn = fields.integer("moe_intermediate_size")
    moe = MoeSpec(
        mixtures.from_first(fields, "first_k_dense_replace", 0), fields.integer("n_routed_experts"),
        fields.integer("num_experts_per_tok"), ffn, normalize=False,
        scale=fields.number("routed_scaling_factor", 1.0), groups=groups[0], top_groups=groups[1],
        shared_ffn=ffn * fields.integer("n_shared_experts", 0),
    )  # fmt: skip
    return _spec(fields, tensors, "deepseek_v2", moe, True, 2048)


def _v3(fields: Fields, tensors: Tensors) -> ModelSpec:
    """arXiv 2412.19437: sigmoid scores, chosen with a correction that balances load. R1 is V3."""
    normalize, interleaved = fields.flag("norm_topk_prob", True), fields.flag("rope_interleave", True)
    fields.expect("moe_layer_freq", (1,))
    fields.expect("scoring_func", ("sigmoid",))
    fields.expect("topk_method", ("noaux_tc",))
    mixtures.skip_inert(fields)
    groups = mixtures.grouped(fields.integer("n_group", 8), fields.integer("topk_group", 4))
    ffn = fields.integer("moe_intermediate_size")
    moe = MoeSpec(
        mixtures.from_first(fields, "first_k_dense_replace", 3), fields.integer("n_routed_experts"),
        fields.integer("num_experts_per_tok"), ffn, scoring="sigmoid", normalize=normalize,
        scale=fields.number("routed_scaling_factor", 2.5), groups=groups[0], top_groups=groups[1],
        group_score="top2", correction=True, shared_ffn=ffn * fields.integer("n_shared_experts", 1),
    )  # fmt: skip
    return _spec(fields, tensors, "deepseek_v3", moe, interleaved, 4096)


def _gguf(fields: Fields, tensors: Tensors) -> ModelSpec:
    """V2 and V3, which GGUF calls deepseek2; newer files keep the heads' k and v apart, ready to be absorbed."""
    layers, heads = mixtures.every_layer(fields, "block_count"), fields.integer("attention.head_count")
    rope_dim, kv_rank = fields.integer("rope.dimension_count"), fields.integer("attention.kv_lora_rank")
    key, value = fields.integer("attention.key_length"), fields.integer("attention.value_length")
    if fields.has("attention.key_length_mla"):  # then the others are those of the cache
        fields.expect("attention.key_length", (kv_rank + rope_dim,))
        key, value = fields.integer("attention.key_length_mla"), fields.integer("attention.value_length_mla")
    fields.expect("attention.head_count_kv", (1, heads))
    log_multiplier = fields.number("rope.scaling.yarn_log_multiplier", 0.0)
    moe = mixtures.gguf_moe(
        fields, mixtures.from_first(fields, "leading_dense_block_count", 0, "block_count"), normalize=False,
        correction=f"blk.{layers[-1] if layers else 0}.exp_probs_b.bias" in tensors.names,
    )  # fmt: skip
    moe = replace(moe, shared_ffn=moe.ffn * fields.integer("expert_shared_count", 0))
    trained = fields.integer("context_length")
    rope = replace(rope_from_gguf(fields, rope_dim, trained, tensors, latent=True), attention_factor=1.0)
    scores = (1.0 + log_multiplier * math.log(rope.factor)) ** 2 if rope.scaling == "yarn" else 1.0
    mla = MlaSpec(
        fields.integer("attention.q_lora_rank", 0), kv_rank, key - rope_dim, rope_dim, value, mscale=scores,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
    )  # fmt: skip
    spec = ModelSpec(
        family="deepseek_v2", hidden=fields.integer("embedding_length"), layers=fields.integer("block_count"),
        heads=heads, kv_heads=heads, head_dim=key, ffn=fields.integer("feed_forward_length"),
        vocab_size=fields.integer("vocab_size", 0), context_length=context_length(rope, trained), rope=rope,
        norm_eps=mla.norm_eps, tied="output.weight" not in tensors.names,
    )  # fmt: skip
    for name, allowed in decoder.NEUTRAL_GGUF.items():
        if name != "expert_count":
            fields.expect(name, allowed)
    fields.refuse_rest(decoder.INERT_GGUF)
    return mixtures.with_moe(_latent(spec, mla, True), moe)


ATTN = "layers.{i}.attn"


def _hf_names() -> Mapping[str, Place]:
    mlp, attn = "model.layers.{i}.mlp", "model.layers.{i}.self_attn"
    queries = tuple(
        Fused(f"{attn}.{name}.weight", ("attn.q_nope", "attn.q_rope"), groups="heads")
        for name in ("q_b_proj", "q_proj")
    )
    compressed = {
        kind: Fused(f"{attn}.kv_a_proj_with_mqa.{kind}", ("attn.kv_a", "attn.k_rope")) for kind in ("weight", "bias")
    }
    both = KeysAndValues(f"{attn}.kv_b_proj.weight")
    return {
        **decoder.HF_NAMES,
        f"{ATTN}.q_a.weight": f"{attn}.q_a_proj.weight",
        f"{ATTN}.q_a.bias": f"{attn}.q_a_proj.bias",
        f"{ATTN}.q_a_norm": f"{attn}.q_a_layernorm.weight",
        f"{ATTN}.q_nope.weight": queries,
        f"{ATTN}.q_rope.weight": queries,
        **{f"{ATTN}.{part}.{kind}": place for part in ("kv_a", "k_rope") for kind, place in compressed.items()},
        f"{ATTN}.kv_a_norm": f"{attn}.kv_a_layernorm.weight",
        f"{ATTN}.k_b.weight": both,
        f"{ATTN}.v_b.weight": both,
        "layers.{i}.moe.router.weight": f"{mlp}.gate.weight",
        "layers.{i}.moe.correction": f"{mlp}.gate.e_score_correction_bias",
        **mixtures.expert_names(mlp, "gate_proj", "up_proj", "down_proj"),
        **mixtures.shared_names(f"{mlp}.shared_experts"),
    }


def _gguf_names() -> Mapping[str, Place]:
    queries = tuple(
        Fused(f"blk.{{i}}.{name}.weight", ("attn.q_nope", "attn.q_rope"), groups="heads")
        for name in ("attn_q_b", "attn_q")
    )
    compressed = Fused("blk.{i}.attn_kv_a_mqa.weight", ("attn.kv_a", "attn.k_rope"))
    both = KeysAndValues("blk.{i}.attn_kv_b.weight")
    return {
        **mixtures.GGUF_NAMES,
        f"{ATTN}.q_a.weight": "blk.{i}.attn_q_a.weight",
        f"{ATTN}.q_a_norm": "blk.{i}.attn_q_a_norm.weight",
        f"{ATTN}.q_nope.weight": queries,
        f"{ATTN}.q_rope.weight": queries,
        f"{ATTN}.kv_a.weight": compressed,
        f"{ATTN}.k_rope.weight": compressed,
        f"{ATTN}.kv_a_norm": "blk.{i}.attn_kv_a_norm.weight",
        f"{ATTN}.k_b.weight": (ByHead("blk.{i}.attn_k_b.weight"), both),  # older files have both in one
        f"{ATTN}.v_b.weight": (ByHead("blk.{i}.attn_v_b.weight"), both),
    }


ROWS = (
    Family(
        name="deepseek_v2",
        architectures=("DeepseekV2ForCausalLM",),
        gguf=("deepseek2",),
        from_hf=_v2,
        from_gguf=_gguf,
        hf_names=_hf_names(),
        gguf_names=_gguf_names(),
        ignored=("blk.*.attn_kv_b.weight",),  # beside its two parts
    ),
    Family(
        name="deepseek_v3",
        architectures=("DeepseekV3ForCausalLM",),
        gguf=(),  # GGUF calls it deepseek2
        from_hf=_v3,
        from_gguf=mixtures.no_gguf,
        hf_names=_hf_names(),
        gguf_names=_gguf_names(),
        ignored=("model.layers.{layers}.*",),  # the layer that predicts a token more
    ),
)
