"""The folder of a Hugging Face model: which special tokens, affixes and chat templates its files name.

Knows tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json, generation_config.json,
config.json and the template files. Does not know the other vocabulary forms (`files`, `spm`) or GGUF.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import tokenizers

from inhouse.core.errors import FormatError
from inhouse.model.tokens import checks
from inhouse.model.tokens.library import Codec, LibraryCodec, guarded, parse
from inhouse.model.tokens.pieces import PieceRule, rule_of_decoder
from inhouse.model.tokens.tokenizer import Pair, Specials

MAX_TEMPLATE: Final = 1 << 20
"""Characters of one chat template. The longest in use has about 20,000."""

CONFIG_FILES: Final = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "config.json",
    "chat_template.jinja",
    "chat_template.json",
)
EXTRA_TEMPLATES: Final = "additional_chat_templates"


@dataclass(frozen=True, slots=True)
class Configs:
    """The JSON files beside a vocabulary; empty where absent."""

    tokenizer: Mapping[str, Any]
    special_map: Mapping[str, Any]
    added: Mapping[str, Any]
    generation: Mapping[str, Any]
    model: Mapping[str, Any]
    templates: Mapping[str, str]


def read_configs(folder: Path) -> Configs:
    """Reads the files that are there.

    Raises:
        FormatError: one of them is damaged.
    """
    tokenizer = checks.optional_object(folder, "tokenizer_config.json")
    return Configs(
        tokenizer,
        checks.optional_object(folder, "special_tokens_map.json"),
        checks.optional_object(folder, "added_tokens.json"),
        checks.optional_object(folder, "generation_config.json"),
        checks.optional_object(folder, "config.json"),
        _templates(folder, tokenizer.get("chat_template")),
    )


def from_tokenizer_json(data: bytes, configs: Configs) -> tuple[LibraryCodec, PieceRule]:
    """The codec and decoding rule of a tokenizer.json, with tokenizer_config.json's added tokens."""
    content = checks.tokenizer_json(data)
    tokenizer = parse(checks.text_of(data, "tokenizer.json"))
    rule = rule_of_decoder(content.get("decoder"))
    wanted = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    if any(tokenizer.token_to_id(text) != i for text, i in wanted.items()):
        # The library numbers added tokens on from the vocabulary's size; ids with gaps have to stand in the model.
        vocab = content["model"]["vocab"]
        if not isinstance(vocab, dict):
            raise FormatError("added tokens of tokenizer.json have ids that do not follow its Unigram vocabulary")
        content["model"]["vocab"] = checks.vocabulary(wanted | vocab | wanted, "tokenizer.json with its added tokens")
        tokenizer = parse(json.dumps(content, ensure_ascii=False))
    add_declared(tokenizer, configs)
    vocab = content["model"]["vocab"]
    highest = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
    return LibraryCodec(tokenizer, highest + 1), rule


def add_declared(tokenizer: tokenizers.Tokenizer, configs: Configs) -> None:
    """Adds the tokens of `added_tokens_decoder` and added_tokens.json that the vocabulary does not have yet.

    Raises:
        FormatError: a token whose declared id the vocabulary gives to another.
    """
    declared = _declared(configs)
    present = tokenizer.get_added_tokens_decoder()
    for number in sorted(declared):
        token = declared[number]
        if present.get(number) == token:
            continue
        with guarded(f"adding token {token.content[:60]!r}"):
            if token.special:
                tokenizer.add_special_tokens([token])
            else:
                tokenizer.add_tokens([token])
            got = tokenizer.token_to_id(token.content)
        if got != number:
            raise FormatError(f"token {token.content[:60]!r} is declared with id {number}, the vocabulary gives {got}")


