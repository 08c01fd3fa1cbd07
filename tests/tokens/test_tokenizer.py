"""What a Tokenizer promises: special tokens, affixes, bytes, decoding, threads. Oracles: transformers, tokenizers."""

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from inhouse.core.errors import FormatError, NotFoundError, UnsupportedError, UsageError
from inhouse.model.tokens.load import from_gguf, load_tokenizer
from inhouse.model.tokens.pieces import BYTE_TO_CHAR, PieceRule, rule_of_decoder
from inhouse.model.tokens.tokenizer import Tokenizer
from tests.tokens.conftest import FOLDERS

pytestmark = [pytest.mark.null, pytest.mark.realdata]

Load = Callable[[str], Tokenizer]
SPECIAL_TEXTS = {
    "qwen2": "<|im_start|>user<|im_end|>",
    "phi-3-mini": "<|user|>hi<|end|><|endoftext|>",
    "t5-small": "a</s><pad><extra_id_0>",
    "minimind": "<|im_start|>x<|endoftext|>",
    "bert-cased": "[CLS] a [SEP] [MASK]",
    "cl100k_base": "<|endoftext|> and <|endofprompt|>",
    "torchtune-m": "<s>a</s>",
    "roberta-base": "<s>a</s><mask>",
    "t5-small/spiece.model": "a</s><pad>",
}


@pytest.mark.parametrize("name", SPECIAL_TEXTS)
def test_text_of_users_never_becomes_a_special_token(name: str, load_named: Load) -> None:
    tokenizer, text = load_named(name), SPECIAL_TEXTS[name]
    parsed = tokenizer.encode(text, add_special=False)
    plain = tokenizer.encode(text, add_special=False, parse_special=False)
    assert tokenizer.special_ids & set(parsed)
    # An unknown character may still give the unknown token: it carries no meaning.
    unknown = {tokenizer.id_of(word) for word in ("<unk>", "[UNK]")}
    assert tokenizer.special_ids & set(plain) <= unknown
    visible = tokenizer.decode(plain)
    if name in ("qwen2", "phi-3-mini", "minimind", "cl100k_base"):
        assert visible == text


@pytest.mark.parametrize("name", FOLDERS)
def test_decoding_gives_the_text_back(name: str, load_named: Load, reference: dict[str, Any]) -> None:
    tokenizer = load_named(name)
    lossless = tokenizer.rule.kind == "byte_level" or tokenizer.rule.byte_tokens
    checked = 0
    for text in reference["texts"]:
        ids = tokenizer.encode(text)
        joined = b"".join(tokenizer.token_bytes(i) for i in ids if i not in tokenizer.special_ids)
        assert tokenizer.decode(ids) == joined.removeprefix(b" " if tokenizer.rule.strip_first else b"").decode()
        if lossless:
            # Some vocabularies normalise to NFC, which composes accents.
            assert tokenizer.decode(ids) in (text, unicodedata.normalize("NFC", text))
            checked += 1
    assert checked in (0, 67)


@pytest.mark.parametrize("name", ["qwen2", "phi-3-mini", "t5-small", "bert-cased", "gpt-neox-20b", "phi-2"])
def test_decoding_equals_the_library(name: str, load_named: Load, reference: dict[str, Any]) -> None:
    tokenizer = load_named(name)
    library = tokenizer.codec.library  # type: ignore[attr-defined]
    for text in reference["texts"]:
        ids = tokenizer.encode(text)
        if name == "t5-small" and ids[:1] == [tokenizer.id_of("▁")]:
            continue  # Metaspace drops every space of a first token; SentencePiece drops one
        assert tokenizer.decode(ids) == library.decode(ids), text


