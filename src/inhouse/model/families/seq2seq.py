"""Encoder-decoders: T5, Flan-T5, mT5 and umT5; BART, mBART, M2M100 with NLLB, and Marian."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields as fields_of
from typing import Any

from inhouse.model.build import Spec
from inhouse.model.families import decoder
from inhouse.model.families.family import Derive, Family, Fused, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.seq2seq import Seq2SeqSpec, Side, check_seq2seq

T5_CONTEXT = 2048  # relative positions end nowhere; unless `n_positions` says more, this is the limit

# Keys that only training, saving or generation read; generation is `load.describe`'s to honour.
_INERT = (
    *decoder.INERT_HF, "dropout", "dropout_rate", "*_layerdrop", "init_std", "initializer_factor", "num_hidden_layers",
    "n_positions", "output_past", "gradient_checkpointing", "static_position_embeddings", "normalize_embedding",
    "num_labels", "force_bos_token_to_be_generated", "save_step", "add_final_layer_norm", "add_bias_logits",
    "extra_pos_embeddings", "_num_labels", "label_smoothing", "replacing_rate", "decoder_start_token_id",
)  # fmt: skip
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "is_encoder_decoder": (True,), "is_decoder": (False,), "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,), "pruned_heads": ({},), "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (), "classif_dropout": (0.0, 0, 0.1),
    "do_blenderbot_90_layernorm": (False,),
    "scale_embedding_by_sqrt": (),
}  # fmt: skip


def _finish(fields: Fields, spec: Seq2SeqSpec) -> Seq2SeqSpec:
    for key, allowed in _NEUTRAL.items():
        fields.expect(key, allowed)
    fields.expect("normalize_before", (False, spec.pre_norm))
    fields.refuse_rest(_INERT)
    return check_seq2seq(spec)


def _start(fields: Fields, *others: str) -> int:
    """The decoder's first token; where the config does not say, that of another key."""
    for key in ("decoder_start_token_id", *others):
        if fields.raw(key) is not None:
            return fields.integer(key)
    return fields.integer("decoder_start_token_id")


# ---- T5 -----------------------------------------------------------------------------------------------------------


def _t5(fields: Fields, tensors: Tensors, family: str) -> Seq2SeqSpec:
    """arXiv 1910.10683; v1.1, Flan (2210.11416) and mT5 (2010.11934) have a gated MLP and a head of their own."""
    heads, head_dim, ffn = fields.integer("num_heads"), fields.integer("d_kv"), fields.integer("d_ff")
    hidden, layers = fields.integer("d_model"), fields.integer("num_layers")
    gated, activation = _t5_mlp(fields)
    tied_says = fields.flag("tie_word_embeddings", True)
    # Since version 5, transformers writes that the head is tied even where it is not, and the scale apart.
    scaled = fields.flag("scale_decoder_outputs", tied_says) and family != "mt5"
    spec = Seq2SeqSpec(
        family=family,
        hidden=hidden,
        encoder=Side("encoder", layers, heads, head_dim, ffn),
        decoder=Side("decoder", fields.integer("num_decoder_layers", layers), heads, head_dim, ffn),
        vocab_size=fields.integer("vocab_size"),
        context_length=max(fields.integer("n_positions", 0), T5_CONTEXT),
        norm_eps=fields.number("layer_norm_epsilon", 1e-6),
        start_token=_start(fields, "pad_token_id"),
        norm="rms",
        activation=activation,
        gated=gated,
        bias=False,
        scaled_attention=False,
        positions="relative",
        buckets=fields.integer("relative_attention_num_buckets", 32),
        max_distance=fields.integer("relative_attention_max_distance", 128),
        bias_each_layer=family == "umt5",
        tied="lm_head.weight" not in tensors.names if tensors.names else tied_says,
        head_scale=hidden**-0.5 if scaled else 1.0,
    )
    return _finish(fields, spec)


