"""Hostile tokenizer files: small honest ones, mutated; and the calls that must answer each with a FormatError or work.

Not a test module: `test_hostile` runs a few hundred inputs, `make soak` 100,000.
"""

import json
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from inhouse.core.errors import FormatError, UnsupportedError, UsageError
from inhouse.model.tokens import checks, files, hf, load, spm
from inhouse.model.tokens.hf import Configs
from inhouse.model.tokens.library import LibraryCodec
from inhouse.model.tokens.tokenizer import Tokenizer

TEXTS = ("", "a", "Hello, world!", "  two\n\tspaces ", "你好 🦙 é", "<s>Hello</s>", "\x00\ufffd\u2581x" * 3)
NO_CONFIG = Configs({}, {}, {}, {}, {}, {})
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**32,
    2**63,
    2**64,
    10**30,
    1.5,
    -0.0,
    1e308,
    "",
    "a",
    "\x00",
    "\ufffd",
    "▁",
    "<s>",
    "x" * 5000,
    [],
    {},
    [[]],
    [None],
    {"type": "Sequence"},
    {"type": "Sequence", "normalizers": []},
    {"String": ""},
    {"Regex": ""},
    {"Regex": "("},
    {"Regex": "(a+)+$"},
    {"Regex": "\\"},
    {"type": "NFC"},
    {"type": "Unigram", "vocab": []},
    {"type": "ByteLevel"},
    {"type": "WordPiece"},
    {"type": "BPE"},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "Replace", "pattern": {"String": ""}, "content": "xx"},
    {"type": "Strip", "content": "a", "start": 9, "stop": 9},
    {"type": "Digits", "individual_digits": True},
    {"type": "Prepend", "prepend": ""},
    {"type": "Metaspace"},
    {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
    [1, 2, 3],
    ["a", 0.0],
    [["a", 0.0]],
)


@dataclass(frozen=True)
class Target:
    """A file form: an honest example and the reader that takes any bytes in its place."""

    name: str
    example: bytes
    read: Callable[[bytes], None]
    is_json: bool


def exercise(tokenizer: Tokenizer) -> None:
    """Every method on a few texts; what loads must also work, or say what is wrong."""
    for text in TEXTS:
        for parse_special in (True, False):
            ids = tokenizer.encode(text, parse_special=parse_special)
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            tokenizer.decode(ids)
            tokenizer.decode(ids, skip_special=False)
    for token_id in (0, 1, tokenizer.vocab_size - 1, tokenizer.vocab_size, 2**31):
        tokenizer.token_bytes(token_id)


def read_tokenizer_json(data: bytes) -> None:
    codec, rule = hf.from_tokenizer_json(data, NO_CONFIG)
    exercise(Tokenizer(codec, rule, hf.specials_of(codec, NO_CONFIG, hf.affixes_of(codec.library))))


def config_reader(tokenizer_json: bytes, field: str) -> Callable[[bytes], None]:
    """Reads a configuration file beside an honest vocabulary."""

    def read(data: bytes) -> None:
        fields: dict[str, Any] = {name: {} for name in ("tokenizer", "special_map", "added", "generation", "model")}
        fields[field] = checks.json_object(data, f"{field}.json")
        configs = Configs(**fields, templates={})
        codec, rule = hf.from_tokenizer_json(tokenizer_json, configs)
        exercise(Tokenizer(codec, rule, hf.specials_of(codec, configs, hf.affixes_of(codec.library))))

    return read


def read_sentencepiece(data: bytes) -> None:
    model = spm.read_model(data)
    codec = LibraryCodec(spm.build(model))
    exercise(Tokenizer(codec, spm.rule_of(model), hf.specials_of(codec, NO_CONFIG, ((), ()))))


def read_vocab_txt(data: bytes) -> None:
    files.vocab_txt(data, None)


def read_merges(data: bytes) -> None:
    files.vocab_and_merges(b'{"a": 0, "b": 1, "ab": 2, "abb": 3}', data, "GPT2Tokenizer")


def read_gguf(data: bytes) -> None:
    exercise(load.from_gguf(checks.json_object(data, "metadata")))