def test_affixes_and_special_tokens_equal_transformers(tokenizer_files: Callable[[str], Path], stories: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle for affixes is transformers")
    folders = [tokenizer_files("phi-3-mini"), tokenizer_files("minimind"), stories / "hf"]
    for folder in folders:
        oracle = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        text = "Hello <|im_start|>you<|end|>  <s>"
        assert tokenizer.encode(text) == oracle(text)["input_ids"], folder.name
        assert tokenizer.bos_id == oracle.bos_token_id
        assert oracle.eos_token_id in tokenizer.eos_ids
        assert (tokenizer.chat_template or "") == (oracle.chat_template or "")


def test_generation_config_names_further_ends(stories: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((stories / "hf" / name).read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert load_tokenizer(tmp_path).eos_ids == {2, 5, 9}
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer(tmp_path).eos_ids == {2, 7}


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, True), (False, False), (False, True)])
def test_the_configuration_overrules_the_affixes(add_bos: bool, add_eos: bool, stories: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((stories / "hf" / "tokenizer.json").read_bytes())
    config = json.loads((stories / "hf" / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | {"add_bos_token": add_bos, "add_eos_token": add_eos})
    )
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("Hello")
    assert (ids[0] == 1, ids[-1] == 2, tokenizer.add_bos) == (add_bos, add_eos, add_bos)
    assert tokenizer.encode("Hello", add_special=False) == [i for i in ids if i > 2]


def test_named_templates_and_template_files(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((stories / "hf" / "tokenizer.json").read_bytes())
    templates = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert load_tokenizer(tmp_path).chat_templates == {"default": "A", "tool_use": "B"}
    (tmp_path / "chat_template.jinja").write_text("C")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("D")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == "C"
    assert tokenizer.chat_templates == {"default": "C", "tool_use": "B", "rag": "D"}


def test_ids_outside_the_vocabulary_give_no_text(load_named: Load) -> None:
    tokenizer = load_named("qwen2")
    assert tokenizer.vocab_size == 151_646
    assert tokenizer.decode([9707, 151_900, 1879, 2**31]) == "Hello world"
    assert tokenizer.token_of(151_900) is None
    assert tokenizer.id_of("no such token") is None
    with pytest.raises(UsageError, match="-1 is negative"):
        tokenizer.token_bytes(-1)


def test_bytes_of_single_tokens(load_named: Load, stories: Path) -> None:
    qwen, llama = load_named("qwen2"), load_tokenizer(stories / "hf")
    assert qwen.token_bytes(qwen.encode(" world")[0]) == b" world"
    assert b"".join(qwen.token_bytes(i) for i in qwen.encode("🦙")) == "🦙".encode()
    assert llama.token_bytes(13) == b"\n"
    assert llama.token_of(13) == "<0x0A>"
    assert llama.token_bytes(403) == b" Once"
    assert load_named("phi-2").token_bytes(50_257) == b" " * 31


def test_lone_surrogates_are_refused(load_named: Load) -> None:
    with pytest.raises(UsageError, match="Unicode"):
        load_named("minimind").encode("a\ud800b")


def test_threads_get_the_same_ids(load_named: Load, reference: dict[str, Any]) -> None:
    tokenizer = load_tokenizer_fresh(load_named("phi-3-mini"))
    texts = [text + "<|end|>" for text in reference["texts"]] * 4
    wanted = [(tokenizer.encode(text), tokenizer.encode(text, parse_special=False)) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda t: (tokenizer.encode(t), tokenizer.encode(t, parse_special=False)), texts))
    assert found == wanted


def load_tokenizer_fresh(tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary with nothing built lazily yet."""
    library = tokenizer.codec.library  # type: ignore[attr-defined]
    codec = type(tokenizer.codec)(tokenizers.Tokenizer.from_str(library.to_str()))  # type: ignore[call-arg]
    return Tokenizer(codec, tokenizer.rule, tokenizer.specials)


def test_gguf_ends_templates_and_flags(load_gguf: Load, stories: Path) -> None:
    phi = load_gguf("phi-3")
    assert {phi.id_of("<|endoftext|>"), phi.id_of("<|end|>"), phi.id_of("</s>")} == phi.eos_ids
    assert phi.chat_template is not None
    assert phi.special_tokens["bos_token"] == "<s>"
    bert = load_gguf("bert-bge")
    assert bert.encode("hello") == [101, 7592, 102]
    assert bert.decode(bert.encode("Hello, world! don't")) == "hello, world! don ' t"


def test_phi_3_special_tokens_swallow_the_white_space_after_them(load_gguf: Load) -> None:
    """transformers' tokenizer_config of Phi-3 says rstrip; GGUF has no field for it, so the model's name decides."""
    phi = load_gguf("phi-3")
    assert phi.decode(phi.encode("<|user|>\n hi<|end|>\n"), skip_special=False) == "<s><|user|> hi<|end|>"


def test_import_is_cheap() -> None:
    """`tokenizers` takes 20 to 30 ms to import; our own modules may add as much. The best of five counts."""
    code = "import time; t = time.perf_counter(); import inhouse.model.tokens.tokenizer; print(time.perf_counter() - t)"
    took = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) for _ in range(5)
    ]
    assert min(took) < 0.06 * max(1.0, os.getloadavg()[0])


def test_what_we_do_not_know_is_refused(load_gguf: Load, tmp_path: Path) -> None:
    base = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.merges": []}
    with pytest.raises(UnsupportedError, match="'from-the-future'"):
        from_gguf(base | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "from-the-future"})
    with pytest.raises(UnsupportedError, match="'rwkv'"):
        from_gguf(base | {"tokenizer.ggml.model": "rwkv"})
    with pytest.raises(UnsupportedError, match="CTC"):
        rule_of_decoder({"type": "CTC"})
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    with pytest.raises(UnsupportedError, match="CLIPTokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")


def test_added_ids_with_gaps_keep_their_ids(tmp_path: Path) -> None:
    content = {
        "added_tokens": [
            {
                "id": 300,
                "content": "<x>",
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }  # fmt: skip
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {char: byte for byte, char in BYTE_TO_CHAR.items()}, "merges": []},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a<x>b") == [97, 300, 98]
    assert tokenizer.encode("<x>", parse_special=False) == [60, 120, 62]
    assert (tokenizer.vocab_size, tokenizer.decode([97, 299, 300], skip_special=False)) == (301, "a<x>")


def test_alphabet_and_rules() -> None:
    assert len(set(BYTE_TO_CHAR.values())) == 256
    oracle = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert set(BYTE_TO_CHAR.values()) == oracle
    rule = PieceRule("sentencepiece", byte_tokens=True)
    assert (rule.piece("<0xE4>"), rule.piece("▁a"), rule.piece("<0xE4")) == (b"\xe4", b" a", b"<0xE4")
    assert PieceRule("byte_level").piece("é", added=True) == "é".encode()


def test_merges_of_unknown_tokens_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na c\n")
    with pytest.raises(FormatError, match="c"):
        load_tokenizer(tmp_path)