def _t5_mlp(fields: Fields) -> tuple[bool, str]:
    """`feed_forward_proj` says both; two more keys, which transformers derives from it, may be there as well."""
    kind = fields.text("feed_forward_proj", "relu")
    gated = kind.startswith("gated-")
    name = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    fields.expect("is_gated_act", (gated,))
    fields.expect("dense_act_fn", (name,))
    if name not in decoder.ACTIVATIONS:
        raise fields.unsupported("feed_forward_proj", kind)
    return gated, decoder.ACTIVATIONS[name]


def _t5_side(ours: str, block: str, mlp: int) -> dict[str, str]:
    """Names of one side's layer; `mlp` is the number of its last part."""
    theirs = f"{block}.block.{{i}}.layer"
    names = {f"{ours}.layers.{{i}}.attn_norm": f"{theirs}.0.layer_norm.weight"}
    names |= {f"{ours}.layers.{{i}}.attn.{part}.weight": f"{theirs}.0.SelfAttention.{part}.weight" for part in "qkvo"}
    bias = "SelfAttention.relative_attention_bias.weight"
    names[f"{ours}.bias.weight"] = f"{block}.block.0.layer.0.{bias}"
    names[f"{ours}.layers.{{i}}.attn.bias.weight"] = f"{theirs}.0.{bias}"
    if mlp == 2:
        names[f"{ours}.layers.{{i}}.cross_norm"] = f"{theirs}.1.layer_norm.weight"
        names |= {
            f"{ours}.layers.{{i}}.cross.{part}.weight": f"{theirs}.1.EncDecAttention.{part}.weight" for part in "qkvo"
        }
    names[f"{ours}.layers.{{i}}.mlp_norm"] = f"{theirs}.{mlp}.layer_norm.weight"
    names[f"{ours}.layers.{{i}}.mlp.down.weight"] = f"{theirs}.{mlp}.DenseReluDense.wo.weight"
    names[f"{ours}.final_norm"] = f"{block}.final_layer_norm.weight"
    return names


def _t5_names() -> dict[str, str | Fused]:
    names: dict[str, str | Fused] = {"embed.weight": "shared.weight", "head.weight": "lm_head.weight"}
    names |= _t5_side("encoder", "encoder", 1) | _t5_side("decoder", "decoder", 2)
    return names | _t5_ups({"up": "wi"})


def _t5_ups(parts: Mapping[str, str]) -> dict[str, str]:
    return {
        f"{side}.layers.{{i}}.mlp.{part}.weight": f"{side}.block.{{i}}.layer.{mlp}.DenseReluDense.{name}.weight"
        for side, mlp in (("encoder", 1), ("decoder", 2))
        for part, name in parts.items()
    }


# Version 1 checkpoints hold a table of cross attention that nothing has ever read.
_T5_EXTRA = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


# ---- BART and its kin ---------------------------------------------------------------------------------------------


def _bart_like(fields: Fields, tensors: Tensors, family: str, **switches: Any) -> Seq2SeqSpec:
    """What the configs of BART, mBART, M2M100 and Marian have in common; `switches` are fields of the spec."""
    hidden = fields.integer("d_model")
    sides = [_bart_side(fields, name, hidden) for name in ("encoder", "decoder")]
    scaled = fields.flag("scale_embedding", family == "m2m_100")
    vocab = fields.integer("vocab_size")
    context = fields.integer("max_position_embeddings", 1024)
    head, bias = "lm_head.weight", "final_logits_bias"
    tied_says = fields.flag("tie_word_embeddings", True)
    spec = Seq2SeqSpec(
        family=family,
        hidden=hidden,
        encoder=sides[0],
        decoder=sides[1],
        vocab_size=vocab,
        context_length=context,
        norm_eps=1e-5,
        start_token=_start(fields, *switches.pop("start", ())),
        activation=_activation(fields, "relu" if family == "m2m_100" else "gelu"),
        embed_scale=math.sqrt(hidden) if scaled else 1.0,
        tied=head not in tensors.names if tensors.names else tied_says,
        head_bias=bias in tensors.names,
        **switches,
    )
    return _finish(fields, spec)