def _declared(configs: Configs) -> dict[int, tokenizers.AddedToken]:
    special = {text for value in names_of(configs).values() for text in ([value] if isinstance(value, str) else value)}
    declared = {}
    for text, number in configs.added.items():
        checks.token_id(number, f"added token {text[:60]!r}")
        declared[number] = tokenizers.AddedToken(text, special=text in special, normalized=text not in special)
    decoder = configs.tokenizer.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise FormatError("added_tokens_decoder of tokenizer_config.json is not an object")
    for key, entry in decoder.items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not key.isascii() or not key.isdigit() or not isinstance(content, str) or not content:
            raise FormatError(f"added_tokens_decoder holds {key[:40]!r}: {str(entry)[:60]}")
        flags = {name: bool(entry.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        declared[checks.token_id(int(key[:12]), f"added token {content[:60]!r}")] = tokenizers.AddedToken(
            content, **flags
        )
    return declared


def names_of(configs: Configs) -> dict[str, str | list[str]]:
    """`bos_token`, `eos_token`, ... `additional_special_tokens` as the configuration names them."""
    names: dict[str, str | list[str]] = {}
    for source in (configs.special_map, configs.tokenizer):
        for key, value in source.items():
            if key.endswith("_token") and (text := _content(value)):
                names[key] = text
            elif key == "additional_special_tokens" and isinstance(value, list):
                names[key] = [text for entry in value if (text := _content(entry))]
    return names


def specials_of(
    codec: Codec, configs: Configs, affixes: tuple[tuple[int, ...], tuple[int, ...]], pair: Pair | None = None
) -> Specials:
    """BOS, EOS, affixes, pairs and templates of a folder.

    Args:
        affixes: ids that the vocabulary itself puts before and after a text; `add_bos_token` and `add_eos_token` of
            tokenizer_config.json overrule them.
    """
    names = names_of(configs)
    bos = _id_of(codec, names.get("bos_token"))
    eos = _id_of(codec, names.get("eos_token"))
    if bos is None:
        bos = next(iter(_ids(configs.generation, "bos_token_id") or _ids(configs.model, "bos_token_id")), None)
    if bos is not None and bos >= codec.size:
        raise FormatError(f"bos_token_id is {bos}, the vocabulary has {codec.size} tokens")
    ends = _ids(configs.generation, "eos_token_id") or _ids(configs.model, "eos_token_id")
    prefix, suffix = affixes
    add_bos, add_eos = configs.tokenizer.get("add_bos_token"), configs.tokenizer.get("add_eos_token")
    if isinstance(add_bos, bool) and bos is not None and (prefix[:1] == (bos,)) != add_bos:
        prefix = (bos, *prefix) if add_bos else prefix[1:]
    if isinstance(add_eos, bool) and eos is not None and (suffix[-1:] == (eos,)) != add_eos:
        suffix = (*suffix, eos) if add_eos else suffix[:-1]
    if beyond := [i for i in (*prefix, *suffix) if i >= codec.size]:
        raise FormatError(f"the post-processor adds the id {beyond[0]}, the vocabulary has {codec.size} tokens")
    all_ends = frozenset(ends) | (frozenset() if eos is None else {eos})
    return Specials(bos, all_ends, prefix, suffix, names, configs.templates, pair)


def affixes_of(tokenizer: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the library's post-processor puts before and after a text."""
    with guarded("the post-processor failed"):
        for probe in ("a", "1", "."):
            body = tokenizer.encode(probe, add_special_tokens=False).ids
            whole = tokenizer.encode(probe, add_special_tokens=True).ids
            for start in range(len(whole) - len(body) + 1):
                if body and whole[start : start + len(body)] == body:
                    return tuple(whole[:start]), tuple(whole[start + len(body) :])
    return (), ()


def pair_of(tokenizer: tokenizers.Tokenizer) -> Pair | None:
    """How the library's post-processor puts two texts together; None where it puts nothing between them."""
    with guarded("the post-processor failed"):
        whole = tokenizer.encode("a", "a", add_special_tokens=True)
        ids, texts, types = whole.ids, whole.sequence_ids, whole.type_ids
    if 0 not in texts or 1 not in texts:
        return None
    ends = [texts.index(0), texts.index(1), len(texts)]
    after = [max(i for i, text in enumerate(texts) if text == n) + 1 for n in (0, 1)]
    cuts = [0, ends[0], after[0], ends[1], after[1], len(ids)]
    prefix, _, middle, _, suffix = (tuple(ids[a:b]) for a, b in pairwise(cuts))
    if not middle or cuts != sorted(cuts):
        return None
    kinds = [types[a] if a < b else 0 for a, b in pairwise(cuts)]
    return Pair(prefix, middle, suffix, (kinds[0], kinds[1], kinds[2], kinds[3], kinds[4]))


def _id_of(codec: Codec, name: str | list[str] | None) -> int | None:
    return codec.id_of(name) if isinstance(name, str) else None


def _ids(config: Mapping[str, Any], key: str) -> list[int]:
    """One id or a list of ids of a configuration; -1 stands for none."""
    value = config.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [checks.token_id(number, key) for number in values if number != -1]


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _templates(folder: Path, inline: Any) -> dict[str, str]:
    """Chat templates by name; files of their own overrule the one inside tokenizer_config.json."""
    templates: dict[str, str] = {}
    if isinstance(inline, str):
        templates["default"] = inline
    elif isinstance(inline, list):
        for entry in inline:
            match entry:
                case {"name": str(name), "template": str(source)}:
                    templates[name] = source
                case _:
                    raise FormatError(f"chat_template of tokenizer_config.json holds {str(entry)[:60]}")
    elif inline is not None:
        raise FormatError(f"chat_template of tokenizer_config.json is a {type(inline).__name__}")
    legacy = checks.optional_object(folder, "chat_template.json").get("chat_template")
    if isinstance(legacy, str):
        templates["default"] = legacy
    for path in [folder / "chat_template.jinja", *sorted((folder / EXTRA_TEMPLATES).glob("*.jinja"))]:
        if path.is_file():
            name = "default" if path.parent == folder else path.stem
            templates[name] = checks.text_of(checks.read_bytes(path), path.name)
    for name, source in templates.items():
        if len(source) > MAX_TEMPLATE:
            raise FormatError(f"chat template {name[:40]!r} has {len(source)} characters, the limit is {MAX_TEMPLATE}")
    return templates
