"""The table of families, and the way from a config to the row that reads it."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.model.build import Spec
from inhouse.model.families import (
    alibi,
    chatglm,
    deepseek,
    encoders,
    gemma,
    gpt,
    gptoss,
    llama,
    llama_like,
    moe,
    phi3,
    qwen,
    remote,
    seq2seq,
)
from inhouse.model.families.family import Family, Tensors
from inhouse.model.families.fields import Fields
from inhouse.model.families.kv_cache import gguf_kv, split_kv, with_kv
from inhouse.model.families.sparse_attention import narrow, split_key

FAMILIES: tuple[Family, ...] = (
    *llama.ROWS, *qwen.ROWS, *remote.ROWS, *chatglm.ROWS, *phi3.ROWS, *alibi.ROWS, *gpt.ROWS, *gemma.ROWS,
    *llama_like.ROWS,
    *moe.ROWS, *deepseek.ROWS, *gptoss.ROWS, *encoders.ROWS, *seq2seq.ROWS,
)  # fmt: skip


def resolve(
    config: Mapping[str, Any],
    names: Collection[str] = (),
    rope_factors: Sequence[float] = (),
    longrope: tuple[Sequence[float], Sequence[float]] = ((), ()),
) -> tuple[Spec, Family]:
    """The spec and the family of a model.

    Args:
        config: config.json as a mapping, or the KV table of a GGUF file.
        names: tensor names of the checkpoint. GGUF says only by them whether there are biases and a head of its own;
            a Hugging Face checkpoint that is tied by its config but brings a head keeps that head.
        rope_factors: contents of the GGUF tensor `rope_freqs.weight`, where there is one.
        longrope: contents of `rope_factors_short.weight` and `rope_factors_long.weight`.

    Raises:
        UnsupportedError: unknown architecture, or a key that would change the computation and is not honoured.
        FormatError: a key is missing, of the wrong type, or does not fit the others.
    """
    tensors = Tensors(names, _floats(rope_factors), (_floats(longrope[0]), _floats(longrope[1])))
    if "general.architecture" in config:
        return _resolve_gguf(config, tensors)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise FormatError(
            f"config.json has architectures = {architectures!r}, expected one name", param="architectures"
        )
    config, narrowed = split_key(config)
    config, kv = split_kv(config)
    for family in FAMILIES:
        if architectures[0] in family.architectures and family.claims(Fields(config, "config.json")):
            return with_kv(narrow(family.from_hf(Fields(config, "config.json"), tensors), narrowed), kv), family
    known = [name for family in FAMILIES for name in family.architectures]
    raise _unknown(architectures[0], known)


def _resolve_gguf(config: Mapping[str, Any], tensors: Tensors) -> tuple[Spec, Family]:
    name = config["general.architecture"]
    experts = bool(config.get(f"{name}.expert_count"))
    rows = [family for family in FAMILIES if name in family.gguf]
    for family in rows:
        if family.mixture == experts or len(rows) == 1:
            tokens = config.get("tokenizer.ggml.tokens")
            full = dict(config)
            if tokens is not None:
                if not isinstance(tokens, Sequence) or isinstance(tokens, str):
                    raise FormatError("tokenizer.ggml.tokens of the GGUF metadata is not a list of tokens")
                full.setdefault(f"{name}.vocab_size", len(tokens))
            if name in encoders.GGUF_NAMES:
                full[f"{name}.token_type_count"] = config.get("tokenizer.ggml.token_type_count")
            spec = family.from_gguf(Fields(full, "the GGUF metadata", f"{name}.", single=True), tensors)
            return with_kv(spec, gguf_kv(config)), family
    raise _unknown(str(name), [known for family in FAMILIES for known in family.gguf])


def _floats(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _unknown(name: str, known: Sequence[str]) -> UnsupportedError:
    return UnsupportedError(
        f"unknown architecture {name!r}", remedy=f"Known: {', '.join(known)}", param="architectures"
    )