def _bart_side(fields: Fields, name: str, hidden: int) -> Side:
    heads = fields.integer(f"{name}_attention_heads", 16)
    if heads < 1 or hidden % heads:
        raise fields.unsupported(f"{name}_attention_heads", heads)
    return Side(
        name, fields.integer(f"{name}_layers", 12), heads, hidden // heads, fields.integer(f"{name}_ffn_dim", 4096)
    )


def _activation(fields: Fields, default: str) -> str:
    name = fields.text("activation_function", default)
    if name not in decoder.ACTIVATIONS:
        raise fields.unsupported("activation_function", name)
    return decoder.ACTIVATIONS[name]


def _bart(fields: Fields, tensors: Tensors) -> Seq2SeqSpec:
    """arXiv 1910.13461: norms after each part, learned positions from row 2 on, a norm of the embedding."""
    return _bart_like(
        fields, tensors, "bart", pre_norm=False, position_offset=2, embed_norm=True, final_norm=False,
        start=("eos_token_id",),
    )  # fmt: skip


def _mbart(fields: Fields, tensors: Tensors) -> Seq2SeqSpec:
    """arXiv 2001.08210: BART with norms before each part and at the end. Where its config names no first token of the
    decoder, that is the end of sentence, and the target language follows (mBART-50)."""
    return _bart_like(fields, tensors, "mbart", position_offset=2, embed_norm=True, start=("eos_token_id",))


