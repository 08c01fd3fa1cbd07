"""Tokenizers written: the `tokenizer.ggml.*` table of a GGUF file, and the files of a Hugging Face folder.

What is written for GGUF is read back and has to give the same ids on sample texts; a tokenizer that GGUF has no words
for is an error. Keys: github.com/ggml-org/ggml, docs/gguf.md.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import tokenizers
from tokenizers import processors

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.model.tokens import gguf
from inhouse.model.tokens.library import LibraryCodec
from inhouse.model.tokens.load import assemble
from inhouse.model.tokens.patterns import PRE_TOKENIZERS
from inhouse.model.tokens.pieces import BYTE_TO_CHAR
from inhouse.model.tokens.spm import PieceType
from inhouse.model.tokens.tokenizer import Tokenizer

SAMPLES: Final = (
    "Hello, world! It's 3.14159 o'clock; they'll come at 12:30.",
    "  two  spaces\tand a tab\n\nand lines\r\n   end ",
    "Größe, naïve café, Ελλάδα, Привет мир, 你好，世界。日本語のテキスト 한국어",
    "def f(x):\n    return x ** 2  # 1234567890\n",
    "🙂👍🏽 ZWJ 👨‍👩‍👧 ½ ² €100 <b>tag</b> {json: [1, 2]}",
    "",
    "a",
    " a",
)
_ID_KEYS: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
_LAST: Final = -1e9  # score of a piece that no merge makes


def gguf_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.*` keys for a tokenizer that was built from files (not from its compiled form).

    Args:
        vocab_size: rows of the embedding; ids without a token become padding entries.

    Raises UnsupportedError for a kind of tokenizer that GGUF does not have.
    """
    if not isinstance(tokenizer.codec, LibraryCodec):
        raise UnsupportedError("the tokenizer's compiled form cannot be exported; open the model's own files")
    library = json.loads(tokenizer.codec.library.to_str())
    model = library["model"]
    if model["type"] != "BPE":
        raise UnsupportedError(f"a tokenizer of the kind {model['type']} is not written to GGUF")
    texts = [tokenizer.token_of(i) or f"[PAD{i}]" for i in range(vocab_size)]
    if tokenizer.rule.kind == "byte_level":
        keys = _bpe(library, texts)
    else:
        keys = _spm(library, texts)
    keys["token_type"] = np.array(_types(tokenizer, texts), np.int32)
    found = keys | _specials(tokenizer)
    table: dict[str, Any] = {gguf.KEY + name: value for name, value in found.items()}
    stem = "tokenizer.chat_template"
    table |= {stem if n == "default" else f"{stem}.{n}": t for n, t in tokenizer.chat_templates.items()}
    _check(tokenizer, table)
    return table


def _types(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    unknown = tokenizer.special_tokens.get("unk_token")
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)} if tokenizer.rule.kind != "byte_level" else set()
    kinds = []
    for i, text in enumerate(texts):
        kind = PieceType.NORMAL
        if tokenizer.token_of(i) is None:
            kind = PieceType.UNUSED
        elif text in byte_tokens:
            kind = PieceType.BYTE
        elif text == unknown and tokenizer.rule.kind != "byte_level":
            kind = PieceType.UNKNOWN
        elif i in tokenizer.codec.added:
            kind = PieceType.CONTROL if tokenizer.codec.added[i] else PieceType.USER_DEFINED
        kinds.append(int(kind))
    return kinds


def _bpe(library: Mapping[str, Any], texts: list[str]) -> dict[str, Any]:
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in library["model"]["merges"]]
    return {"model": "gpt2", "pre": _pre(library), "tokens": texts, "merges": merges}


def _pre(library: Mapping[str, Any]) -> str:
    """The GGUF name of the pre-tokenizer whose patterns these are."""
    patterns = tuple(_patterns(library.get("pre_tokenizer") or {}))
    nfc = "NFC" in json.dumps(library.get("normalizer"))
    whole = bool(library["model"].get("ignore_merges"))
    rows = {name: row for name, row in PRE_TOKENIZERS.items() if row.patterns == patterns}
    for same in (lambda r: (r.nfc, r.whole_words) == (nfc, whole), lambda r: r.nfc == nfc, lambda r: True):
        for name, row in rows.items():
            if same(row):
                return name
    raise UnsupportedError(
        "the tokenizer cuts words by patterns that no GGUF pre-tokenizer has",
        remedy="Export to safetensors, which keeps tokenizer.json.",
    )


