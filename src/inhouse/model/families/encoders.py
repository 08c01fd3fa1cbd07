"""BERT and what grew out of it: RoBERTa, XLM-R, CamemBERT, ELECTRA, ALBERT, DistilBERT, MPNet, ModernBERT.

One reader of config.json for each; names of tensors are in `encoder_names`. Oracles: the models of Hugging Face
transformers. A checkpoint's masked-language head is left aside: these models embed, and classify where they can.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.model.build import Spec
from inhouse.model.encoder import ClassifierSpec, EncoderSpec, check_encoder
from inhouse.model.families import encoder_names
from inhouse.model.families.decoder import ACTIVATIONS, INERT_HF, NEUTRAL_HF
from inhouse.model.families.encoder_names import EncoderFamily
from inhouse.model.families.family import Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.pooling import Pooling
from inhouse.model.spec import LIMITS, RopeSpec

GGUF_NAMES = ("bert",)
SEQUENCE, TOKEN = "ForSequenceClassification", "ForTokenClassification"
_PLAIN = ClassifierSpec(())
_TANH = ClassifierSpec((), dense=True, activation="tanh")
_GELU = ClassifierSpec((), dense=True, activation="gelu")
_RELU = ClassifierSpec((), dense=True, activation="relu")
KINDS = ("Model", "ForMaskedLM", "ForPreTraining", SEQUENCE, TOKEN)

INERT = (
    *INERT_HF, "*_dropout_prob", "dropout", "directionality", "pooler_*", "gradient_checkpointing", "summary_*",
    "net_structure_type", "gap_size", "num_memory_blocks", "down_scale_factor", "sinusoidal_pos_embds",
    "tie_weights_", "tie_word_embeddings", "num_labels", "adapters", "model_max_length",
    "initializer_cutoff_factor", "deterministic_flash_attn", "reference_compile", "repad_logits_with_grad",
    "sparse_pred*", "decoder_bias", "loss_*", "output_past", "xla_device",
)  # fmt: skip


def _classifier(fields: Fields, base: ClassifierSpec, tokens: ClassifierSpec = _PLAIN) -> ClassifierSpec | None:
    """The head of the class that the config names: `base` for texts, `tokens` for tokens; None: none.

    Scores become answers as the config says, else as vLLM and sentence-transformers do: one label: sigmoid; several:
    softmax, or sigmoid where they do not exclude one another."""
    kind = _kind(fields)
    labels, problem = _labels(fields), fields.raw("problem_type")
    activation = _cross_encoder_activation(fields)
    if kind not in (SEQUENCE, TOKEN):
        return None
    if problem not in (None, "regression", "single_label_classification", "multi_label_classification"):
        raise fields.unsupported("problem_type", problem)
    answer = "sigmoid" if len(labels) == 1 or problem == "multi_label_classification" else "softmax"
    answer = activation or ("none" if problem == "regression" and len(labels) > 1 else answer)
    if kind == TOKEN:
        return replace(tokens, labels=labels, tokens=True)
    return replace(base, labels=labels, answer=answer)


def _kind(fields: Fields) -> str:
    name = str(fields.raw("architectures", [""])[0])
    return next(kind for kind in KINDS if name.endswith(kind))


def _labels(fields: Fields) -> tuple[str, ...]:
    """Label names by index; LABEL_0, LABEL_1 where the config says nothing (transformers' own default)."""
    found = fields.raw("id2label")
    if found is None:
        return tuple(f"LABEL_{i}" for i in range(min(fields.integer("num_labels", 2), 1 << 20)))
    if not isinstance(found, Mapping) or {str(key) for key in found} != {str(i) for i in range(len(found))}:
        raise FormatError("config.json: id2label does not number its labels 0, 1, 2, ...", param="id2label")
    named = {str(key): str(value) for key, value in found.items()}
    return tuple(named[str(i)] for i in range(len(named)))


def _cross_encoder_activation(fields: Fields) -> str:
    """What sentence-transformers was told to make of a cross-encoder's scores; "": nothing said."""
    inner = fields.nested("sentence_transformers")
    name = fields.raw("sbert_ce_default_activation_function")
    if inner is not None:
        name = inner.raw("activation_fn") or name
        inner.refuse_rest(("version",))
    if name is None:
        return ""
    known = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}
    short = str(name).rsplit(".", 1)[-1]
    if short not in known:
        raise fields.unsupported("sentence_transformers.activation_fn", name)
    return known[short]


def _activation(fields: Fields, key: str, default: str) -> str:
    name = fields.text(key, default)
    if name not in ACTIVATIONS:
        raise fields.unsupported(key, name)
    return ACTIVATIONS[name]


def _finish(fields: Fields, spec: EncoderSpec, *inert: str) -> EncoderSpec:
    fields.expect("position_embedding_type", ("absolute", "sans_pos"))
    for key, allowed in {**NEUTRAL_HF, "is_decoder": (False,)}.items():
        fields.expect(key, allowed)
    fields.refuse_rest((*INERT, *inert))
    return check_encoder(spec)