def _m2m(fields: Fields, tensors: Tensors) -> Seq2SeqSpec:
    """arXiv 2010.11125; NLLB (2207.04672) has the same network. Sines in the first half, cosines in the second; the
    first position has the number after the padding token."""
    hidden, padding = fields.integer("d_model"), fields.integer("pad_token_id", 1)
    step = math.log(10000.0) / max(hidden // 2 - 1, 1)
    return _bart_like(
        fields, tensors, "m2m_100", positions="sinusoidal", sinusoid_step=step, position_offset=padding + 1,
        start=("eos_token_id",),
    )  # fmt: skip


def _marian(fields: Fields, tensors: Tensors) -> Seq2SeqSpec:
    """Junczys-Dowmunt et al. 2018, as transformers keeps OPUS-MT: norms after each part, a bias of the logits."""
    if fields.integer("decoder_vocab_size", fields.integer("vocab_size")) != fields.integer("vocab_size"):
        raise fields.unsupported("decoder_vocab_size", fields.integer("decoder_vocab_size"))
    step = 2.0 * math.log(10000.0) / fields.integer("d_model")
    shared = fields.flag("share_encoder_decoder_embeddings", True)
    return _bart_like(
        fields, tensors, "marian", positions="sinusoidal", sinusoid_step=step, pre_norm=False, final_norm=False,
        shared_embedding=shared, start=("pad_token_id",),
    )  # fmt: skip


def _bart_names() -> dict[str, str | Fused]:
    names: dict[str, str | Fused] = {"embed.weight": "model.shared.weight", "head.weight": "lm_head.weight"}
    names["head.bias"] = Fused("final_logits_bias", row=True)
    for side in ("encoder", "decoder"):
        theirs, layer = f"model.{side}", f"model.{side}.layers.{{i}}"
        ours = f"{side}.layers.{{i}}"
        names[f"{side}.embed.weight"] = f"{theirs}.embed_tokens.weight"
        names[f"{side}.positions.weight"] = f"{theirs}.embed_positions.weight"
        modules = {
            f"{side}.embed_norm": f"{theirs}.layernorm_embedding", f"{side}.final_norm": f"{theirs}.layer_norm",
            f"{ours}.attn_norm": f"{layer}.self_attn_layer_norm", f"{ours}.mlp_norm": f"{layer}.final_layer_norm",
            f"{ours}.cross_norm": f"{layer}.encoder_attn_layer_norm",
        }  # fmt: skip
        for norm, module in modules.items():
            names |= {norm: f"{module}.weight", f"{norm}.bias": f"{module}.bias"}
        linears = {"mlp.up": "fc1", "mlp.down": "fc2"}
        for part, theirs in (("attn", "self_attn"), ("cross", "encoder_attn")):
            linears |= {f"{part}.{x}": f"{theirs}.{x}_proj" for x in "qkv"} | {f"{part}.o": f"{theirs}.out_proj"}
        for name, module in linears.items():
            names |= {f"{ours}.{name}.{x}": f"{layer}.{module}.{x}" for x in ("weight", "bias")}
    return names


# ---- rows ---------------------------------------------------------------------------------------------------------


class _Family(Family):
    """A row whose embedding may stand under any of the names that share it, and whose MLP may be gated."""

    def derive(self, spec: Spec, names: Collection[str]) -> dict[str, Derive]:
        table = dict(self.hf_names)
        if isinstance(spec, Seq2SeqSpec) and spec.gated:
            table |= _t5_ups({"gate": "wi_0", "up": "wi_1"})
        if self.prefix and not any(name.startswith(self.prefix) for name in names):  # saved without its head
            table = {ours: self._bare(theirs) for ours, theirs in table.items()}
        if not isinstance(spec, Seq2SeqSpec) or spec.shared_embedding:
            known = (str(table["embed.weight"]), *_SHARED, "lm_head.weight")
            table["embed.weight"] = next((name for name in known if name in names), known[0])
        if isinstance(spec, Seq2SeqSpec) and not spec.shared_embedding and spec.tied:
            own = str(table["decoder.embed.weight"])
            table["decoder.embed.weight"] = own if own in names else "lm_head.weight"
        plain = {field.name: getattr(self, field.name) for field in fields_of(self)}
        return Family(**(plain | {"hf_names": table})).derive(spec, names)


# Names under which checkpoints keep the one embedding; what is left of them is the same tensor once more.
_SHARED = (
    "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
    "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight",
)  # fmt: skip


def _no_gguf(fields: Fields, tensors: Tensors) -> Seq2SeqSpec:
    raise fields.unsupported("architecture", "encoder-decoder")


def _row(
    name: str, architectures: tuple[str, ...], read: Callable[[Fields, Tensors], Seq2SeqSpec],
    names: Mapping[str, str | Fused], ignored: tuple[str, ...], prefix: str = "",
) -> Family:  # fmt: skip
    return _Family(
        name=name, architectures=architectures, gguf=(), from_hf=read, from_gguf=_no_gguf, hf_names=names,
        gguf_names={"embed.weight": "token_embd.weight"}, ignored=(*_SHARED, *ignored), prefix=prefix,
    )  # fmt: skip


# Left by fairseq in old checkpoints; nothing reads it.
_VERSIONS = ("*encoder.version", "*decoder.version")

# Tables that the spec computes, which some checkpoints keep.
_SINES = ("*encoder.embed_positions.weight*", "*decoder.embed_positions.weight*")

ROWS = (
    _row(
        "t5", ("T5ForConditionalGeneration", "T5WithLMHeadModel"), lambda f, t: _t5(f, t, "t5"), _t5_names(), _T5_EXTRA
    ),
    _row("mt5", ("MT5ForConditionalGeneration",), lambda f, t: _t5(f, t, "mt5"), _t5_names(), _T5_EXTRA),
    _row("umt5", ("UMT5ForConditionalGeneration",), lambda f, t: _t5(f, t, "umt5"), _t5_names(), ()),
    _row("bart", ("BartForConditionalGeneration", "BartModel"), _bart, _bart_names(), _VERSIONS, "model."),
    _row("mbart", ("MBartForConditionalGeneration", "MBartModel"), _mbart, _bart_names(), _VERSIONS, "model."),
    _row(
        "m2m_100",
        ("M2M100ForConditionalGeneration", "M2M100Model"),
        _m2m,
        _bart_names(),
        (*_SINES, *_VERSIONS),
        "model.",
    ),
    _row("marian", ("MarianMTModel",), _marian, _bart_names(), _SINES),
)