def _patterns(node: Mapping[str, Any]) -> list[str]:
    match node.get("type"):
        case "Sequence":
            return [pattern for child in node["pretokenizers"] for pattern in _patterns(child)]
        case "Split":
            pattern = node["pattern"]
            return [pattern.get("Regex") or pattern.get("String", "")]
        case "ByteLevel" if node.get("use_regex", True):
            return [PRE_TOKENIZERS["gpt-2"].patterns[0]]
        case "Digits":
            return [r"\p{N}" if node.get("individual_digits") else r"\p{N}+"]
    return []


def _spm(library: Mapping[str, Any], texts: list[str]) -> dict[str, Any]:
    """SentencePiece BPE: scores in the order of the merges, so that the best merge has the highest."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(library["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, number)
    scores = np.array([-float(rank[text]) if text in rank else _LAST for text in texts], np.float32)
    prefix = "Prepend" in json.dumps(library.get("normalizer")) or _metaspace(library.get("pre_tokenizer"))
    return {"model": "llama", "pre": "default", "tokens": texts, "scores": scores, "add_space_prefix": prefix}


def _metaspace(node: Any) -> bool:
    if not isinstance(node, dict):
        return False
    if node.get("type") == "Metaspace":
        return bool(node.get("prepend_scheme", "always") != "never")
    return any(_metaspace(child) for child in node.get("pretokenizers", []))


def _specials(tokenizer: Tokenizer) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for name, key in _ID_KEYS.items():
        text = tokenizer.special_tokens.get(name)
        number = tokenizer.id_of(text) if isinstance(text, str) else None
        if number is not None:
            keys[key] = number
    if tokenizer.bos_id is not None:
        keys["bos_token_id"] = tokenizer.bos_id
    ends = sorted(tokenizer.eos_ids)
    if ends:
        keys.setdefault("eos_token_id", ends[0])
        others = [end for end in ends if end != keys["eos_token_id"]]
        if others:
            keys["eot_token_id"] = others[0]
    keys["add_bos_token"] = tokenizer.add_bos
    keys["add_eos_token"] = bool(tokenizer.specials.suffix)
    return keys


def _check(tokenizer: Tokenizer, table: Mapping[str, Any]) -> None:
    """Raises UnsupportedError where the written tokenizer gives other ids than the one that was read."""
    try:
        again = assemble(gguf.build(table))
    except FormatError as error:
        raise UnsupportedError(f"the tokenizer has no GGUF form: {error.message}") from None
    for sample in SAMPLES:
        for text in (sample, "".join(BYTE_TO_CHAR.values()) if sample == "a" else sample + sample):
            if tokenizer.encode(text) != again.encode(text):
                raise UnsupportedError(
                    f"GGUF has no form of this tokenizer that gives the same ids for {text[:40]!r}",
                    remedy="Export to safetensors, which keeps the tokenizer's own files.",
                )


def _with_affixes(tokenizer: Tokenizer, library: tokenizers.Tokenizer) -> str:
    """tokenizer.json with what goes before and after a text."""
    text: str = library.to_str(pretty=False)
    prefix, suffix = tokenizer.specials.prefix, tokenizer.specials.suffix
    if not prefix and not suffix:
        return text
    again = tokenizers.Tokenizer.from_str(text)
    names = {i: tokenizer.token_of(i) or "" for i in (*prefix, *suffix)}
    single = " ".join([*(f"{names[i]}:0" for i in prefix), "$A:0", *(f"{names[i]}:0" for i in suffix)])
    special = [(name, i) for i, name in names.items()]
    again.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return str(again.to_str(pretty=False))


def hf_tokenizer(tokenizer: Tokenizer) -> dict[str, str]:
    """File name -> content of a tokenizer that came without files of its own (from GGUF)."""
    if not isinstance(tokenizer.codec, LibraryCodec):
        raise UnsupportedError("the tokenizer's compiled form cannot be exported; open the model's own files")
    config: dict[str, Any] = dict(tokenizer.special_tokens)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": tokenizer.add_bos}
    config["add_eos_token"] = bool(tokenizer.specials.suffix)
    files = {"tokenizer.json": _with_affixes(tokenizer, tokenizer.codec.library)}
    templates = dict(tokenizer.chat_templates)
    if "default" in templates:
        files["chat_template.jinja"] = templates.pop("default")
    for name, template in templates.items():
        files[f"additional_chat_templates/{name}.jinja"] = template
    ends = sorted(tokenizer.eos_ids)
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2)
    kept = {key: value for key, value in generation.items() if value is not None}
    files["generation_config.json"] = json.dumps(kept, indent=2)
    return files