def mutations(target: Target, seed: int, count: int) -> Iterator[bytes]:
    """Deterministic hostile variants: bytes flipped, cut, doubled, and (JSON) values replaced by odd ones."""
    rng = random.Random(f"{target.name}-{seed}")
    tree = json.loads(target.example) if target.is_json else None
    for _ in range(count):
        if tree is not None and rng.random() < 0.7:
            yield json.dumps(_mutated_tree(tree, rng), ensure_ascii=False).encode("utf-8", "surrogatepass")
        else:
            yield _mutated_bytes(target.example, rng)


def survives(target: Target, data: bytes) -> str:
    """The outcome of one input: `loaded`, or the name of the error; anything else is raised."""
    try:
        target.read(data)
    except (FormatError, UnsupportedError, UsageError) as error:
        return type(error).__name__ if str(error) else "an error without words"
    return "loaded"


def _mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(changed)) if changed else 0
        match rng.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[at:]
            case 2:
                del changed[at : at + rng.randrange(1, 64)]
            case 3:
                changed[at:at] = changed[at : at + rng.randrange(1, 64)]
            case 4:
                changed[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
            case _ if changed:
                changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _mutated_tree(tree: Any, rng: random.Random) -> Any:
    copy = deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 4))):
        node = copy
        while True:
            keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], dict | list) and rng.random() < 0.75:
                node = node[key]
                continue
            match rng.randrange(4):
                case 0 if isinstance(node, dict):
                    del node[key]
                case 1 if isinstance(node, dict):
                    node[rng.choice(("a", "type", "id", "content", str(key) + "x"))] = deepcopy(node[key])
                case _:
                    node[key] = deepcopy(rng.choice(ODD))
            break
    return copy


def targets(tokenizer_json: bytes, sentencepiece: bytes, metadata: dict[str, Any]) -> list[Target]:
    """All file forms, from the small vocabulary of stories260K."""
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "add_bos_token": True,
        "chat_template": [],
        "added_tokens_decoder": {"512": {"content": "<|x|>", "special": True, "lstrip": False}},
        "additional_special_tokens": ["<|x|>"],
    }
    generation = {"bos_token_id": 1, "eos_token_id": [2, 3]}
    return [
        Target("tokenizer.json", tokenizer_json, read_tokenizer_json, True),
        Target("wordpiece", json.dumps(_WORDPIECE).encode(), read_tokenizer_json, True),
        Target("unigram", json.dumps(_UNIGRAM).encode(), read_tokenizer_json, True),
        Target("bytelevel", json.dumps(_BYTELEVEL).encode(), read_tokenizer_json, True),
        Target("tokenizer_config.json", json.dumps(config).encode(), config_reader(tokenizer_json, "tokenizer"), True),
        Target(
            "generation_config.json", json.dumps(generation).encode(), config_reader(tokenizer_json, "generation"), True
        ),
        Target("config.json", json.dumps(generation).encode(), config_reader(tokenizer_json, "model"), True),
        Target("added_tokens.json", b'{"<|x|>": 512, "<|y|>": 513}', config_reader(tokenizer_json, "added"), True),
        Target("tokenizer.model", sentencepiece, read_sentencepiece, False),
        Target("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nhello\n##s\n", read_vocab_txt, False),
        Target("merges.txt", b"#version: 0.2\na b\nab b\n", read_merges, False),
        Target("gguf", json.dumps(metadata).encode(), read_gguf, True),
    ]


_WORDPIECE = {
    "added_tokens": [
        {
            "id": 1,
            "content": "[UNK]",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    ],
    "normalizer": {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    },
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    "model": {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "hello": 4, "##s": 5, "a": 6},
    },
}
_UNIGRAM = {
    "added_tokens": [
        {
            "id": 0,
            "content": "<unk>",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    ],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [{"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}],
    },
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    },
    "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "model": {
        "type": "Unigram",
        "unk_id": 0,
        "byte_fallback": False,
        "vocab": [["<unk>", 0.0], ["</s>", 0.0], ["▁", -2.0], ["a", -3.0], ["▁a", -2.5], ["lo", -4.0], ["l", -5.5]],
    },
}
_BYTELEVEL = {
    "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    },
    "added_tokens": [
        {
            "id": 7,
            "content": "<s>",
            "special": True,
            "single_word": False,
            "lstrip": True,
            "rstrip": True,
            "normalized": False,
        }
    ],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    },
    "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {"a": 0, "b": 1, "l": 2, "o": 3, "lo": 4, "Ġ": 5, "Ġlo": 6},
        "merges": [["l", "o"], ["Ġ", "lo"]],
    },
}