def _bert(fields: Fields, tensors: Tensors, family: str, head: ClassifierSpec, offset: bool = False) -> EncoderSpec:
    """arXiv 1810.04805; with `offset`, RoBERTa (1907.11692): positions begin behind the padding's."""
    first = fields.integer("pad_token_id", 1) + 1 if offset else 0
    rows, hidden = fields.integer("max_position_embeddings", 512), fields.integer("hidden_size", 768)
    embedding = fields.integer("embedding_size", hidden)
    return _finish(fields, EncoderSpec(
        family=family, hidden=hidden, layers=fields.integer("num_hidden_layers", 12),
        heads=fields.integer("num_attention_heads", 12), ffn=fields.integer("intermediate_size", 3072),
        vocab_size=fields.integer("vocab_size", 30522), context_length=rows - first,
        norm_eps=fields.number("layer_norm_eps", 1e-12), activation=_activation(fields, "hidden_act", "gelu"),
        embedding=embedding if embedding != hidden else 0, position_rows=rows, position_offset=first,
        types=fields.integer("type_vocab_size", 2), classifier=_classifier(fields, head),
    ))  # fmt: skip


def _albert(fields: Fields, tensors: Tensors) -> EncoderSpec:
    """arXiv 1909.11942: layers share weights, the token table is narrow."""
    rows = fields.integer("max_position_embeddings", 512)
    fields.expect("inner_group_num", (1,))
    return _finish(fields, EncoderSpec(
        family="albert", hidden=fields.integer("hidden_size", 4096), layers=fields.integer("num_hidden_layers", 12),
        heads=fields.integer("num_attention_heads", 64), ffn=fields.integer("intermediate_size", 16384),
        vocab_size=fields.integer("vocab_size", 30000), context_length=rows,
        norm_eps=fields.number("layer_norm_eps", 1e-12), activation=_activation(fields, "hidden_act", "gelu_new"),
        embedding=fields.integer("embedding_size", 128), project=True, position_rows=rows,
        types=fields.integer("type_vocab_size", 2), sets=fields.integer("num_hidden_groups", 1),
        classifier=_classifier(fields, _TANH),
    ))  # fmt: skip


def _distilbert(fields: Fields, tensors: Tensors) -> EncoderSpec:
    """arXiv 1910.01108."""
    rows = fields.integer("max_position_embeddings", 512)
    return _finish(fields, EncoderSpec(
        family="distilbert", hidden=fields.integer("dim", 768), layers=fields.integer("n_layers", 6),
        heads=fields.integer("n_heads", 12), ffn=fields.integer("hidden_dim", 3072),
        vocab_size=fields.integer("vocab_size", 30522), context_length=rows, norm_eps=1e-12,
        activation=_activation(fields, "activation", "gelu"), position_rows=rows,
        classifier=_classifier(fields, _RELU),
    ))  # fmt: skip


def _mpnet(fields: Fields, tensors: Tensors) -> EncoderSpec:
    """arXiv 2004.09297: learned positions from row 2 on, and T5's relative bias in every layer."""
    rows = fields.integer("max_position_embeddings", 512)
    first = fields.integer("pad_token_id", 1) + 1
    return _finish(fields, EncoderSpec(
        family="mpnet", hidden=fields.integer("hidden_size", 768), layers=fields.integer("num_hidden_layers", 12),
        heads=fields.integer("num_attention_heads", 12), ffn=fields.integer("intermediate_size", 3072),
        vocab_size=fields.integer("vocab_size", 30527), context_length=rows - first,
        norm_eps=fields.number("layer_norm_eps", 1e-12), activation=_activation(fields, "hidden_act", "gelu"),
        position_rows=rows, position_offset=first,
        relative_buckets=fields.integer("relative_attention_num_buckets", 32),
        classifier=_classifier(fields, _TANH),
    ))  # fmt: skip


def _modernbert(fields: Fields, tensors: Tensors) -> EncoderSpec:
    """arXiv 2412.13663: norms before, gated MLP, rotary positions; most layers see a window on both sides."""
    layers = fields.integer("num_hidden_layers", 22)
    half = fields.integer("local_attention", 128) // 2
    windows = tuple(half + 1 if local else 0 for local in _local_layers(fields, layers))
    hidden, heads = fields.integer("hidden_size", 768), fields.integer("num_attention_heads", 12)
    width, norm_bias = hidden // max(heads, 1), fields.flag("norm_bias", False)
    whole, local = _modernbert_ropes(fields, width)
    activation = _activation(fields, "hidden_activation", "gelu")
    head = ClassifierSpec(
        (), pool=_one_of(fields, "classifier_pooling", ("cls", "mean")), dense=True, norm=True,
        dense_bias=fields.flag("classifier_bias", False),
        activation=_activation(fields, "classifier_activation", "gelu"),
    )  # fmt: skip
    return _finish(fields, EncoderSpec(
        family="modernbert", hidden=hidden, layers=layers, heads=heads,
        ffn=fields.integer("intermediate_size", 1152), vocab_size=fields.integer("vocab_size", 50368),
        context_length=fields.integer("max_position_embeddings", 8192), norm_eps=fields.number("norm_eps", 1e-5),
        activation=activation, attn_bias=fields.flag("attention_bias", False), mlp_bias=fields.flag("mlp_bias", False),
        norm_bias=norm_bias, gated=True, pre_norm=True, rope=whole, local_rope=local, windows=windows,
        classifier=_classifier(fields, head, head),
    ), "layer_norm_eps")  # fmt: skip


def _local_layers(fields: Fields, layers: int) -> list[bool]:
    """Which layers see a window only: `layer_types`, or all but every n-th."""
    every = fields.integer("global_attn_every_n_layers", 3)
    types = fields.raw("layer_types")
    if types is None:
        return [bool(every) and i % every != 0 for i in range(min(layers, LIMITS["layers"]))]
    known = {"full_attention": False, "sliding_attention": True}
    if not isinstance(types, list) or not all(isinstance(kind, str) and kind in known for kind in types):
        raise fields.unsupported("layer_types", types)
    return [known[kind] for kind in types]


def _modernbert_ropes(fields: Fields, width: int) -> tuple[RopeSpec, RopeSpec]:
    """Rotations of layers that see all, and of the others."""
    thetas = {"full_attention": fields.number("global_rope_theta", 160000.0)}
    local = fields.raw("local_rope_theta")
    thetas["sliding_attention"] = fields.number("local_rope_theta", 10000.0) if local else thetas["full_attention"]
    if local is None and not fields.has("local_rope_theta"):
        thetas["sliding_attention"] = 10000.0
    settings = fields.nested("rope_parameters")
    if settings is not None:
        for key in thetas:
            inner = settings.nested(key)
            if inner is not None:
                inner.expect("rope_type", ("default",))
                thetas[key] = inner.number("rope_theta", thetas[key])
                inner.refuse_rest()
        settings.refuse_rest()
    return RopeSpec(width, thetas["full_attention"]), RopeSpec(width, thetas["sliding_attention"])


def _one_of(fields: Fields, key: str, allowed: tuple[str, ...]) -> str:
    value = fields.text(key, allowed[0])
    if value not in allowed:
        raise fields.unsupported(key, value)
    return value


def _bert_gguf(fields: Fields, tensors: Tensors) -> EncoderSpec:
    """llama.cpp's `bert`, which RoBERTa is written as too: rows of positions before the first are left out there.
    `pooling_type` names the pooling; vectors have length 1, as llama.cpp gives them."""
    context = fields.integer("context_length")
    kinds = {0: "mean", 1: "mean", 2: "cls", 3: "last"}
    kind = fields.integer("pooling_type", 1)
    if kind not in kinds:
        raise fields.unsupported("pooling_type", kind)
    fields.expect("attention.causal", (False,))
    spec = EncoderSpec(
        family="bert", hidden=fields.integer("embedding_length"), layers=fields.integer("block_count"),
        heads=fields.integer("attention.head_count"), ffn=fields.integer("feed_forward_length"),
        vocab_size=fields.integer("vocab_size"), context_length=context,
        norm_eps=fields.number("attention.layer_norm_epsilon"), position_rows=context,
        types=fields.integer("token_type_count", 2) if "token_types.weight" in tensors.names else 0,
        pooling=Pooling(kinds[kind]),
    )  # fmt: skip
    fields.refuse_rest(("tensor_data_layout",))
    return check_encoder(spec)


def _no_gguf(fields: Fields, tensors: Tensors) -> Spec:
    raise UnsupportedError("this encoder is not read from GGUF")


def _row(
    name: str,
    classes: tuple[str, ...],
    read: Callable[[Fields, Tensors], EncoderSpec],
    body: Mapping[str, str],
    heads: Mapping[str, str],
    prefix: str,
    gguf: tuple[str, ...] = (),
) -> EncoderFamily:
    architectures = tuple(cls + kind for cls in classes for kind in KINDS)
    from_gguf = _bert_gguf if gguf else _no_gguf
    return EncoderFamily(name, architectures, gguf, read, from_gguf, body, {}, prefix=prefix, heads=heads)


ROWS = (
    _row("bert", ("Bert",), partial(_bert, family="bert", head=_TANH),
         encoder_names.BERT, encoder_names.POOLER_HEAD, "bert.", GGUF_NAMES),
    _row("roberta", ("Roberta", "XLMRoberta", "Camembert"), partial(_bert, family="roberta", head=_TANH, offset=True),
         encoder_names.BERT, encoder_names.OWN_HEAD, "roberta."),
    _row("electra", ("Electra",), partial(_bert, family="electra", head=_GELU),
         encoder_names.BERT, encoder_names.OWN_HEAD, "electra."),
    _row("albert", ("Albert",), _albert, encoder_names.ALBERT, encoder_names.ALBERT_HEAD, "albert."),
    _row("distilbert", ("DistilBert",), _distilbert, encoder_names.DISTILBERT, encoder_names.DISTILBERT_HEAD,
         "distilbert."),
    _row("mpnet", ("MPNet",), _mpnet, encoder_names.MPNET, encoder_names.OWN_HEAD, "mpnet."),
    _row("modernbert", ("ModernBert",), _modernbert, encoder_names.MODERNBERT, encoder_names.MODERNBERT_HEAD, "model."),
)  # fmt: skip
